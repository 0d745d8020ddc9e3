"""The notebooks that show one tool each: nothing but the tool, and a picture for where no kernel runs."""

import json
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parents[3] / "notebooks"


@pytest.fixture(params=["playground", "stepper"])
def page(request):
    return request.param, json.loads((NOTEBOOKS / f"{request.param}.ipynb").read_text(encoding="utf-8"))


def test_a_page_calls_its_tool_and_hides_the_call(page):
    name, notebook = page
    (cell,) = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert f"tinyllama.{name}(" in "".join(cell["source"])
    assert cell["metadata"] == {"jupyter": {"source_hidden": True}}


def test_a_page_is_committed_without_a_trace_of_a_run(page):
    (cell,) = [cell for cell in page[1]["cells"] if cell["cell_type"] == "code"]
    assert cell["outputs"] == [] and cell["execution_count"] is None
    assert page[1]["metadata"].keys() == {"kernelspec"}


def test_a_page_has_its_picture(page):
    name, notebook = page
    picture = NOTEBOOKS.parent / "docs" / f"{name}.png"
    assert f"../docs/{name}.png" in "".join(notebook["cells"][-1]["source"])
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size < 400_000
