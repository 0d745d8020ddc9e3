// Numbers as colours: above zero one hue, below it another, no number grey.

function render({ model, el }) {
  const { figure, draw, close } = board(el, { layout, paint, say, choose, start });
  const isPairs = () => Array.isArray(model.get("frame").columns); // every column has a name

  function layout(pen, width, height) {
    const { n_rows, n_columns, rows, columns } = model.get("frame");
    const left = Math.ceil(12 + Math.min(widest(pen, rows), width / 3));
    const room = (width - left - 3) / n_columns;
    if (!isPairs()) {
      const row = Math.min(2.2 * pen.size, (height - 4) / n_rows);
      return { left, top: 4, n_rows, n_columns, cell: [room, Math.max(3, row)] };
    }
    const column = Math.min(room, width / 6);
    const label = widest(pen, columns);
    const top = Math.ceil(label > column - 4 ? 10 + Math.min(label, height / 3) : 1.6 * pen.size);
    const row = Math.min(column, 3 * pen.size, Math.max(3, (height - top) / n_rows));
    return { left, top, n_rows, n_columns, cell: [column, row] };
  }

  function paint(pen, place) {
    const { n_rows, n_columns, limit, root, rows, columns, row, column } = model.get("frame");
    const values = numbers();
    const power = root ? 0.5 : 1;
    const colors = Array.from(values, (value) => colorOf(pen.colors, value, limit, power));
    const { left, top, cell } = place;
    pen.imageSmoothingEnabled = false;
    const image = picture(n_columns, n_rows, (i) => colors[i]);
    pen.drawImage(image, left, top, n_columns * cell[0], n_rows * cell[1]);
    labelled(pen, place, rows, isPairs() ? columns : [], { row, column });
    if (isPairs()) written(pen, place, values, colors);
    if (row >= 0) frame(pen, place, { row, column: 0, n_columns }, "text", 1.5);
    if (column >= 0) frame(pen, place, { row, column }, "accent", 3);
  }

  function colorOf(colors, value, limit, power) {
    if (Number.isNaN(value)) return colors["map-none"];
    const share = Math.min(1, Math.abs(value) / limit) ** power;
    return mix(colors["map-zero"], colors[value < 0 ? "map-below" : "map-above"], share);
  }

  // The numbers themselves, where there is room for them; a cell that is nearly 0 stays empty.
  function written(pen, { left, top, cell, n_columns }, values, colors) {
    const texts = Array.from(values, (value) => (Math.abs(value) >= 0.005 ? value.toFixed(2).replace(/^0/, "") : ""));
    if (cell[1] < 1.3 * pen.size || widest(pen, texts) > cell[0] - 4) return;
    const [dark, light] = [pen.colors.text, pen.colors.ground].sort((a, b) => brightness(a) - brightness(b));
    pen.textAlign = "center";
    texts.forEach((text, i) => {
      const [x, y] = [i % n_columns, Math.floor(i / n_columns)];
      pen.fillStyle = css(brightness(colors[i]) > 0.45 ? dark : light);
      pen.fillText(text, left + (x + 0.5) * cell[0], top + (y + 0.5) * cell[1]);
    });
  }

  const brightness = ([red, green, blue]) => (0.3 * red + 0.6 * green + 0.1 * blue) / 255;

  // What the caption says: of a cell, or of the whole.
  function say(cell) {
    const { rows, columns, per_cell, title, n_columns, between = ",", numbered } = model.get("frame");
    if (!cell) return title;
    const named = (labels, at) => (numbered ? `${labels[at]} (${at})` : labels[at]);
    const value = numbers()[cell.row * n_columns + cell.column];
    const at = isPairs()
      ? `${named(rows, cell.row)}${between} ${named(columns, cell.column)}`
      : `${named(rows, cell.row)}, ${columns} ${range(cell.column, per_cell)}`;
    return `${at}: ${Number.isNaN(value) ? "none" : value.toPrecision(4)}`;
  }

  const range = (column, per_cell) =>
    per_cell > 1 ? `${column * per_cell} to ${(column + 1) * per_cell - 1}` : `${column}`;

  function start() {
    const { row, column } = model.get("frame");
    return { row: Math.max(0, row), column: Math.max(0, column) };
  }

  function choose({ row, column }) {
    model.send({ action: "cell", value: [row, column] });
  }

  function numbers() {
    const view = model.get("values");
    return new Float32Array(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
  }

  const show = () => {
    figure.hidden = !model.get("frame").n_rows;
    if (!figure.hidden) draw();
  };
  model.on("change:frame", show);
  show();
  return close;
}

export default { render };
