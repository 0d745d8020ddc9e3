"""docs/cluster.md: its table is what its tool computes, its examples are Python, its links lead somewhere."""

import ast
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
TOOL = runpy.run_path(str(ROOT / "tools" / "cluster_table.py"))


def anchors(page: str) -> set[str]:
    """What GitHub makes of a page's headings."""
    titles = re.findall(r"(?m)^#+ (.*)$", page)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_its_table_is_what_the_tool_computes():
    assert TOOL["table"]() in PAGE, "Run `python tools/cluster_table.py`"


def test_more_machines_never_make_one_text_faster_but_always_a_prompt_and_many_texts():
    for size, config in TOOL["PRESETS"].items():
        by_machines = [TOOL["speeds"](config, machines) for machines in (1, 2, 4, 8)]
        one, prompt, many = zip(*by_machines, strict=True)
        assert list(one) == sorted(one, reverse=True), size
        assert list(prompt) == sorted(prompt) and list(many) == sorted(many), size


def test_the_arithmetic_is_that_of_the_published_model():
    config = TOOL["PRESETS"]["7B"]
    assert TOOL["n_weights"](config, 32, 2) == pytest.approx(config.n_params(), rel=1e-4)  # but for the norms
    assert TOOL["memory"](config, 1) == pytest.approx(3.79e9 + 1.07e9, rel=0.01)
    assert sum(TOOL["memory"](config, 2) for _ in range(2)) == pytest.approx(
        TOOL["memory"](config, 1), rel=1e-9
    )


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
def test_an_example_is_python(code):
    ast.parse(code)


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(((?!http)[^)]+)\)", PAGE))))
def test_a_link_leads_to_a_file_and_a_heading(link):
    path, _, anchor = link.partition("#")
    page = ROOT / "docs" / path if path else ROOT / "docs" / "cluster.md"
    assert page.exists()
    assert not anchor or anchor in anchors(page.read_text(encoding="utf-8"))
