"""The page: what is served, and that it needs nothing from elsewhere."""

import re
from pathlib import Path

import pytest

from tinyllama.lab import widgets
from tinyllama.serve import app

HERE = Path(app.__file__).parent
FILES = {"page.html": "/", "page.js": "/static/page.js", "page.css": "/static/page.css"}


@pytest.mark.parametrize("name, path", FILES.items())
def test_the_page_is_served_with_a_policy_that_lets_nothing_else_in(client, name, path):
    response = client.get(path)
    assert response.status_code == 200 and response.text == (HERE / name).read_text(encoding="utf-8")
    assert "default-src 'self'" in response.headers["content-security-policy"]
    assert response.headers["x-content-type-options"] == "nosniff"
    kind = {"html": "text/html", "js": "javascript", "css": "text/css"}[name.rpartition(".")[2]]
    assert kind in response.headers["content-type"]


def test_the_page_is_served_without_a_key_and_nothing_else_of_the_package_is(app):
    from starlette.testclient import TestClient

    with TestClient(app.guarded("secret")) as client:
        assert all(client.get(path).status_code == 200 for path in FILES.values())
        assert client.get("/v1/models").status_code == 401
        for name in ("app.py", "..%2fapp.py", "none.js"):
            assert client.get(f"/static/{name}").status_code == 404


@pytest.mark.parametrize("name", FILES)
def test_no_file_names_a_foreign_host_or_holds_what_the_policy_forbids(name):
    text = (HERE / name).read_text(encoding="utf-8")
    assert not re.findall(r"https?:|wss?:|[\"'(]//|@import|url\(", text)
    assert not re.findall(
        r"<style|\sstyle=|\son\w+=|javascript:|<script(?![^>]*src=)|innerHTML|\beval\(", text
    )


def test_its_colours_are_those_of_the_playground_whose_contrasts_are_tested():
    themes = [
        [dict(re.findall(r"(--tl-[\w-]+): (#\w{6});", block)) for block in re.findall(r"\{([^{}]*)\}", css)]
        for css in (
            (HERE / "page.css").read_text(),
            (Path(widgets.__file__).parent / "style.css").read_text(),
        )
    ]
    page, playground = ([block for block in blocks if block] for blocks in themes)
    assert len(page) == len(playground) == 2
    for ours, theirs in zip(page, playground, strict=True):
        assert ours.items() <= theirs.items()
    used = set(re.findall(r"var\((--tl-[\w-]+)\)", (HERE / "page.css").read_text()))
    assert used == page[0].keys() == page[1].keys()
