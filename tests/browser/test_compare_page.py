"""The page of two models as a person meets it, in a browser."""

import pytest
from lab import browser

import tinyllama
from tinyllama.commands.convert import convert, quantize

pytest.importorskip("playwright")
pytestmark = pytest.mark.browser

TEXT = "Once upon a time there was a little girl named Lily. She had a dog. " * 20


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    convert("small", "f16", folder / "f16.gguf", "gguf")
    quantize(folder / "f16.gguf", folder / "q4.gguf", "Q4_0")
    found = tinyllama.compare(folder / "f16.gguf", folder / "q4.gguf", TEXT, ctx_size=64, n_steps=32)
    found.html(folder / "page.html")
    return (folder / "page.html").as_uri()


@pytest.fixture(scope="module")
def chromium():
    with browser() as chromium:
        yield chromium


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 800, 1280])
def test_it_fits_every_width_in_both_themes_and_loads_nothing(chromium, address, theme, width):
    page = chromium.new_page(viewport={"width": width, "height": 800}, color_scheme=theme)
    asked, errors = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: errors.append(message.text))
    page.goto(address)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert [url for url in asked if not url.startswith("data:")] == [address] and errors == []
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(17, 17, 17)"}[theme]
    page.close()


def test_all_tensors_are_behind_a_line(chromium, address):
    page = chromium.new_page()
    page.goto(address)
    row = page.get_by_text("layers.3.feed_forward.w2", exact=True)
    assert not row.is_visible()
    page.get_by_text("that differ, the worst first").click()
    assert row.is_visible()


def test_blocks_that_scroll_sideways_show_it_with_a_shadow_that_goes_at_the_end(chromium, address):
    page = chromium.new_page(viewport={"width": 400, "height": 800})
    page.goto(address)
    block = page.locator(".wide", has=page.get_by_label("KL divergence over the text"))
    assert block.evaluate("block => block.scrollWidth > block.clientWidth")

    def right_edge() -> bytes:
        box = block.bounding_box()
        return block.page.screenshot(
            full_page=True, clip={"x": box["x"] + box["width"] - 3, "y": box["y"], "width": 2, "height": 2}
        )

    at_the_beginning = right_edge()
    block.evaluate("block => block.scrollLeft = 1000")
    assert right_edge() != at_the_beginning
