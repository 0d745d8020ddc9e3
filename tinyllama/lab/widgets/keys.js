// What belongs to a tool as a whole: its keys, names for its controls, and buttons that copy.

function render({ model, el }) {
  const bar = document.createElement("div");
  bar.className = "tinyllama-copies";
  el.append(bar);

  function draw() {
    const copies = Object.entries(model.get("copies"));
    bar.replaceChildren(...copies.map(([label, text]) => button(label, text)));
  }

  function button(label, text) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = label;
    button.disabled = !text;
    button.addEventListener("click", async () => {
      button.textContent = (await copy(text)) ? "Copied" : "The browser allows no copying";
      setTimeout(() => (button.textContent = label), 1500);
    });
    return button;
  }

  function onKey(event) {
    const isGenerate = event.key === "Enter" && (event.ctrlKey || event.metaKey);
    if (!isGenerate && event.key !== "Escape") return;
    event.preventDefault();
    event.stopPropagation();
    const focused = document.activeElement;
    if (isGenerate && focused instanceof HTMLElement) {
      focused.blur(); // a number that is being typed counts from here on
      focused.focus();
    }
    model.send({ action: isGenerate ? "generate" : "stop" });
  }

  function attach() {
    const root = el.closest(".tinyllama");
    if (!root) return void (waiting = requestAnimationFrame(attach)); // not on the page yet
    root.dataset.lmSuppressShortcuts = "true"; // JupyterLab's shortcuts would delete cells
    root.setAttribute("role", "group");
    root.setAttribute("aria-label", model.get("label"));
    root.addEventListener("keydown", onKey, true); // first of all: ipywidgets' inputs let no key through
    names.observe(root, { childList: true, subtree: true });
    nameSliders(root);
    detach = () => root.removeEventListener("keydown", onKey, true);
  }

  // ipywidgets gives the handle of a slider, and its number, no name of their own.
  function nameSliders(root) {
    for (const slider of root.querySelectorAll(".widget-slider")) {
      const label = slider.querySelector(".widget-label")?.textContent;
      for (const part of slider.querySelectorAll(".noUi-handle, .widget-readout")) {
        if (label && part.getAttribute("aria-label") !== label) part.setAttribute("aria-label", label);
      }
    }
  }

  const names = new MutationObserver(() => nameSliders(el.closest(".tinyllama") ?? el));
  let detach = () => {};
  let waiting = requestAnimationFrame(attach);
  model.on("change:copies", draw);
  draw();
  return () => {
    cancelAnimationFrame(waiting);
    names.disconnect();
    detach();
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
