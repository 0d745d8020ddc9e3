// The page of `tinyllama serve`: a chat, or a text that is continued. Each token shows what else was likely.

const TINTS = [0.02, 0.1, 0.3]; // upper limits of the probabilities that are tinted, as in the playground
const LISTED = 5; // alternatives to a token
const ENDED = {
  stop: "the model ended it",
  length: "as many tokens as asked for",
  context: "the context is full",
  stopped: "stopped",
  error: "broken off",
};
const LABEL = { chat: "Message", completion: "Text to continue" };
const ACT = { chat: "Send", completion: "Write" };
const HINT = { chat: "Enter sends, Shift-Enter begins a line", completion: "Ctrl-Enter writes" };

const $ = (id) => document.getElementById(id);
const texts = { chat: [], completion: [] }; // turns: what is said or given, and what the model wrote
const drafts = { chat: "", completion: "Once upon a time" }; // what stands in the input of each
let mode = "chat";
let model = null; // what /v1/models says
let running = null; // an AbortController
let selected = null; // { turn, index } of a token
let repeat = null; // what "Try again" does

function make(tag, className = "", text = "") {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
}

function button(text, act) {
  const made = make("button", "", text);
  made.type = "button";
  made.addEventListener("click", act);
  return made;
}

// ---- the server ----

async function call(path, body, signal) {
  const key = sessionStorage.getItem("tinyllama-key");
  const bytes = new TextEncoder().encode(key ?? ""); // of which a header is made, each a character
  const headers = key ? { Authorization: `Bearer ${String.fromCharCode(...bytes)}` } : {};
  const options = body ? { method: "POST", body: JSON.stringify(body), headers, signal } : { headers };
  const response = await fetch(path, options);
  if (response.ok) return response;
  const said = await response.json().catch(() => ({}));
  const error = new Error(said.error?.message ?? response.statusText);
  error.status = response.status;
  throw error;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { done, value } = await reader.read();
    if (done) throw new Error("The server has broken off the answer.");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.slice("data: ".length);
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function fail(error, again) {
  const gone = error instanceof TypeError; // fetch has no other sign of it
  const prefix = error.status ? `${error.status}: ` : "";
  repeat = again;
  $("error").replaceChildren(gone ? "The server can't be reached." : prefix + error.message, " ");
  if (error.status === 401) {
    $("error").textContent = error.message.split(":")[0]; // the rest is about headers
    $("key").hidden = false;
    $("key-value").focus();
  } else $("error").append(button("Try again", retry));
}

function retry() {
  $("error").replaceChildren();
  $("input").focus();
  repeat?.();
}

async function load() {
  try {
    model = (await (await call("v1/models")).json()).data[0];
  } catch (error) {
    $("model").textContent = $("status").textContent = "";
    return fail(error, load);
  }
  const { n_params, n_ctx, has_template } = model.meta;
  const size = `${(n_params / 1e6).toLocaleString("en", { maximumSignificantDigits: 3 })} M parameters`;
  $("model").textContent = `${model.id} · ${size} · context ${n_ctx.toLocaleString("en")} tokens`;
  document.title = `${model.id} – tinyllama`;
  $("status").textContent = has_template ? "" : "The model has no chat template: it continues texts.";
  const [chat, completion] = document.querySelectorAll("[name=mode]");
  chat.disabled = !has_template;
  (has_template ? chat : completion).checked = true;
  enter(has_template ? "chat" : "completion");
  $("input").focus();
}

// ---- writing ----

function given() {
  const settings = new FormData($("settings"));
  const entries = [...settings].filter(([, value]) => value !== "");
  return { ...Object.fromEntries(entries.map(([name, value]) => [name, Number(value)])), stream: true };
}

// Continue what is there by an answer.
async function write() {
  const turns = texts[mode];
  const body = given();
  let path = "v1/completions";
  if (mode === "chat") {
    path = "v1/chat/completions";
    const system = $("system").value.trim();
    body.messages = turns.map(({ role, text }) => ({ role, content: text }));
    if (system) body.messages.unshift({ role: "system", content: system });
    Object.assign(body, { logprobs: true, top_logprobs: LISTED });
  } else Object.assign(body, { prompt: turns[0].text, logprobs: LISTED });
  $("error").replaceChildren();
  const answer = add("assistant");
  running = new AbortController();
  const started = performance.now();
  let reason = "";
  show("Reading …");
  try {
    for await (const event of events(await call(path, body, running.signal))) {
      if (event.error) throw new Error(event.error.message);
      const [choice] = event.choices;
      take(answer, choice);
      if (answer.tokens.length) show("Writing …");
      reason = choice.finish_reason ?? reason;
      const most = body.max_tokens ?? (mode === "chat" ? Infinity : 16); // 16 is OpenAI's for completions
      if (reason === "length" && answer.tokens.length < most) reason = "context";
      answer.seed = choice.seed;
    }
  } catch (error) {
    reason = error.name === "AbortError" ? "stopped" : "error";
    if (reason === "error") {
      const isEmpty = !answer.tokens.length;
      if (isEmpty) remove(answer);
      fail(error, () => (isEmpty ? write() : another(answer)));
    }
  }
  running = null;
  finish(answer, reason, (performance.now() - started) / 1000);
}

function finish(answer, reason, seconds) {
  speak(answer, true);
  const n = answer.tokens.length;
  const seed = answer.seed === undefined ? "" : ` · seed ${answer.seed}`;
  answer.note.textContent = n
    ? `${n} token${n > 1 ? "s" : ""} in ${seconds.toFixed(1)} s${seed} · ended: ${ENDED[reason]}`
    : `The answer is empty: ${ENDED[reason]}.`;
  show(reason === "error" ? "" : reason === "stopped" ? "Stopped." : "Done.");
}

// What an event adds to an answer: text, and tokens with the places where they begin in it.
function take(answer, { delta, text, logprobs }) {
  const isAtEnd = $("texts").scrollHeight - $("texts").scrollTop - $("texts").clientHeight < 40;
  const piece = delta ? (delta.content ?? "") : text;
  const first = Math.max(0, answer.tokens.length - 1); // which may get more text
  answer.text += piece;
  answer.points.push(...piece); // characters, not UTF-16 units: text_offset counts them, too
  for (const token of logprobs?.content ?? []) {
    const bytes = answer.decoder.decode(new Uint8Array(token.bytes), { stream: true });
    const top = token.top_logprobs.map((other) => [other.token, Math.exp(other.logprob)]);
    answer.tokens.push({ at: answer.n_told, piece: token.token, prob: Math.exp(token.logprob), top });
    answer.n_told += [...bytes].length;
  }
  logprobs?.tokens?.forEach((piece, i) => {
    const { text_offset, token_logprobs, top_logprobs } = logprobs;
    const top = Object.entries(top_logprobs[i] ?? {}).map(([other, value]) => [other, Math.exp(value)]);
    top.sort((one, other) => other[1] - one[1]); // JavaScript puts keys that are numbers first
    answer.tokens.push({ at: text_offset[i], piece, prob: Math.exp(token_logprobs[i]), top });
  });
  for (let i = first; i < answer.tokens.length; i++) draw(answer, i);
  speak(answer);
  if (isAtEnd) $("texts").scrollTop = $("texts").scrollHeight;
}

function draw(answer, i) {
  const { at, piece, prob } = answer.tokens[i];
  const text = answer.points.slice(at, answer.tokens[i + 1]?.at).join("");
  const span = answer.box.children[i] ?? answer.box.appendChild(make("span"));
  const level = TINTS.findIndex((limit) => prob < limit);
  span.className = level < 0 ? "" : `tint${level}`;
  span.classList.toggle("newline", text.endsWith("\n"));
  span.textContent = text;
  span.title = `probability ${percent(prob)}`;
  span.id = `${answer.element.id}-${i}`;
  span.dataset.index = i;
  span.setAttribute("role", "option");
  span.setAttribute("aria-selected", String(selected?.turn === answer && selected.index === i));
  if (text) delete span.dataset.piece;
  else span.dataset.piece = visible(piece); // stands for no text of its own
}

// Screen readers are told an answer sentence by sentence: one token at a time can't be listened to.
function speak(answer, isWhole = false) {
  const rest = answer.text.slice(answer.n_spoken);
  const ends = [". ", "! ", "? ", "\n"].map((end) => rest.lastIndexOf(end));
  const n = isWhole ? rest.length : Math.max(...ends) + 1;
  if (n) answer.spoken.append(make("span", "", rest.slice(0, n)));
  answer.n_spoken += n;
}

// ---- turns ----

let n_made = 0;

function add(role, text = "") {
  const turn = { role, text, points: [], tokens: [], n_told: 0, n_spoken: 0 };
  turn.decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  turn.element = make("article", role);
  turn.element.id = `turn${++n_made}`;
  const isUser = role === "user";
  const name = isUser ? (mode === "chat" ? "You" : "Prompt") : model.id;
  turn.element.setAttribute("aria-label", name);
  const head = make("div", "head");
  head.append(make("h2", "", name));
  if (isUser && mode === "chat") head.append(button("Edit", () => edit(turn)));
  if (!isUser) {
    const copied = button("Copy", () => copy(turn, copied));
    const again = button("New answer", () => another(turn));
    again.classList.add("again");
    head.append(copied, again);
  }
  turn.spoken = make("p", isUser ? "said" : "unseen", text);
  turn.box = make("div", "tokens");
  turn.note = make("p", "note");
  turn.element.append(head, turn.spoken);
  if (!isUser) {
    turn.spoken.setAttribute("aria-live", "polite");
    turn.box.tabIndex = 0;
    turn.box.setAttribute("role", "listbox");
    turn.box.setAttribute("aria-label", `Tokens that ${name} wrote: arrow keys show what else was likely`);
    turn.box.addEventListener("click", (event) => {
      const span = event.target.closest("[data-index]");
      if (span) select(turn, Number(span.dataset.index));
    });
    turn.box.addEventListener("keydown", (event) => walk(event, turn));
    turn.element.append(turn.box, turn.note);
  }
  texts[mode].push(turn);
  $("texts").append(turn.element);
  $("texts").scrollTop = $("texts").scrollHeight;
  return turn;
}

// Take a turn away, and all that follows it.
function remove(turn) {
  const at = texts[mode].indexOf(turn);
  for (const gone of texts[mode].splice(at)) gone.element.remove();
  if (selected && !selected.turn.element.isConnected) select(null);
}

function another(answer) {
  remove(answer);
  $("input").focus(); // what was clicked is gone
  write();
}

function edit(turn) {
  const form = make("form", "edit");
  const area = make("textarea");
  area.value = turn.text;
  area.rows = 3;
  area.setAttribute("aria-label", "Your message");
  const close = () => {
    form.replaceWith(turn.spoken);
    turn.element.querySelector(".head button").focus();
  };
  const send = make("button", "primary", "Send, and go on from here");
  form.append(area, send, button("Leave it", close));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (running || !area.value.trim()) return;
    remove(turn);
    add("user", area.value);
    $("input").focus();
    write();
  });
  form.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !running) close();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  turn.spoken.replaceWith(form);
  form.scrollIntoView({ block: "nearest" });
  area.focus();
}

async function copy(turn, clicked) {
  const text = mode === "chat" ? turn.text : texts.completion[0].text + turn.text;
  const done = await navigator.clipboard?.writeText(text).then(() => true, () => false);
  clicked.textContent = done ? "Copied" : "The browser allows no copying"; // as where it isn't https
  setTimeout(() => (clicked.textContent = "Copy"), 1500);
}

// ---- tokens ----

const visible = (text) => text.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥");

function percent(share) {
  if (share >= 0.0995) return `${(100 * share).toFixed(0)} %`;
  return share >= 0.0001 ? `${Number((100 * share).toPrecision(2))} %` : "< 0.01 %";
}

function walk(event, turn) {
  const last = turn.tokens.length - 1;
  const now = selected?.turn === turn ? selected.index : -1;
  const places = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: last, Enter: now, " ": now };
  const next = places[event.key];
  if (next === undefined || last < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  select(turn, Math.min(Math.max(next, 0), last));
}

// Show what else was likely in a token's place; null: nothing.
function select(turn, index = 0) {
  const before = selected && selected.turn.box.children[selected.index];
  before?.setAttribute("aria-selected", "false");
  selected?.turn.box.removeAttribute("aria-activedescendant");
  if (!turn && $("alternatives").contains(document.activeElement)) selected.turn.box.focus();
  selected = turn && { turn, index };
  $("alternatives").hidden = !turn;
  if (!turn) return;
  const { piece, prob, top } = turn.tokens[index];
  const span = turn.box.children[index];
  span.setAttribute("aria-selected", "true");
  turn.box.setAttribute("aria-activedescendant", span.id);
  const place = top.findIndex(([other]) => other === piece);
  const rank = place < 0 ? `not among its ${top.length} likeliest` : `the model's choice number ${place + 1}`;
  const surprise = Math.max(0, -Math.log2(prob)).toFixed(1);
  const facts = make("p", "facts");
  const about = `Probability ${percent(prob)}, ${rank}. Surprise: ${surprise} bits.`;
  facts.append(make("code", "", visible(piece)), ` ${about}`);
  const close = button("Close", () => select(null));
  const table = make("table");
  const rows = place < 0 ? [...top, [piece, prob]] : top;
  for (const [other, share] of rows) {
    const row = table.insertRow();
    const name = row.appendChild(make("th"));
    name.scope = "row";
    name.append(make("code", "", visible(other)), other === piece ? " ← taken" : "");
    const track = make("span", "track");
    track.append(make("span", "bar"));
    track.firstChild.style.width = `${100 * share}%`;
    row.insertCell().append(track, percent(share));
  }
  const whose = make("p", "note", "by the model, before temperature and top-p");
  $("alternatives").replaceChildren(close, facts, whose, table);
  const others = top.filter(([other]) => other !== piece);
  const instead = others.map(([other, share]) => `${other} ${percent(share)}`).join(", ");
  $("said").textContent = `${piece}: ${about} Instead: ${instead}`;
  span.scrollIntoView({ block: "nearest" });
}

// ---- controls ----

function show(status) {
  const isRunning = Boolean(running);
  const hadFocus = document.activeElement === $("stop");
  if ($("status").textContent !== status) $("status").textContent = status; // which is read aloud
  $("stop").disabled = !isRunning;
  $("input").disabled = !model;
  for (const id of ["send", "clear", "modes"]) $(id).disabled = isRunning || !model;
  for (const one of document.querySelectorAll(".head button")) one.disabled = isRunning;
  if (hadFocus && !isRunning) $("input").focus(); // a disabled button would hold it
}

function enter(to) {
  drafts[mode] = $("input").value;
  mode = to;
  select(null);
  $("error").replaceChildren();
  $("input").value = drafts[mode];
  document.querySelector("label[for=input]").textContent = LABEL[mode];
  $("input").placeholder = HINT[mode];
  $("send").textContent = ACT[mode];
  document.body.dataset.mode = mode;
  $("texts").replaceChildren(...texts[mode].map((turn) => turn.element));
  show($("status").textContent);
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("input").value;
  if (running || !model || (mode === "chat" && !text.trim())) return;
  const last = texts[mode].at(-1);
  if (mode === "completion" && last) remove(texts[mode][0]);
  else if (last?.role === "user") remove(last); // which has got no answer
  if (mode === "chat") $("input").value = "";
  add("user", text);
  write();
});

$("input").addEventListener("keydown", (event) => {
  const sends = mode === "chat" ? !event.shiftKey : event.ctrlKey || event.metaKey;
  if (event.key !== "Enter" || !sends || event.isComposing) return;
  event.preventDefault();
  $("composer").requestSubmit();
});

document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (running) running.abort();
  else if (selected) select(null);
});

$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", () => {
  if (texts[mode].length) remove(texts[mode][0]);
  $("error").replaceChildren();
  show("");
  $("input").focus();
});
$("modes").addEventListener("change", (event) => enter(event.target.value));
$("settings").addEventListener("submit", (event) => event.preventDefault());
$("tint").addEventListener("change", () => document.body.classList.toggle("plain", !$("tint").checked));
$("key").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("tinyllama-key", $("key-value").value);
  $("key").hidden = true;
  retry();
});

load();
