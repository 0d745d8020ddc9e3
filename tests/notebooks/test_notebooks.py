"""Every notebook runs, shows what it showed when it was committed, and keeps to the course's pattern."""

import importlib.util
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest

from tinyllama.backends import available

FOLDER = Path(__file__).parents[2] / "notebooks"
specification = importlib.util.spec_from_file_location("sync", FOLDER / "sync.py")
sync = importlib.util.module_from_spec(specification)
specification.loader.exec_module(sync)

TOPICS = sync.topics()
COMMITTED = {topic: nbformat.read(FOLDER / f"{topic}.ipynb", 4) for topic in TOPICS}
SETTINGS = {
    "numpy-small": sync.ENVIRONMENT,
    "c-small": sync.ENVIRONMENT | {"TINYLLAMA_BACKEND": "c"},
    "numpy-smollm2": sync.ENVIRONMENT | {"TINYLLAMA_MODEL": "smollm2"},
    "c-smollm2": sync.ENVIRONMENT | {"TINYLLAMA_BACKEND": "c", "TINYLLAMA_MODEL": "smollm2"},
}


@pytest.fixture(scope="module")
def runs(request):
    """(topic, setting) -> a future of the executed notebook, for all that tests will ask, two at a time."""
    wanted = dict.fromkeys(
        (item.callspec.params["topic"], item.callspec.params["setting"])
        for item in request.session.items
        if item.path == request.path and "setting" in getattr(getattr(item, "callspec", None), "params", {})
    )
    with ThreadPoolExecutor(2) as pool:
        yield {
            (topic, setting): pool.submit(
                sync.execute, sync.with_solutions(COMMITTED[topic]), SETTINGS[setting]
            )
            for topic, setting in wanted
        }
        pool.shutdown(cancel_futures=True)


def parts(executed):
    """The notebook as its readers run it, and the cells that put the solutions to the checks."""
    is_solution = [cell.metadata.get("tags") == ["solution"] for cell in executed.cells]
    solutions = [cell for cell, yes in zip(executed.cells, is_solution, strict=True) if yes]
    executed.cells = [cell for cell, yes in zip(executed.cells, is_solution, strict=True) if not yes]
    return sync.normalized(executed), solutions


def assert_right(solutions):
    for cell in solutions:
        said = "".join(output.text for output in cell.outputs)
        assert said and all(line.startswith("Right") for line in said.splitlines()), cell.source


@pytest.mark.parametrize("setting", ["numpy-small"])
@pytest.mark.parametrize("topic", TOPICS)
def test_a_notebook_shows_what_it_showed_and_its_solutions_are_right(topic, setting, runs):
    executed, solutions = parts(runs[topic, setting].result())
    assert_right(solutions)
    assert sync.differences(COMMITTED[topic], executed) == [], "run `make notebooks` and look at what changed"


@pytest.mark.long
@pytest.mark.parametrize("setting", list(SETTINGS)[1:])
@pytest.mark.parametrize("topic", TOPICS)
def test_its_asserts_and_solutions_hold_on_other_backends_and_models(topic, setting, runs, request):
    if setting.startswith("c") and (reason := available()["c"]):
        pytest.skip(reason)
    if "smollm2" in setting:
        request.getfixturevalue("smollm2_file")
    assert_right(parts(runs[topic, setting].result())[1])


@pytest.mark.parametrize("topic", TOPICS)
def test_a_pair_is_in_step(topic):
    source = sync.read_source(sync.SOURCES / f"{topic}.py")
    assert sync.cells(source) == sync.cells(COMMITTED[topic]), "run `make notebooks`"


@pytest.mark.parametrize("topic", TOPICS)
def test_a_committed_notebook_holds_nothing_that_another_run_would_change(topic):
    text = (FOLDER / f"{topic}.ipynb").read_text(encoding="utf-8")
    assert nbformat.writes(sync.normalized(COMMITTED[topic])) + "\n" == text
    counts = [cell.execution_count for cell in COMMITTED[topic].cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))


@pytest.mark.parametrize("topic", TOPICS)
def test_a_notebook_asserts_shows_a_picture_and_asks_an_exercise(topic):
    code = [cell for cell in COMMITTED[topic].cells if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    exercises = [cell for cell in code if "exercise" in cell.metadata.get("tags", ())]
    solutions = [cell for cell in COMMITTED[topic].cells if sync.SOLUTION.search(cell.source)]
    assert any("assert " in cell.source for cell in code)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert exercises and len(exercises) == len(solutions)
    assert all("check(" in cell.source for cell in exercises)


@pytest.mark.parametrize("topic", TOPICS)
def test_cells_are_short(topic):
    for cell in COMMITTED[topic].cells:
        lines = cell.source.partition("<details>")[0].splitlines()
        words = re.findall(r"\w+", " ".join(line for line in lines if not line.startswith("|")))  # no tables
        assert len(lines) <= 20 if cell.cell_type == "code" else len(words) <= 150, cell.source


def test_the_numbers_of_the_notebooks_have_no_gap():
    assert [topic[:2] for topic in TOPICS] == [f"{number:02}" for number in range(len(TOPICS))]


@pytest.mark.parametrize("page", ["README.md", "00_map.ipynb"])
def test_the_map_and_the_table_link_every_notebook(page):
    text = (FOLDER / page).read_text(encoding="utf-8")
    assert set(TOPICS) - {Path(page).stem} <= set(re.findall(r"\((\d\d_\w+)\.ipynb", text))


@pytest.mark.parametrize("page", ["README.md", "STYLE.md", *(f"{topic}.ipynb" for topic in TOPICS)])
def test_links_lead_to_files_and_headings_that_exist(page):
    for target, heading in links(FOLDER / page):
        assert target.exists(), target
        assert not heading or heading in headings(target), f"{target.name}#{heading}"


def links(page):
    """(file, heading or "") of the links in a page that lead to the project's own files."""
    for target, heading in re.findall(r"\]\(\s*([^)#\s]*)#?([^)\s]*)\)", prose(page)):
        if "://" not in target:
            yield (page.parent / target if target else page), heading


def headings(page):
    """A page's headings as Jupyter's anchors write them."""
    found = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {heading.strip().replace("`", "").replace(" ", "-") for heading in found}


def prose(page):
    if page.suffix != ".ipynb":
        return page.read_text(encoding="utf-8")
    cells = nbformat.read(page, 4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
