"""Execute the notebooks and keep each in step with its source.

A notebook is a pair: `src/NN_topic.py` (jupytext, py:percent) is what authors edit and compare,
`NN_topic.ipynb` what readers open, with its outputs. Edit either; where their cells differ, the file changed
last is right.

    python notebooks/sync.py            executes all, two at a time
    python notebooks/sync.py 05 08      executes these

Executing twice gives the same bytes: what a run leaves in the file beside its results is removed, and an
output that agrees with the one already there stays as it is. Cells tagged `machine` show what a computer does
in what time; their outputs stay until the cell changes or the .ipynb is deleted.
"""

import ast
import base64
import io
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jupytext
import nbformat
import numpy as np
from matplotlib.image import imread
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).resolve().parent
SOURCES = FOLDER / "src"

#: Outputs are those of NumPy, the definition, on the small model.
ENVIRONMENT = {
    "TINYLLAMA_BACKEND": "numpy",
    "TINYLLAMA_MODEL": "small",
    "TQDM_DISABLE": "1",
    "PYTHONPATH": str(FOLDER.parent),  # the package beside the notebooks, wherever another is installed
}
WIDGET = "application/vnd.jupyter.widget-view+json"
METADATA = {"kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}}
FORMAT = "py:percent"

#: Two pictures agree if at most this share of their pixels differs by more than this (1: black from white).
DIFFERENT_PIXELS, DIFFERENCE = 0.001, 0.03

SOLUTION = re.compile(r"<details>\s*<summary>Solution.*?```python\n(.*?)```", re.DOTALL)


def topics() -> list[str]:
    """The names of all notebooks, "00_map" and so on."""
    return sorted({path.stem for path in [*FOLDER.glob("[0-9]*.ipynb"), *SOURCES.glob("[0-9]*.py")]})


def sync(topic: str) -> str:
    """Execute a notebook and write both of its files. Returns what has changed."""
    source, target = SOURCES / f"{topic}.py", FOLDER / f"{topic}.ipynb"
    notebook = normalized(_leader(source, target))
    executed = normalized(execute(notebook, ENVIRONMENT))
    if target.exists():
        keep_what_agrees(nbformat.read(target, 4), executed)
    changed = _write(target, nbformat.writes(executed) + "\n")
    if not source.exists() or cells(read_source(source)) != cells(executed):
        changed = _write(source, source_text(executed))
    return f"{topic}: {'changed' if changed else 'as it was'}"


def _leader(source: Path, target: Path) -> NotebookNode:
    """The cells of the file that is right."""
    if not target.exists():
        return read_source(source)
    if not source.exists():
        return nbformat.read(target, 4)
    pair = read_source(source), nbformat.read(target, 4)
    newer = target.stat().st_mtime > source.stat().st_mtime
    return pair[newer and cells(pair[0]) != cells(pair[1])]


def read_source(path: Path) -> NotebookNode:
    """The notebook that a py:percent file describes, without outputs."""
    return jupytext.reads(path.read_text(encoding="utf-8"), fmt=FORMAT)


def source_text(notebook: NotebookNode) -> str:
    """A notebook as py:percent."""
    plain = nbformat.v4.new_notebook(cells=notebook.cells)
    options = {"notebook_metadata_filter": "-all", "cell_metadata_filter": "tags"}
    plain.metadata["jupytext"] = options
    return jupytext.writes(plain, fmt=FORMAT)


def cells(notebook: NotebookNode) -> list[tuple]:
    """What both files of a pair hold: each cell's type, tags and text."""
    return [(cell.cell_type, tuple(cell.metadata.get("tags", ())), cell.source) for cell in notebook.cells]


def execute(notebook: NotebookNode, environment: dict[str, str]) -> NotebookNode:
    """Run all cells in a new kernel; raises nbclient's CellExecutionError where one fails."""
    copy = nbformat.from_dict(notebook)
    client = NotebookClient(
        copy,
        timeout=600,
        kernel_name="python3",
        coalesce_streams=True,
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(FOLDER)}},
    )
    client.execute(env=os.environ | environment)
    return copy


def normalized(notebook: NotebookNode) -> NotebookNode:
    """The same cells and outputs, without what differs from one run to the next."""
    result = nbformat.v4.new_notebook(metadata=METADATA)
    for number, cell in enumerate(notebook.cells):
        make = {"code": nbformat.v4.new_code_cell, "markdown": nbformat.v4.new_markdown_cell}[cell.cell_type]
        tags = {"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {}
        new = make(cell.source, id=f"cell-{number}", metadata=tags)
        if cell.cell_type == "code":
            new.outputs = [
                _normalized(output) for output in cell.outputs if WIDGET not in output.get("data", {})
            ]
            new.execution_count = cell.execution_count
        result.cells.append(new)
    return result


def _normalized(output: NotebookNode) -> NotebookNode:
    output = nbformat.from_dict(output)
    if "metadata" in output:
        output.metadata = {}
    return output


def keep_what_agrees(before: NotebookNode, after: NotebookNode) -> None:
    """Put outputs of an earlier run back where they agree with the new ones."""
    old = {(cell.source, tuple(cell.metadata.get("tags", ()))): cell for cell in before.cells}
    for cell in after.cells:
        known = old.get((cell.source, tuple(cell.metadata.get("tags", ()))))
        if cell.cell_type == "code" and known is not None and (is_machine(cell) or same_outputs(known, cell)):
            cell.outputs = known.outputs


def is_machine(cell: NotebookNode) -> bool:
    """Whether a cell shows what depends on the computer."""
    return "machine" in cell.metadata.get("tags", ())


def differences(committed: NotebookNode, executed: NotebookNode) -> list[str]:
    """The first lines of the cells whose outputs have changed."""
    pairs = zip(committed.cells, executed.cells, strict=True)
    changed = [b for a, b in pairs if b.cell_type == "code" and not is_machine(b) and not same_outputs(a, b)]
    return [cell.source.splitlines()[0] for cell in changed]


def same_outputs(one: NotebookNode, other: NotebookNode) -> bool:
    """Whether two cells show the same: text to the letter, pictures to the eye."""
    if len(one.outputs) != len(other.outputs):
        return False
    return all(_same(a, b) for a, b in zip(one.outputs, other.outputs, strict=True))


def _same(one: NotebookNode, other: NotebookNode) -> bool:
    one, other = dict(one), dict(other)
    pictures = [dict(output.get("data", {})).get("image/png") for output in (one, other)]
    for output in (one, other):
        output["data"] = {k: v for k, v in output.get("data", {}).items() if k != "image/png"}
        output.pop("execution_count", None)
    return one == other and (pictures[0] == pictures[1] or _same_picture(*pictures))


def _same_picture(one: str | None, other: str | None) -> bool:
    if one is None or other is None:
        return False
    a, b = (imread(io.BytesIO(base64.b64decode(png))) for png in (one, other))
    return a.shape == b.shape and np.mean(np.abs(a - b).max(axis=-1) > DIFFERENCE) <= DIFFERENT_PIXELS


def with_solutions(notebook: NotebookNode) -> NotebookNode:
    """The notebook, and behind it for each folded solution a cell that puts it to its exercise's check."""
    result, exercise = nbformat.from_dict(notebook), None
    for cell in notebook.cells:
        if "exercise" in cell.metadata.get("tags", ()):
            exercise = cell
        elif cell.cell_type == "markdown" and (found := SOLUTION.search(cell.source)):
            answer = found[1] + "\n" + _checks(exercise.source)
            result.cells.append(nbformat.v4.new_code_cell(answer, metadata={"tags": ["solution"]}))
    return result


def _checks(source: str) -> str:
    """The calls of `check` in an exercise's cell, without the place for the answer."""
    tree = ast.parse(source)
    tree.body = [line for line in tree.body if ast.unparse(line).startswith("check(")]
    return ast.unparse(tree)


def _write(path: Path, text: str) -> bool:
    """Write a file unless it holds this text already."""
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return False
    path.write_text(text, encoding="utf-8")
    return True


def main(arguments: list[str]) -> None:
    """Sync all notebooks, or those whose names begin with one of the arguments."""
    chosen = [topic for topic in topics() if not arguments or topic.startswith(tuple(arguments))]
    with ThreadPoolExecutor(2) as pool:
        for line in pool.map(sync, chosen):
            print(line, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
