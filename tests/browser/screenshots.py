"""Take the pictures in docs/ anew: `python tests/browser/screenshots.py [light|dark [WIDTH [FOLDER]]]`.

They are for people; the tests compare no pixels.
"""

import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from lab import ROOT, Lab, browser, run_all_cells

THEMES = {"light": "JupyterLab Light", "dark": "JupyterLab Dark"}


def main(theme: str = "light", width: str = "1280", folder: str = str(ROOT / "docs")) -> None:
    with TemporaryDirectory() as home:
        lab = Lab(Path(home), ROOT / "notebooks", THEMES[theme])
        try:
            with browser() as chromium:
                for name, prepare in (("playground", playground), ("stepper", stepper)):
                    page = chromium.new_page(viewport={"width": int(width), "height": 1600})
                    page.goto(lab.address(f"{name}.ipynb"))
                    run_all_cells(lab, page, f"{name}.ipynb", ".tinyllama")
                    prepare(page)
                    page.mouse.move(0, 0)
                    page.wait_for_timeout(500)
                    page.locator(".tinyllama").screenshot(path=Path(folder) / f"{name}.png")
        finally:
            lab.close()


def playground(page) -> None:
    """Two runs, one of them with a token picked, whose tokens are tinted; another token is looked at."""
    page.locator(".tinyllama-in-seed input").fill("1")
    page.locator(".tinyllama-in-n_predict input").fill("80")
    page.locator(".tinyllama-in-prompt textarea").press("Control+Enter")
    page.locator(".tinyllama-out-status", has_text="ended").wait_for()
    page.locator(".tinyllama-in-tint input").check()
    page.locator(".tinyllama-text [data-index='12']").click()
    page.locator(".tinyllama-pick").nth(1).click()
    page.locator(".tinyllama-changed").wait_for()
    page.locator(".tinyllama-out-status", has_text="ended").wait_for()
    page.locator(".tinyllama-text [data-index='20']").click()
    page.locator(".tinyllama-bars").wait_for()


def stepper(page) -> None:
    """The attention weights of a head in a layer in the middle."""
    prompt = page.locator(".tinyllama-in-prompt input")
    prompt.fill("Once upon a time there was a little girl named Lily. One day, Lily")
    prompt.press("Control+Enter")
    page.locator("[role='option']", has_text=re.compile("Lily")).first.wait_for()
    page.locator(".tinyllama-in-kind select").select_option(label="Attention weights")
    for layer in (1, 2):
        page.locator(f"canvas[aria-label^='layers.{layer - 1}.attention.weights']").wait_for()
        page.get_by_role("slider", name="Layer").press("ArrowRight")
    page.locator("canvas[aria-label^='layers.2.attention.weights']").wait_for()


if __name__ == "__main__":
    main(*sys.argv[1:])
