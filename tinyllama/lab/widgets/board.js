// What the maps share: a canvas as wide as its place, colours of the theme, a cell under the pointer or the arrow
// keys. `elements.py` puts this in front of a map's own module.

const [LOWEST, TALLEST] = [0.3, 0.7]; // of the window's height

// The map says how it lies with layout(pen, width, height) -> { left, top, n_rows, n_columns, cell: [width, height] },
// paints with paint(pen, place), describes with say(cell or null), and is told of a choice with choose(cell). The
// arrow keys begin at start().
function board(el, { layout, paint, say, choose, start }) {
  const figure = document.createElement("figure");
  figure.className = "tinyllama-map";
  const canvas = document.createElement("canvas");
  canvas.tabIndex = 0;
  const caption = document.createElement("figcaption");
  figure.append(canvas, caption);
  el.append(figure);
  let place = null;
  let cursor = null; // where the arrow keys have led

  function draw() {
    const width = figure.clientWidth;
    if (!width) return; // not on the page, or not shown
    const style = getComputedStyle(figure);
    const pen = canvas.getContext("2d");
    const size = Math.min(22, Math.max(12, width / 56)); // labels grow with the map
    const font = `${size}px ${style.fontFamily}`;
    pen.font = font;
    place = { size, ...layout(Object.assign(pen, { size }), width, room(size)) };
    const { left, top, n_rows, n_columns, cell } = place;
    const scale = window.devicePixelRatio || 1;
    const [w, h] = [left + n_columns * cell[0] + 2, top + n_rows * cell[1] + 2];
    canvas.width = Math.round(w * scale);
    canvas.height = Math.round(h * scale);
    canvas.style.width = `${w}px`;
    canvas.style.height = `${h}px`;
    pen.scale(scale, scale);
    Object.assign(pen, { font, textBaseline: "middle" });
    pen.colors = Object.fromEntries(COLORS.map((name) => [name, rgb(style.getPropertyValue(`--tl-${name}`))]));
    canvas.setAttribute("role", "application"); // arrow keys are its own
    canvas.setAttribute("aria-label", say(null));
    paint(pen, place);
    if (cursor) frame(pen, place, cursor, "accent", 3);
    describe(cursor);
  }

  // The window's height without what stands above the map in its tool, and its caption; if that is too little, one
  // scrolls down to the map.
  function room(size) {
    const above = figure.getBoundingClientRect().top - el.closest(".tinyllama").getBoundingClientRect().top;
    const left = window.innerHeight - above - 4 * size;
    return left > LOWEST * window.innerHeight ? left : TALLEST * window.innerHeight;
  }

  const describe = (cell) => (caption.textContent = say(cell));

  function cellAt(event) {
    if (!place) return null;
    const { left, top, n_rows, n_columns, cell } = place;
    const row = Math.floor((event.offsetY - top) / cell[1]);
    const column = Math.floor((event.offsetX - left) / cell[0]);
    return row >= 0 && row < n_rows && column >= 0 && column < n_columns ? { row, column } : null;
  }

  function onKey(event) {
    if (!place) return;
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    const isChoice = event.key === "Enter" || event.key === " ";
    if (!step && !(isChoice && cursor)) return;
    event.preventDefault();
    if (isChoice) return void choose(cursor);
    const from = cursor ?? start();
    cursor = {
      row: Math.min(place.n_rows - 1, Math.max(0, from.row + step[0])),
      column: Math.min(place.n_columns - 1, Math.max(0, from.column + step[1])),
    };
    draw();
  }

  canvas.addEventListener("pointermove", (event) => describe(cellAt(event)));
  canvas.addEventListener("pointerleave", () => describe(cursor));
  canvas.addEventListener("click", (event) => {
    const cell = cellAt(event);
    if (cell) choose(cell);
  });
  canvas.addEventListener("keydown", onKey);
  canvas.addEventListener("focus", () => caption.setAttribute("aria-live", "polite"));
  canvas.addEventListener("blur", () => {
    caption.removeAttribute("aria-live");
    cursor = null;
    draw();
  });
  const theme = new MutationObserver(draw);
  theme.observe(document.body, { attributes: true });
  let drawn = 0; // the width that was drawn last: drawing changes the height
  const sizes = new ResizeObserver(() => {
    if (figure.clientWidth !== drawn) draw();
    const tool = el.closest(".tinyllama");
    if (!drawn && figure.clientWidth && tool.dataset.focus) {
      delete tool.dataset.focus;
      canvas.focus({ preventScroll: true });
    }
    drawn = figure.clientWidth;
  });
  sizes.observe(figure);
  window.addEventListener("resize", draw);
  const close = () => {
    theme.disconnect();
    sizes.disconnect();
    window.removeEventListener("resize", draw);
  };
  return { figure, draw, close };
}

const COLORS = ["text", "ground", "accent", "map-zero", "map-above", "map-below", "map-none"];

function rgb(color) {
  const digits = color.trim().slice(1);
  return [0, 2, 4].map((i) => parseInt(digits.slice(i, i + 2), 16));
}

const css = (color) => `rgb(${color.join(" ")})`;

const mix = (from, to, share) => from.map((channel, i) => Math.round(channel + (to[i] - channel) * share));

const widest = (pen, labels) => Math.max(0, ...labels.map((label) => pen.measureText(label).width));

// A label that is longer than there is room for ends in "…".
function fit(pen, label, room) {
  if (pen.measureText(label).width <= room) return label;
  let n = label.length;
  while (n > 1 && pen.measureText(`${label.slice(0, n)}…`).width > room) n -= 1;
  return `${label.slice(0, n)}…`;
}

// Labels of rows, and of columns where there are any: upright where they are too wide for their column. Where there
// isn't the room for all, the chosen ones are written rather than those beside them.
function labelled(pen, place, rows, columns, chosen = {}) {
  const { left, top, cell, size } = place;
  pen.fillStyle = css(pen.colors.text);
  pen.textAlign = "right";
  const everyRow = Math.ceil(size / cell[1]);
  rows.forEach((label, i) => {
    if (isWritten(i, everyRow, chosen.row)) pen.fillText(fit(pen, label, left - 8), left - 6, top + (i + 0.5) * cell[1]);
  });
  const isUpright = widest(pen, columns) > cell[0] - 4;
  const everyColumn = isUpright ? Math.ceil(size / cell[0]) : 1;
  columns.forEach((label, i) => {
    if (!isWritten(i, everyColumn, chosen.column)) return;
    pen.save();
    pen.translate(left + (i + 0.5) * cell[0], top - (isUpright ? 5 : size * 0.7));
    if (isUpright) pen.rotate(-Math.PI / 2);
    pen.textAlign = isUpright ? "left" : "center";
    pen.fillText(isUpright ? fit(pen, label, top - 8) : label, 0, 0);
    pen.restore();
  });
}

function isWritten(i, every, chosen = -1) {
  return i === chosen || (i % every === 0 && (chosen < 0 || Math.abs(i - chosen) >= every));
}

function frame(pen, { left, top, cell }, { row, column, n_columns = 1, n_rows = 1 }, color, width) {
  pen.strokeStyle = css(pen.colors[color]);
  pen.lineWidth = width;
  pen.strokeRect(left + column * cell[0], top + row * cell[1], n_columns * cell[0], n_rows * cell[1]);
}

// Pixels as a picture of its own, a small one.
function picture(width, height, colorOf) {
  const image = new ImageData(width, height);
  for (let i = 0; i < width * height; i++) {
    const color = colorOf(i);
    for (let channel = 0; channel < 3; channel++) image.data[4 * i + channel] = color[channel];
    image.data[4 * i + 3] = 255;
  }
  const canvas = new OffscreenCanvas(width, height);
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}
