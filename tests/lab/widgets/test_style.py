"""The colours of style.css: every text on every ground that it appears on, in both themes, by WCAG 2.2."""

import re
from pathlib import Path

import pytest

from tinyllama.lab import widgets

CSS = (Path(widgets.__file__).parent / "style.css").read_text(encoding="utf-8")
AA_TEXT, AA_PARTS = 4.5, 3.0  # of text, and of what one has to see to use a control

BLOCKS = re.findall(r"\{([^}]*--tl-text:[^}]*)\}", CSS)
THEMES = {
    theme: dict(re.findall(r"--tl-([\w-]+): (#\w{6});", block))
    for theme, block in zip(("light", "dark"), BLOCKS, strict=True)
}
TEXTS = [
    ("text", "ground"),
    ("text", "panel"),
    ("text", "button"),
    ("text", "selected"),
    ("text", "tint0"),
    ("text", "tint1"),
    ("text", "tint2"),
    ("text", "drafted"),
    ("text", "attended"),
    ("text", "mark"),
    ("muted", "mark"),
    ("text", "lens"),
    ("text", "map-zero"),
    ("muted", "ground"),
    ("muted", "panel"),
    ("on-accent", "accent"),
    ("error", "error-ground"),
]
PARTS = [
    ("accent", "ground"),
    ("accent", "panel"),
    ("line", "ground"),
    ("map-above", "map-zero"),
    ("map-below", "map-zero"),
]


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(theme: str, one: str, other: str) -> float:
    low, high = sorted(luminance(THEMES[theme][name]) for name in (one, other))
    return (high + 0.05) / (low + 0.05)


def test_both_themes_name_the_same_colours():
    assert THEMES["light"].keys() == THEMES["dark"].keys()


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("text, ground", TEXTS)
def test_text_can_be_read(theme, text, ground):
    assert contrast(theme, text, ground) >= AA_TEXT


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("part, ground", PARTS)
def test_parts_can_be_seen(theme, part, ground):
    assert contrast(theme, part, ground) >= AA_PARTS


def test_no_colour_is_written_outside_the_themes():
    rules = re.sub(r"\{[^}]*--tl-text:[^}]*\}", "", CSS)
    assert not re.findall(r"#[0-9a-fA-F]{3,8}\b(?=[;,) ])|rgba?\(", rules)


def test_black_on_white_is_21():
    THEMES["extremes"] = {"black": "#000000", "white": "#ffffff"}
    assert contrast("extremes", "black", "white") == pytest.approx(21)
    del THEMES["extremes"]


def test_no_text_of_the_tools_is_smaller_than_12_pixels():
    sizes = re.findall(r"font-size: [^;]*?(\d+)px", CSS)
    assert sizes and min(map(int, sizes)) >= 12
    assert re.search(r"\.tinyllama-bars small \{[^}]*font-size:", CSS)  # a browser's own are smaller
