// Things with bars, each with a button: what was expected at a token's place, a bar for each stage of sampling.

// What they are called, unless a report says it otherwise.
const WORDS = {
  row: "token",
  pick: "instead",
  button: "go on with this",
  does: ["continue from here with", "instead"], // before and after a row's name
};

function make(tag, className, text = "") {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
}

function render({ model, el }) {
  const box = make("div", "tinyllama-alternatives");
  el.append(box);

  function draw() {
    const { piece, facts, columns, rows, can_resume, words } = model.get("report");
    box.replaceChildren();
    if (piece === undefined) return;
    const heading = make("p", "tinyllama-facts");
    heading.append(make("code", "tinyllama-piece", piece), ` ${facts}`);
    box.append(heading);
    if (!rows.length) return;
    const table = make("table", "tinyllama-bars");
    const said = { ...WORDS, ...words };
    table.append(head(columns, said), ...rows.map((row) => line(row, can_resume, said)));
    const frame = make("div", "tinyllama-scroll");
    frame.append(table);
    box.append(frame);
  }

  function head(columns, said) {
    const row = document.createElement("tr");
    row.append(make("th", "", said.row), make("th", "", said.pick));
    for (const { name, note } of columns) {
      const cell = make("th", "", name);
      cell.append(make("small", "", note));
      row.append(cell);
    }
    return row;
  }

  function line({ id, piece, is_chosen, cells }, can_resume, said) {
    const row = make("tr", is_chosen ? "tinyllama-chosen" : "");
    const name = make("th", "");
    name.scope = "row";
    name.append(make("code", "tinyllama-piece", piece), is_chosen ? " ← taken" : "");
    const instead = document.createElement("td");
    if (!is_chosen) instead.append(button(id, piece, can_resume, said));
    row.append(name, instead, ...cells.map(bar));
    return row;
  }

  function bar(cell) {
    const box = document.createElement("td");
    if (cell === "removed") box.append(make("span", "tinyllama-removed", "removed"));
    else if (typeof cell === "string") box.append(cell);
    else if (cell === null) box.append(make("span", "tinyllama-unlisted", "–"));
    else {
      const track = make("span", "tinyllama-track");
      const filled = make("span", "tinyllama-bar");
      filled.style.width = `${100 * cell.share}%`;
      track.append(filled);
      box.append(track, make("span", "tinyllama-share", cell.text));
    }
    return box;
  }

  function button(id, piece, enabled, said) {
    const button = make("button", "tinyllama-pick", said.button);
    button.type = "button";
    button.disabled = !enabled;
    const [before, after] = said.does;
    button.setAttribute("aria-label", `${before} ${piece} ${after}`.trim());
    button.addEventListener("click", () => model.send({ action: "pick", value: id }));
    return button;
  }

  model.on("change:report", draw);
  draw();
}

export default { render };
