"""Take the pictures in docs/ anew: `python tests/browser/screenshots.py [light|dark [WIDTH [FOLDER]]]`.

They are for people; the tests compare no pixels.
"""

import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from lab import ROOT, Lab, browser, run_all_cells, served

import tinyllama
from tinyllama.commands.convert import convert, quantize

THEMES = {"light": "JupyterLab Light", "dark": "JupyterLab Dark"}


def main(theme: str = "light", width: str = "1280", folder: str = str(ROOT / "docs")) -> None:
    with TemporaryDirectory() as home:
        lab = Lab(Path(home), ROOT / "notebooks", THEMES[theme])
        try:
            with browser() as chromium:
                for name, prepare in PICTURES.items():
                    notebook = "stepper.ipynb" if name == "stepper" else "playground.ipynb"
                    page = chromium.new_page(viewport={"width": int(width), "height": 3200})
                    page.goto(lab.address(notebook))
                    run_all_cells(lab, page, notebook, ".tinyllama")
                    prepare(page)
                    page.mouse.move(0, 0)
                    page.wait_for_timeout(500)
                    page.locator(".tinyllama").screenshot(path=Path(folder) / f"{name}.png")
        finally:
            lab.close()
        with served(Path(home) / "log", "-m", "smollm2") as (url, _), browser() as chromium:
            size = {"width": int(width), "height": 620}
            page = chromium.new_page(viewport=size, color_scheme=theme)
            page.goto(url)
            serve(page)
            page.screenshot(path=Path(folder) / "serve.png")
        compare(Path(home), theme, int(width), Path(folder) / "compare.png")


def playground(page) -> None:
    """Two runs, one of them with a token picked, whose tokens are tinted; another token is looked at."""
    settings(page, seed="1", n_predict="80")
    page.locator(".tinyllama-in-prompt textarea").press("Control+Enter")
    ended(page, 1)
    page.locator(".tinyllama-in-tint input").check()
    page.locator(".tinyllama-text [data-index='12']").click()
    page.locator(".tinyllama-pick").nth(1).click()
    ended(page, 2)
    page.locator(".tinyllama-in-other select").select_option(index=2)
    page.locator(".tinyllama-text [data-index='20']").first.click()
    page.locator(".tinyllama-bars").wait_for()


def chat(page) -> None:
    """Two turns, of the second two answers; a token of one is looked at, and what the model saw."""
    page.get_by_role("radio", name="Chat").check()
    page.locator(".tinyllama-in-model select").select_option(index=1)  # smollm2
    settings(page, seed="3")
    for number, message in enumerate(("What is the capital of France?", "And of Japan?"), 1):
        page.locator(".tinyllama-in-prompt textarea").fill(message)
        page.locator(".tinyllama-in-prompt textarea").press("Control+Enter")
        ended(page, number)
    page.get_by_role("button", name="Another answer").last.click()
    ended(page, 3)
    page.locator(".tinyllama-in-tint input").check()
    page.locator(".tinyllama-in-raw input").check()
    page.locator(".tinyllama-out-turns .tinyllama-text").last.locator("[data-index='1']").click()
    page.locator(".tinyllama-bars").wait_for()


def attention(page) -> None:
    """What the pass that chose a token attended to, all layers together."""
    page.get_by_label("Model", exact=True).select_option(index=1)  # smollm2
    page.locator(".tinyllama-in-prompt textarea").fill("Paris is in France. Rome is in Italy. Tokyo is in")
    settings(page, seed="1", n_predict="24")
    page.locator(".tinyllama-in-prompt textarea").press("Control+Enter")
    ended(page, 1)
    page.locator(".tinyllama-in-attend input").check()
    page.locator(".tinyllama-text .tinyllama-completion").first.click()
    page.locator(".tinyllama-attended").nth(3).wait_for()
    page.locator(".tinyllama-bars").wait_for()


def settings(page, **values: str) -> None:
    page.locator(".tinyllama-in-more").click()
    for name, value in values.items():
        page.locator(f".tinyllama-in-{name} input").fill(value)
    page.locator(".tinyllama-in-more").click()


def ended(page, n_runs: int) -> None:
    page.locator(".tinyllama-in-history option").nth(n_runs).wait_for(state="attached")
    page.locator(".tinyllama-out-status", has_text="ended").wait_for()


def stepper(page) -> None:
    """The heads that look from one Lily to the other, the attention of the first, the answer without it."""
    prompt = page.locator(".tinyllama-in-prompt textarea")
    prompt.fill("Once upon a time there was a little girl named Lily. One day, Lily")
    prompt.press("Enter")
    page.locator("[role='option']", has_text=re.compile("Lily")).first.wait_for()
    page.get_by_role("radio", name="All heads").check()
    page.locator(".tinyllama-out-looked [data-index='11']").click()
    page.locator(".tinyllama-out-looks", has_text="looks at ␣Lily (11)").wait_for()
    page.get_by_role("button", name=re.compile("^go to layer")).first.click()
    page.locator("canvas[aria-label*='attention.weights']").wait_for()
    page.get_by_role("button", name=re.compile("^Switch off head")).click()
    page.locator(".tinyllama-out-differences canvas").wait_for()


def serve(page) -> None:
    """Two answers of a chat; a token is looked at."""
    page.locator("#input:not([disabled])").wait_for()
    page.locator("summary").click()
    page.locator("[name=seed]").fill("3")
    page.locator("summary").click()
    for n, text in enumerate(("What is the capital of France?", "And what is it known for?"), 1):
        page.locator("#input").fill(text)
        page.locator("#input").press("Enter")
        page.locator(f".note >> nth={n - 1}").get_by_text("ended").wait_for()
    page.locator(".tokens").last.locator("[class^=tint]").nth(3).click()


def compare(home: Path, theme: str, width: int, path: Path) -> None:
    """The middle of the page of SmolLM2 and what is left of it in 4 bits: where it begins, which weights."""
    models = home / "smollm2-f16.gguf", home / "smollm2-q4_0.gguf"
    convert("smollm2", "f16", models[0])
    quantize(*models, "Q4_0")
    text = (ROOT / "data" / "held_out.txt").read_text(encoding="utf-8")[:16_000]
    tinyllama.compare(*models, text).html(home / "page.html")
    with browser() as chromium:
        page = chromium.new_page(viewport={"width": min(width, 1000), "height": 1600}, color_scheme=theme)
        page.goto((home / "page.html").as_uri())
        first, last = (page.get_by_role("heading", name=name).bounding_box() for name in COMPARED)
        clip = {"x": 0, "y": first["y"] - 12, "width": min(width, 1000), "height": last["y"] - first["y"]}
        page.screenshot(path=path, clip=clip, full_page=True)


#: Headings: the first that is shown, and the first that isn't.
COMPARED = ("Where it begins", "Error of what comes out of each tensor")
PICTURES = {"playground": playground, "chat": chat, "attention": attention, "stepper": stepper}


if __name__ == "__main__":
    main(*sys.argv[1:])
