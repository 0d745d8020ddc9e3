// What belongs to a tool as a whole: its keys, names for its controls, and buttons that copy.

const GROUPS = [
  [".tinyllama-in-mode", "radiogroup", "What the model does"],
  [".tinyllama-in-view", "radiogroup", "What is shown"],
  [".tinyllama-out-turns", "region", "Chat"],
];

function render({ model, el }) {
  const bar = document.createElement("div");
  bar.className = "tinyllama-copies";
  const said = document.createElement("div");
  said.className = "tinyllama-said";
  said.setAttribute("role", "status"); // which screen readers read out when it changes
  el.append(bar, said);

  function draw() {
    const copies = Object.entries(model.get("copies"));
    const save = model.get("save");
    bar.replaceChildren(...copies.map(([label, text]) => copying(label, text)));
    if (save) bar.append(button(save, () => model.send({ action: "save" })));
  }

  function button(label, act) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = label;
    button.addEventListener("click", () => act(button));
    return button;
  }

  function copying(label, text) {
    const made = button(label, async () => {
      made.textContent = (await copy(text)) ? "Copied" : "The browser allows no copying";
      setTimeout(() => (made.textContent = label), 1500);
    });
    made.disabled = !text;
    return made;
  }

  function download({ name, content }) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([content], { type: "application/json" }));
    link.download = name;
    link.click();
    URL.revokeObjectURL(link.href);
  }

  function onKey(event) {
    const isInside = el.closest(".tinyllama")?.contains(event.target);
    const isEnter = isInside && event.key === "Enter" && !event.isComposing;
    const isPlain = model.get("enter") && !event.shiftKey && event.target.closest(".tinyllama-in-prompt");
    const isGenerate = isEnter && (event.ctrlKey || event.metaKey || isPlain);
    const isStop = event.key === "Escape" && (isInside || model.get("busy"));
    if (!isGenerate && !isStop) return;
    if (!isInside) return void model.send({ action: "stop" }); // whoever has the focus gets the key, too
    event.preventDefault();
    event.stopPropagation();
    const focused = document.activeElement;
    if (isGenerate && focused instanceof HTMLElement) {
      focused.blur(); // a number that is being typed counts from here on
      focused.focus();
    }
    const typed = focused?.closest?.(".tinyllama-in-prompt") ? focused.value : null; // still on its way, maybe
    model.send(isGenerate ? { action: "generate", value: typed } : { action: "stop" });
  }

  function attach() {
    const root = el.closest(".tinyllama");
    if (!root) return void (waiting = requestAnimationFrame(attach)); // not on the page yet
    root.dataset.lmSuppressShortcuts = "true"; // JupyterLab's shortcuts would delete cells
    root.setAttribute("role", "group");
    root.setAttribute("aria-label", model.get("label"));
    names.observe(root, { childList: true, subtree: true, attributeFilter: ["class"] });
    name(root);
  }

  // What ipywidgets doesn't say: names of a slider's handle and number, groups, whether a button has opened.
  function name(root) {
    for (const [what, role, label] of GROUPS) {
      const group = root.querySelector(what);
      group?.setAttribute("role", role);
      group?.setAttribute("aria-label", label);
    }
    for (const button of root.querySelectorAll(".widget-toggle-button")) {
      button.setAttribute("aria-expanded", button.classList.contains("mod-active"));
    }
    for (const slider of root.querySelectorAll(".widget-slider")) {
      const label = slider.querySelector(".widget-label")?.textContent;
      for (const part of slider.querySelectorAll(".noUi-handle, .widget-readout")) {
        if (label && part.getAttribute("aria-label") !== label) part.setAttribute("aria-label", label);
      }
    }
  }

  const names = new MutationObserver(() => name(el.closest(".tinyllama") ?? el));
  const say = () => (said.textContent = model.get("says"));
  let waiting = requestAnimationFrame(attach);
  document.addEventListener("keydown", onKey, true); // first of all: ipywidgets' inputs let no key through
  model.on("change:copies change:save", draw);
  model.on("change:says", say);
  model.on("msg:custom", download);
  draw();
  say();
  return () => {
    cancelAnimationFrame(waiting);
    names.disconnect();
    document.removeEventListener("keydown", onKey, true);
  };
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Pages that aren't served over https or from this computer have no clipboard, but a selection.
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    return copied;
  }
}

export default { render };
