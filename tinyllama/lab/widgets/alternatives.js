// What was expected at a token's place: a row for each token, a bar for each stage of sampling.

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
    const { piece, facts, columns, rows, can_resume } = model.get("report");
    box.replaceChildren();
    if (piece === undefined) return;
    const heading = make("p", "tinyllama-facts");
    heading.append(make("code", "tinyllama-piece", piece), ` ${facts}`);
    box.append(heading);
    if (!rows.length) return;
    const table = make("table", "tinyllama-bars");
    table.append(head(columns), ...rows.map((row) => line(row, can_resume)));
    const frame = make("div", "tinyllama-scroll");
    frame.append(table);
    box.append(frame);
  }

  function head(columns) {
    const row = document.createElement("tr");
    row.append(make("th", "", "token"), make("th", "", "instead"));
    for (const { name, note } of columns) {
      const cell = make("th", "", name);
      cell.append(make("small", "", note));
      row.append(cell);
    }
    return row;
  }

  function line({ id, piece, is_chosen, cells }, can_resume) {
    const row = make("tr", is_chosen ? "tinyllama-chosen" : "");
    const name = make("th", "");
    name.scope = "row";
    name.append(make("code", "tinyllama-piece", piece), is_chosen ? " ← taken" : "");
    const instead = document.createElement("td");
    if (!is_chosen) instead.append(button(id, piece, can_resume));
    row.append(name, instead, ...cells.map(bar));
    return row;
  }

  function bar(cell) {
    const box = document.createElement("td");
    if (cell === "removed") box.append(make("span", "tinyllama-removed", "removed"));
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

  function button(id, piece, enabled) {
    const button = make("button", "tinyllama-pick", "go on with this");
    button.type = "button";
    button.disabled = !enabled;
    button.setAttribute("aria-label", `continue from here with ${piece} instead`);
    button.addEventListener("click", () => model.send({ action: "pick", value: id }));
    return button;
  }

  model.on("change:report", draw);
  draw();
}

export default { render };
