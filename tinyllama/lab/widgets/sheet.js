// The attention of all layers and heads as small maps. A click on one goes there.

const GAP = 2; // pixels between two maps
const MUCH = 1.5; // larger must maps be for layers to be columns
const SMALLEST = 16; // pixels of a map, also where they don't all fit on a screen

function render({ model, el }) {
  const { figure, draw, close } = board(el, { layout, paint, say, choose, start });
  let isTurned = false; // layers are columns

  function layout(pen, width, height) {
    const { n_layers, n_heads } = model.get("frame");
    const left = Math.ceil(12 + pen.measureText("layer 00").width);
    const top = Math.ceil(1.8 * pen.size);
    const across = (n_columns) => (width - left - 3) / n_columns;
    const sizeOf = (n_columns, n_rows) => Math.min(across(n_columns), (height - top) / n_rows);
    isTurned = sizeOf(n_layers, n_heads) > MUCH * sizeOf(n_heads, n_layers);
    const [n_columns, n_rows] = isTurned ? [n_layers, n_heads] : [n_heads, n_layers];
    const size = Math.min(across(n_columns), Math.max(SMALLEST, sizeOf(n_columns, n_rows)));
    return { left, top, n_rows, n_columns, cell: [size, size] };
  }

  // A map's layer and head, and the cell of a map.
  const headAt = ({ row, column }) => (isTurned ? { layer: column, head: row } : { layer: row, head: column });
  const cellOf = ([layer, head]) => (isTurned ? { row: head, column: layer } : { row: layer, column: head });

  function paint(pen, place) {
    const { n_layers, n_heads, side, at, marked } = model.get("frame");
    const bytes = new Uint8Array(model.get("values").buffer, model.get("values").byteOffset);
    const { left, top, cell } = place;
    const shades = Array.from({ length: 256 }, (_, i) => mix(pen.colors["map-zero"], pen.colors["map-above"], i / 255));
    const width = n_heads * side; // of all maps as one picture, a row a layer
    const image = picture(width, n_layers * side, (i) => {
      const [x, y] = [i % width, Math.floor(i / width)];
      const map = Math.floor(y / side) * n_heads + Math.floor(x / side);
      if (x % side > y % side) return pen.colors["map-none"]; // the future
      return shades[bytes[(map * side + (y % side)) * side + (x % side)]];
    });
    pen.imageSmoothingEnabled = cell[0] < side; // lest single tokens be lost
    for (let i = 0; i < n_layers * n_heads; i++) {
      const [layer, head] = [Math.floor(i / n_heads), i % n_heads];
      const { row, column } = cellOf([layer, head]);
      const to = [left + column * cell[0], top + row * cell[1], cell[0] - GAP, cell[1] - GAP];
      pen.drawImage(image, head * side, layer * side, side, side, ...to);
    }
    const [rows, columns] = isTurned ? ["head", "layer"] : ["layer", "head"];
    const numbers = (n, name) => Array.from({ length: n }, (_, i) => (i ? `${i}` : `${name} 0`));
    const labels = numbers(place.n_columns, "").map((label) => label.trim());
    labelled(pen, place, numbers(place.n_rows, rows), labels, cellOf(at));
    pen.textAlign = "right";
    pen.fillText(columns, left - 6, top - 0.7 * pen.size);
    for (const head of marked) frame(pen, place, inside(cellOf(head)), "accent", 3);
    frame(pen, place, inside(cellOf(at)), "text", 2);
  }

  const inside = (cell) => ({ ...cell, n_rows: 0.97, n_columns: 0.97 });

  function say(cell) {
    const { title } = model.get("frame");
    if (!cell) return title;
    const { layer, head } = headAt(cell);
    return `layer ${layer}, head ${head}`;
  }

  function start() {
    return cellOf(model.get("frame").at);
  }

  function choose(cell) {
    const { layer, head } = headAt(cell);
    el.closest(".tinyllama").dataset.focus = "map"; // of the head, in this one's place
    model.send({ action: "head", value: [layer, head] });
  }

  const show = () => {
    figure.hidden = !model.get("frame").side;
    if (!figure.hidden) draw();
  };
  model.on("change:frame", show);
  show();
  return close;
}

export default { render };
