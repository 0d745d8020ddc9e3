// A text, token by token. A click selects one, the arrow keys walk.

// Upper limits of the probabilities that are tinted, from the least likely on.
const TINTS = [0.02, 0.1, 0.3];

function render({ model, el }) {
  const box = document.createElement("div");
  box.className = "tinyllama-text";
  box.tabIndex = 0;
  box.setAttribute("role", "listbox");
  el.append(box);
  let shown = { run: null, texts: [] };
  let frame = null; // what scrolls: a chat, or this text
  const sizes = new ResizeObserver(keepInSight);

  function draw() {
    const text = model.get("text");
    const texts = text.texts ?? [];
    const goesOn = text.run === shown.run && shown.texts.every((old, i) => old === texts[i]);
    if (!goesOn) {
      box.replaceChildren();
      shown = { run: text.run, texts: [] };
    }
    const isAtEnd = frame && frame.scrollTop + frame.clientHeight > frame.scrollHeight - 40;
    for (let i = shown.texts.length; i < texts.length; i++) box.append(token(text, i));
    shown = { run: text.run, texts };
    decorate();
    if (goesOn && texts.length && isAtEnd) frame.scrollTop = frame.scrollHeight; // follow what is written
  }

  function token(text, i) {
    const span = document.createElement("span");
    span.id = `${model.model_id ?? "tokens"}-${i}`;
    span.textContent = text.texts[i];
    span.setAttribute("role", "option");
    span.dataset.index = i;
    span.classList.add(i < text.n_prompt ? "tinyllama-prompt" : "tinyllama-completion");
    if (!text.texts[i]) span.dataset.piece = text.pieces[i]; // stands for no text of its own
    if (text.texts[i].endsWith("\n")) span.classList.add("tinyllama-newline");
    if (i === text.changed) span.classList.add("tinyllama-changed");
    return span;
  }

  function decorate() {
    const { probs = [], drafted = [] } = model.get("text");
    const selected = model.get("selected");
    const tint = model.get("tint");
    const tintDrafted = model.get("tint_drafted");
    const { shares, levels } = model.get("attention");
    box.setAttribute("aria-label", model.get("label"));
    box.removeAttribute("aria-activedescendant");
    [...box.children].forEach((span, i) => {
      const level = probs[i] == null || shares ? -1 : TINTS.findIndex((limit) => probs[i] < limit);
      TINTS.forEach((_, n) => span.classList.toggle(`tinyllama-tint${n}`, tint && n === level));
      span.classList.toggle("tinyllama-drafted", Boolean(tintDrafted && drafted[i] && !shares));
      span.classList.toggle("tinyllama-attended", levels?.[i] > 0);
      span.style.setProperty("--tl-level", `${100 * (levels?.[i] ?? 0)}%`);
      const said = { probability: probs[i], attention: shares?.[i] };
      const known = Object.entries(said).filter(([, share]) => share != null);
      span.title = known.map(([name, share]) => `${name} ${(100 * share).toPrecision(2)} %`).join(", ");
      span.setAttribute("aria-selected", String(i === selected));
      if (i === selected) box.setAttribute("aria-activedescendant", span.id);
    });
  }

  // A text that gets smaller, since a table opens below it, still shows the token that the table is about.
  function keepInSight() {
    const chosen = box.children[model.get("selected")]?.getBoundingClientRect();
    if (!chosen || !frame) return;
    const { top, bottom } = frame.getBoundingClientRect();
    if (chosen.bottom > bottom) frame.scrollTop += chosen.bottom - bottom + 8;
    else if (chosen.top < top) frame.scrollTop -= top - chosen.top + 8;
  }

  const select = (index) => model.send({ action: "select", value: index });
  box.addEventListener("click", (event) => {
    const span = event.target.closest("[data-index]");
    if (span) select(Number(span.dataset.index));
  });
  box.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const next = model.get("selected") + step;
    if (!step || next < 0 || next >= box.children.length) return;
    event.preventDefault();
    select(next);
    box.children[next].scrollIntoView({ block: "nearest" });
  });
  model.on("change:text", draw);
  model.on("change:selected", decorate);
  model.on("change:tint change:tint_drafted change:attention", decorate);
  draw();
  const waiting = requestAnimationFrame(() => {
    const chat = box.closest(".tinyllama-out-turns");
    frame = chat ?? box;
    if (chat) chat.scrollTop = chat.scrollHeight; // a new answer
    sizes.observe(frame);
  });
  return () => {
    cancelAnimationFrame(waiting);
    sizes.disconnect();
  };
}

export default { render };
