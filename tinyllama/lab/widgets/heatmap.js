// Numbers as colours: above zero one hue, below it another, no number grey.

const CELL = 16; // pixels of a row, and of a column where there is room
const WIDEST = 760;
const TALLEST = 480;

function render({ model, el }) {
  const figure = document.createElement("figure");
  figure.className = "tinyllama-map";
  const canvas = document.createElement("canvas");
  canvas.setAttribute("role", "img");
  const caption = document.createElement("figcaption");
  figure.append(canvas, caption);
  el.append(figure);
  let place = null; // of the numbers on the canvas

  function draw() {
    const frame = model.get("frame");
    const { n_rows, n_columns, rows, columns, title, row } = frame;
    figure.hidden = !n_rows;
    if (!n_rows) return;
    const labelled = Array.isArray(columns);
    const left = 8 + 7 * Math.min(12, Math.max(...rows.map((label) => label.length)));
    const top = labelled ? 8 + 6 * Math.min(12, Math.max(...columns.map((label) => label.length))) : 4;
    const width = labelled ? Math.min(n_columns * CELL, WIDEST - left) : WIDEST - left;
    const height = Math.min(n_rows * CELL, TALLEST);
    place = { left, top, width, height };
    const scale = window.devicePixelRatio || 1;
    canvas.width = (left + width + 2) * scale;
    canvas.height = (top + height + 2) * scale;
    canvas.style.aspectRatio = `${canvas.width} / ${canvas.height}`;
    canvas.style.width = `${canvas.width / scale}px`;
    canvas.setAttribute("aria-label", title);
    const paint = canvas.getContext("2d");
    paint.scale(scale, scale);
    cells(paint, frame);
    labels(paint, frame, labelled);
    outline(paint, row, n_rows);
    say(null);
  }

  function cells(paint, { n_rows, n_columns, limit }) {
    const style = getComputedStyle(figure);
    const color = (name) => rgb(style.getPropertyValue(`--tl-${name}`));
    const [zero, above, below, none] = ["map-zero", "map-above", "map-below", "map-none"].map(color);
    const values = numbers();
    const image = new ImageData(n_columns, n_rows);
    values.forEach((value, i) => {
      const share = Math.min(1, Math.abs(value) / limit);
      const end = value < 0 ? below : above;
      const mixed = Number.isNaN(value) ? none : zero.map((from, c) => from + (end[c] - from) * share);
      image.data.set([...mixed, 255], 4 * i);
    });
    const small = new OffscreenCanvas(n_columns, n_rows);
    small.getContext("2d").putImageData(image, 0, 0);
    paint.imageSmoothingEnabled = false;
    paint.drawImage(small, place.left, place.top, place.width, place.height);
  }

  function labels(paint, { rows, columns, n_rows, n_columns }, labelled) {
    const style = getComputedStyle(figure);
    paint.fillStyle = style.getPropertyValue("--tl-text");
    paint.font = `11px ${style.fontFamily}`;
    paint.textBaseline = "middle";
    paint.textAlign = "right";
    const height = place.height / n_rows;
    const everyRow = Math.ceil(11 / height);
    rows.forEach((label, i) => {
      if (i % everyRow === 0) paint.fillText(short(label), place.left - 4, place.top + (i + 0.5) * height);
    });
    if (!labelled) return;
    const width = place.width / n_columns;
    const everyColumn = Math.ceil(11 / width);
    paint.textAlign = "left";
    columns.forEach((label, i) => {
      if (i % everyColumn) return;
      paint.save();
      paint.translate(place.left + (i + 0.5) * width, place.top - 4);
      paint.rotate(-Math.PI / 2);
      paint.fillText(short(label), 0, 0);
      paint.restore();
    });
  }

  function outline(paint, row, n_rows) {
    const height = place.height / n_rows;
    paint.strokeStyle = getComputedStyle(figure).getPropertyValue("--tl-text");
    paint.lineWidth = 1.5;
    paint.strokeRect(place.left - 0.5, place.top + row * height, place.width + 1, height);
  }

  // What the caption says: of the cell under the pointer, or of the whole.
  function say(cell) {
    const { rows, columns, per_cell, title } = model.get("frame");
    if (!cell) return void (caption.textContent = title);
    const value = numbers()[cell.row * model.get("frame").n_columns + cell.column];
    const at = Array.isArray(columns)
      ? `${rows[cell.row]} looks at ${columns[cell.column]}`
      : `${rows[cell.row]}, ${columns} ${range(cell.column, per_cell)}`;
    caption.textContent = `${at}: ${Number.isNaN(value) ? "none" : value.toPrecision(4)}`;
  }

  const range = (column, per_cell) =>
    per_cell > 1 ? `${column * per_cell} to ${(column + 1) * per_cell - 1}` : `${column}`;

  function cellAt(event) {
    const box = canvas.getBoundingClientRect();
    const scale = canvas.width / (window.devicePixelRatio || 1) / box.width;
    const x = ((event.clientX - box.left) * scale - place.left) / place.width;
    const y = ((event.clientY - box.top) * scale - place.top) / place.height;
    const { n_rows, n_columns } = model.get("frame");
    const inside = x >= 0 && x < 1 && y >= 0 && y < 1;
    return inside ? { row: Math.floor(y * n_rows), column: Math.floor(x * n_columns) } : null;
  }

  function numbers() {
    const view = model.get("values");
    return new Float32Array(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
  }

  canvas.addEventListener("pointermove", (event) => say(cellAt(event)));
  canvas.addEventListener("pointerleave", () => say(null));
  canvas.addEventListener("click", (event) => {
    const cell = cellAt(event);
    if (cell) model.send({ action: "select", value: cell.row });
  });
  const theme = new MutationObserver(draw);
  theme.observe(document.body, { attributes: true });
  model.on("change:frame", draw);
  const waiting = requestAnimationFrame(draw); // colours are known once it is on the page
  return () => {
    cancelAnimationFrame(waiting);
    theme.disconnect();
  };
}

const short = (label) => (label.length > 12 ? `${label.slice(0, 11)}…` : label);

function rgb(color) {
  const digits = color.trim().slice(1);
  return [0, 2, 4].map((i) => parseInt(digits.slice(i, i + 2), 16));
}

export default { render };
