"""Lessons as a reader runs them: JupyterLab in a browser, Run All Cells, and a slider that is moved."""

import json
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from lab import CHROMIUM, ROOT, Lab, browser, run_all_cells

pytest.importorskip("playwright")
pytestmark = pytest.mark.browser

LESSONS = ("00_map", "05_attention", "10_quantization")
SECONDS = 120  # for a lesson
CELL = ".jp-CodeCell"
ERROR = '[data-mime-type="application/vnd.jupyter.error"], [data-mime-type="application/vnd.jupyter.stderr"]'
PICTURE = ".widget-interact .jp-OutputArea img"
TRACKER = "user-settings/@jupyterlab/notebook-extension/tracker.jupyterlab-settings"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    if not Path(CHROMIUM).exists():
        pytest.fail(f"no browser at {CHROMIUM}; on Debian `apt-get install chromium`, or set CHROMIUM")
    folder, home = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("home")
    for sub in ("notebooks", "data"):
        (folder / sub).mkdir()
    shutil.copy(ROOT / "data" / "held_out.txt", folder / "data")
    for lesson in LESSONS:
        notebook = committed(lesson)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbformat.write(notebook, folder / "notebooks" / f"{lesson}.ipynb")
    server = Lab(home, folder)
    (home / TRACKER).parent.mkdir(parents=True, exist_ok=True)
    (home / TRACKER).write_text(json.dumps({"windowingMode": "none"}))  # cells out of sight are there, too
    yield server
    server.close()


@pytest.fixture(scope="module")
def page_of(lab):
    """Opens a lesson and runs all its cells."""
    with browser() as chromium:

        def open_lesson(lesson):
            name = f"notebooks/{lesson}.ipynb"
            page = chromium.new_page(viewport={"width": 1280, "height": 1000})
            page.goto(lab.address(name))
            run_all_cells(lab, page, name, ".jp-OutputArea-output")
            last = page.locator(f"{CELL} .jp-InputArea-prompt").last
            last.get_by_text(re.compile(r"\[\d+\]")).wait_for(timeout=SECONDS * 1000)
            return page

        yield open_lesson


@pytest.mark.parametrize("lesson", LESSONS)
def test_a_lesson_runs_without_an_error_and_draws_its_pictures(page_of, lesson):
    page = page_of(lesson)
    assert page.locator(CELL).count() == sum(c.cell_type == "code" for c in committed(lesson).cells)
    assert page.locator(ERROR).count() == 0
    assert page.locator(f"{CELL} img:not(.widget-interact img)").count() == n_pictures(lesson)
    page.close()


def test_a_slider_of_the_lesson_on_quantization_draws_another_picture(page_of):
    page = page_of("10_quantization")
    page.locator(PICTURE).wait_for()
    before = page.locator(PICTURE).get_attribute("src")
    page.locator(".widget-interact .noUi-handle").last.press("ArrowRight")  # the outlier's
    page.wait_for_function("([at, src]) => document.querySelector(at)?.src != src", arg=[PICTURE, before])
    assert page.locator(PICTURE).count() == 1
    page.close()


def committed(lesson):
    return nbformat.read(ROOT / "notebooks" / f"{lesson}.ipynb", 4)


def n_pictures(lesson):
    outputs = [output for cell in committed(lesson).cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)
