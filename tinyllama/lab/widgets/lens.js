// What the model would say after every layer and token: a table, the likelier the stronger its colour.

function render({ model, el }) {
  const box = document.createElement("div");
  box.className = "tinyllama-scroll tinyllama-grid";
  const note = document.createElement("p");
  note.className = "tinyllama-facts";
  el.append(note, box);

  function make(tag, text, scope) {
    const cell = document.createElement(tag);
    cell.textContent = text;
    if (scope) cell.scope = scope;
    return cell;
  }

  function draw() {
    const { columns, rows, at } = model.get("table");
    const hadFocus = box.contains(document.activeElement);
    box.replaceChildren();
    note.hidden = !rows?.length;
    if (note.hidden) return;
    note.textContent = model.get("label");
    const table = document.createElement("table");
    table.setAttribute("role", "grid");
    table.setAttribute("aria-label", model.get("label"));
    const head = document.createElement("tr");
    head.append(make("th", ""), ...columns.map((piece) => make("th", piece, "col")));
    table.append(head, ...rows.map((row) => line(row, at)));
    box.append(table);
    const chosen = table.querySelector("[aria-selected=true]") ?? table.querySelector("td");
    chosen.tabIndex = 0;
    reveal(chosen);
    if (hadFocus) chosen.focus();
  }

  // Scroll the table, and not the page, so that a cell is beside the heads, which stay in their place.
  function reveal(cell) {
    const table = box.firstChild;
    const [headWidth, headHeight] = [table.rows[0].cells[0].offsetWidth, table.rows[0].offsetHeight];
    if (cell.offsetLeft + cell.offsetWidth > box.clientWidth) box.scrollLeft = cell.offsetLeft - headWidth - 4;
    if (cell.offsetTop + cell.offsetHeight > box.clientHeight) box.scrollTop = cell.offsetTop - headHeight - 4;
  }

  function line({ layer, pieces, probs, settled }, at) {
    const row = document.createElement("tr");
    row.append(make("th", `layer ${layer}`, "row"));
    pieces.forEach((piece, position) => {
      const cell = make("td", piece);
      cell.tabIndex = -1;
      cell.dataset.place = `${layer} ${position}`;
      cell.style.setProperty("--share", probs[position]);
      cell.title = `${piece} ${(100 * probs[position]).toPrecision(2)} %`;
      cell.setAttribute("aria-label", cell.title);
      cell.setAttribute("aria-selected", String(layer === at[0] && position === at[1]));
      cell.classList.toggle("tinyllama-settled", settled[position]);
      row.append(cell);
    });
    return row;
  }

  function go(cell) {
    model.send({ action: "go", value: cell.dataset.place.split(" ").map(Number) });
  }

  box.addEventListener("click", (event) => {
    const cell = event.target.closest("td");
    if (cell) go(cell);
  });
  box.addEventListener("keydown", (event) => {
    const cell = event.target.closest("td");
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!cell || !(step || event.key === "Enter" || event.key === " ")) return;
    event.preventDefault();
    if (!step) return void go(cell);
    const next = cell.closest("table").rows[cell.parentNode.rowIndex + step[0]]?.cells[cell.cellIndex + step[1]];
    if (next?.matches("td")) next.focus();
  });
  model.on("change:table", draw);
  draw();
}

export default { render };
