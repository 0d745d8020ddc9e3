// A button that gives the tool the whole screen; the browser's Escape gives it back.

function render({ model, el }) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "lm-Widget jupyter-widgets jupyter-button widget-button";
  button.disabled = !document.fullscreenEnabled;
  el.append(button);
  const tool = () => el.closest(".tinyllama");

  function name() {
    const isFull = document.fullscreenElement !== null && document.fullscreenElement === tool();
    button.textContent = isFull ? "Leave full screen" : "Full screen";
    button.title = button.disabled ? "The browser doesn't allow it here" : "For a projector; Escape leaves it";
  }

  button.addEventListener("click", () => {
    if (document.fullscreenElement) document.exitFullscreen();
    else tool().requestFullscreen();
  });
  document.addEventListener("fullscreenchange", name);
  name();
  return () => document.removeEventListener("fullscreenchange", name);
}

export default { render };
