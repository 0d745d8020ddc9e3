"""The tools as a person meets them: JupyterLab in a browser, on the pages in notebooks/."""

import json
import re
import shutil
from pathlib import Path

import psutil
import pytest
from lab import CHROMIUM, ROOT, Lab, browser, run_all_cells

import tinyllama

pytest.importorskip("playwright")
pytestmark = pytest.mark.browser

STORY = "Once upon a time"
PROMPT = ".tinyllama-in-prompt textarea"
TEXT = ".tinyllama-out-text .tinyllama-text"

#: Whatever of this stands in the server's log is an error.
WRONG = re.compile(r"^\[[EC] |Traceback|\] (?:404|500)\b", re.MULTILINE)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    if not Path(CHROMIUM).exists():
        pytest.fail(f"no browser at {CHROMIUM}; on Debian `apt-get install chromium`, or set CHROMIUM")
    folder = tmp_path_factory.mktemp("checkout")
    for tool in ("playground", "stepper"):
        for file in (f"notebooks/{tool}.ipynb", f"docs/{tool}.png"):
            (folder / file).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / file, folder / file)
    (folder / "notebooks" / "models").mkdir()
    (folder / "notebooks" / "models" / "gone.gguf").write_bytes(b"GGUF")
    server = Lab(tmp_path_factory.mktemp("home"), folder)
    yield server
    log = server.log()  # that it is told to stop is "critical", too
    server.close()
    assert not WRONG.search(log), log


@pytest.fixture(scope="module")
def chromium():
    with browser() as chromium:
        yield chromium


@pytest.fixture
def opened(lab, chromium):
    """Opens a notebook and runs it; afterwards the browser's console must hold no error."""
    errors, context = [], chromium.new_context(viewport={"width": 1280, "height": 1000})
    context.grant_permissions(["clipboard-read", "clipboard-write"])

    def open_notebook(name: str):
        name = f"notebooks/{name}"
        page = context.new_page()
        page.on("console", lambda message: message.type == "error" and errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(lab.address(name))
        run_all_cells(lab, page, name, ".tinyllama")
        return page

    yield open_notebook
    lab.shut_down_kernels()  # first: what a kernel sends to a page that is gone is an error in the log
    context.close()
    assert errors == []


def set_number(page, name: str, value: int) -> None:
    number = page.locator(f".tinyllama-in-{name} input")
    number.fill(str(value))
    number.press("Enter")


def wait_for_status(page, words: str) -> None:
    page.locator(".tinyllama-out-status", has_text=words).wait_for(timeout=60_000)


def generate(page, prompt: str, n_predict: int, seed: int = 1) -> None:
    page.locator(PROMPT).fill(prompt)
    set_number(page, "n_predict", n_predict)
    set_number(page, "seed", seed)
    page.locator(".tinyllama-in-generate:enabled").wait_for()
    page.locator(PROMPT).press("Control+Enter")


def test_the_playground(opened, lab):
    page = opened("playground.ipynb")
    page.locator(".tinyllama-in-more").click()
    writes_what_generate_writes_in_pieces(page)
    shows_alternatives_and_goes_on_from_one(page)
    compares_and_copies(page)
    tints_what_was_guessed(page)
    tints_what_a_token_attended_to(page)
    says_what_is_wrong_and_goes_on(page, lab)
    stops_a_long_run(page)
    every_control_has_a_name(page)


def writes_what_generate_writes_in_pieces(page):
    page.evaluate(
        """(selector) => {
            window.lengths = [];
            const note = () => window.lengths.push(document.querySelector(selector).textContent.length);
            new MutationObserver(note).observe(document.querySelector(selector), {childList: true});
        }""",
        TEXT,
    )
    generate(page, STORY, n_predict=400, seed=5)
    wait_for_status(page, "ended")
    text = tinyllama.generate(STORY, n_predict=400, seed=5)
    assert page.locator(TEXT).text_content() == STORY + text
    assert page.locator(f"{TEXT} .tinyllama-completion").count() == len(text.tokens)
    assert len(set(page.evaluate("window.lengths"))) >= 3  # it came in pieces


def shows_alternatives_and_goes_on_from_one(page):
    page.locator(f"{TEXT} [data-index='9']").click()
    rows = page.locator(".tinyllama-bars tr")
    rows.nth(10).wait_for()
    assert page.locator(".tinyllama-facts", has_text="bits").count() == 1
    assert page.locator(".tinyllama-bars th", has_text="top-k 40").count() == 1
    other = page.locator(".tinyllama-bars tr:not(.tinyllama-chosen) .tinyllama-piece").nth(0).text_content()
    before = page.locator(f"{TEXT} [data-index='8']").text_content()
    set_number(page, "n_predict", 10)
    page.locator(".tinyllama-pick").first.click()
    page.locator(f"{TEXT} .tinyllama-changed").wait_for()
    wait_for_status(page, "text 10 tokens")
    assert page.locator(f"{TEXT} .tinyllama-changed").text_content().replace(" ", "␣") == other
    assert page.locator(f"{TEXT} [data-index='8']").text_content() == before


def compares_and_copies(page):
    page.locator(".tinyllama-in-other select").select_option(index=2)
    page.locator(".tinyllama-text").nth(1).wait_for()
    page.locator(".tinyllama-differs", has_text="Tokens asked for").wait_for()
    page.locator(".tinyllama-copies button", has_text="tinyllama.generate").click()
    page.locator(".tinyllama-copies button", has_text="Copied").wait_for()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert page.locator(TEXT).text_content().endswith(eval(copied))
    page.locator(".tinyllama-in-other select").select_option(index=0)
    page.locator(".tinyllama-in-tint input").check()
    page.locator(f"{TEXT} [class*='tinyllama-tint']").first.wait_for()


def tints_what_was_guessed(page):
    page.locator(".tinyllama-in-draft_lookup input").check()
    for _ in range(2):  # the first measures what passes take
        generate(page, f"{STORY}, there was a little girl named Lily. " * 5, n_predict=100)
        wait_for_status(page, "text 100 tokens")
    page.locator(".tinyllama-in-tint_drafted input").check()
    page.locator(f"{TEXT} .tinyllama-drafted").first.wait_for()
    page.locator(".tinyllama-in-draft_lookup input").uncheck()


def tints_what_a_token_attended_to(page):
    generate(page, STORY, n_predict=20)
    wait_for_status(page, "text 20 tokens")
    page.get_by_label("Tint what a token attended to").check()
    page.locator(f"{TEXT} [data-index='9']").click()
    page.locator(f"{TEXT} .tinyllama-attended").nth(3).wait_for()
    tinted = page.locator(f"{TEXT} .tinyllama-attended")
    indices = tinted.evaluate_all("spans => spans.map((span) => Number(span.dataset.index))")
    assert 0 not in indices and max(indices) == 8
    page.get_by_label("Tint the first token, too").check()
    page.locator(f"{TEXT} .tinyllama-attended[data-index='0']").wait_for()
    assert "attention" in page.locator(f"{TEXT} [data-index='8']").get_attribute("title")
    page.get_by_role("slider", name="Layers").press("ArrowRight")
    page.locator(".tinyllama-out-attention", has_text="all heads of layer 0").wait_for()
    page.get_by_label("Tint what a token attended to").uncheck()
    tinted.first.wait_for(state="detached")


def says_what_is_wrong_and_goes_on(page, lab):
    (lab.folder / "notebooks" / "models" / "gone.gguf").unlink()
    model = page.locator(".tinyllama-in-model select")
    model.select_option(
        label=next(label for label in model.inner_text().splitlines() if "gone.gguf" in label)
    )
    page.locator(".tinyllama-in-generate").click()
    error = page.locator(".tinyllama-error")
    error.wait_for()
    assert "there is no such file" in error.text_content()
    model.select_option(index=0)
    generate(page, STORY, n_predict=5)
    wait_for_status(page, "text 5 tokens")
    error.wait_for(state="detached")


def stops_a_long_run(page):
    page.locator(".tinyllama-in-backend select").select_option(label="numpy")
    generate(page, STORY * 100, n_predict=-1)
    page.locator(f"{TEXT} .tinyllama-prompt").nth(300).wait_for()
    page.locator(".tinyllama-in-stop").click()
    wait_for_status(page, "interrupted")
    generate(page, STORY, n_predict=-1, seed=3)
    page.locator(f"{TEXT} .tinyllama-completion").nth(20).wait_for()
    page.locator(".jp-MarkdownOutput h1").first.click()  # Escape stops it wherever the focus is
    page.keyboard.press("Escape")
    wait_for_status(page, "interrupted")


CHAT = "tinyllama.playground(chat=True, chat_template='chatml', seed=3, n_predict=12)"
ANSWER = ".tinyllama-answer .tinyllama-text"


def test_a_chat(opened, lab):
    page = opened(notebook_of(lab, "chat.ipynb", f"import tinyllama\n{CHAT}"))
    page.set_viewport_size({"width": 1280, "height": 900})
    llama = tinyllama.load("small")
    messages = [{"role": "user", "content": STORY}]
    text = llama.chat(messages, chat_template="chatml", seed=3, n_predict=12)
    page.locator(PROMPT).fill(STORY)
    page.keyboard.press("Control+Enter")
    page.locator(".tinyllama-said", has_text=f"It wrote: {text}").wait_for(state="attached")
    assert page.locator(ANSWER).text_content() == text
    another_answer_stands_beside_the_first(page)
    all_is_in_sight_at_once(page)
    what_the_model_saw_is_a_click_away(page)
    a_message_is_edited_by_keyboard(page)
    runs_are_saved(page)
    every_control_has_a_name(page)


def another_answer_stands_beside_the_first(page):
    page.get_by_role("button", name="Another answer").click()
    page.get_by_text("answer 2 of 2 ← taken").wait_for()
    wait_for_status(page, "ended")
    boxes = [page.locator(ANSWER).nth(n).bounding_box() for n in (0, 1)]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] < boxes[1]["x"]
    page.get_by_role("button", name="Take this one").click()
    page.get_by_text("answer 1 of 2 ← taken").wait_for()


def all_is_in_sight_at_once(page):
    page.locator(f"{ANSWER} [data-index='11']").first.click()
    deciding = page.locator(".tinyllama-bars tr").nth(10).locator("td").last
    deciding.wait_for()
    page.wait_for_function("document.querySelector('[aria-selected=true]')")
    for part in (deciding, page.locator(f"{ANSWER} [data-index='11']").first, page.locator(PROMPT)):
        box = part.bounding_box()
        assert box["y"] > 0 and box["y"] + box["height"] < 880 and box["x"] + box["width"] < 1250


def what_the_model_saw_is_a_click_away(page):
    assert not page.locator(TEXT).is_visible()
    page.get_by_label("Show what the model saw").check()
    page.locator(TEXT, has_text=f"<|im_start|>user\n{STORY}<|im_end|>").wait_for()


def a_message_is_edited_by_keyboard(page):
    page.get_by_role("button", name="Edit").first.focus()
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Send this instead").wait_for()
    page.wait_for_function("document.activeElement.tagName == 'TEXTAREA'")
    page.keyboard.press("End")
    page.keyboard.type(" there was")
    page.keyboard.press("Control+Enter")
    page.locator(".tinyllama-message", has_text=f"{STORY} there was").wait_for()
    wait_for_status(page, "ended")


def runs_are_saved(page):
    with page.expect_download() as download:
        page.get_by_role("button", name="Save all runs as JSON").click()
    runs = json.loads(Path(download.value.path()).read_text())
    assert [run["messages"][-2]["content"] for run in runs] == [STORY, STORY, f"{STORY} there was"]


EXPERIMENT = """tinyllama.stepper(
    "Once upon a time", changes=[{"at": "layers.2.attention.output"}], layer=1, kind="attention.weights"
)"""


def test_an_experiment(opened, lab):
    page, llama = (
        opened(notebook_of(lab, "experiment.ipynb", f"import tinyllama\n{EXPERIMENT}")),
        tinyllama.load("small"),
    )
    answers = [llama.generate(STORY, n_predict=16, temp=0)]
    edit = tinyllama.ablate("layers.2.attention.output")
    with llama.edit(edit):
        answers.append(llama.generate(STORY, n_predict=16, temp=0))
    with llama.edit(edit | tinyllama.ablate("layers.1.attention.heads", heads=[0])):
        answers.append(llama.generate(STORY, n_predict=16, temp=0))
    left, right = (page.locator(f".tinyllama-out-{side} .tinyllama-message") for side in ("left", "right"))
    right.filter(has_text=answers[1]).wait_for()
    assert left.text_content() == f"<s> {STORY}{answers[0]}"
    page.get_by_role("button", name="Switch off head 0 of layer 1").click()
    page.locator(".tinyllama-out-changes", has_text="layers.1.attention.heads, head 0 = 0").wait_for()
    right.filter(has_text=answers[2]).wait_for()
    assert page.locator(".tinyllama-out-likeliest tr").count() == 11
    page.locator(".tinyllama-out-differences canvas").wait_for()
    page.get_by_role("button", name="Remove").first.click()
    page.get_by_role("button", name="Remove").last.click()
    right.wait_for(state="hidden")
    page.locator(".tinyllama-in-second input").fill("The old king")
    page.locator(".tinyllama-in-second input").press("Enter")
    page.locator(".tinyllama-in-beside select").select_option(label="the second prompt")
    right.filter(has_text="The old king").wait_for()
    every_control_has_a_name(page)


def notebook_of(lab, name: str, code: str) -> str:
    """The playground's notebook with other code."""
    notebook = json.loads((lab.folder / "notebooks" / "playground.ipynb").read_text())
    notebook["cells"][1]["source"] = code
    (lab.folder / "notebooks" / name).write_text(json.dumps(notebook))
    return name


def test_the_stepper(opened):
    page = opened("stepper.ipynb")
    page.locator(STEPPER_PROMPT).fill("The old king had")
    page.locator(STEPPER_PROMPT).press("Enter")
    page.locator(".tinyllama-stepper [role='option']", has_text="␣king").first.wait_for()
    names = list(tinyllama.load("small").trace("The old king had"))
    wait_for_status(page, f"Step 1 of {len(names)}: embedding")
    n_steps = names.index("layers.0.residual") + 1
    for number, name in enumerate(names[1:n_steps], 2):  # one whole layer
        page.locator(".tinyllama-in-next").click()
        wait_for_status(page, f"Step {number} of {len(names)}: {name}")
        page.locator(f"canvas[aria-label^='{name}']").wait_for()
        assert page.locator(".tinyllama-out-code mark").count() > 0
    assert page.locator(".tinyllama-lens tr").count() == 1
    page.locator(".tinyllama-in-previous").click()
    page.locator("canvas[aria-label^='layers.0.feed_forward.output']").wait_for()
    page.get_by_role("slider", name="Layer").press("ArrowRight")
    page.locator("canvas[aria-label^='layers.1.feed_forward.output']").wait_for()
    page.locator(".tinyllama-in-kind select").select_option(label="Attention weights")
    page.locator("canvas[aria-label^='layers.1.attention.weights, head 0']").wait_for()
    page.get_by_role("slider", name="Head").press("ArrowRight")
    page.locator("canvas[aria-label^='layers.1.attention.weights, head 1']").wait_for()
    page.get_by_role("slider", name="Position").press("ArrowLeft")
    page.locator(".tinyllama-out-says", has_text="␣king").wait_for()
    every_control_has_a_name(page)
    its_map_grows_with_the_page(page)
    two_tokens_rank_the_heads(page)
    all_heads_are_a_click_or_keys_away(page)
    a_cell_of_the_lens_goes_to_its_layer_and_token(page)
    its_line_of_python_is_copied(page)
    a_changed_prompt_marks_what_is_old(page)
    a_likely_token_is_taken(page)
    it_has_the_whole_screen(page)
    its_views_can_be_clicked_on_a_narrow_page(page)


STEPPER_PROMPT = ".tinyllama-in-prompt textarea"
MAP = ".tinyllama-out-map canvas"


def its_map_grows_with_the_page(page):
    def width() -> float:
        page.wait_for_timeout(300)  # drawn anew
        box = page.locator(MAP).bounding_box()
        assert box["x"] + box["width"] <= page.viewport_size["width"]
        return box["width"]

    widths = []
    for size in (500, 1280, 1920):
        page.set_viewport_size({"width": size, "height": 1000})
        widths.append(width())
    assert widths == sorted(widths) and widths[0] > 250 and widths[2] > 800
    page.set_viewport_size({"width": 1280, "height": 1000})


def two_tokens_rank_the_heads(page):
    page.locator(".tinyllama-out-looked [data-index='1']").click()
    facts = page.locator(".tinyllama-out-looks .tinyllama-facts", has_text="␣king (3) looks at ␣The (1)")
    facts.wait_for()
    weights = page.locator(".tinyllama-out-looks .tinyllama-share").all_text_contents()
    assert len(weights) == 10 and weights == sorted(weights, reverse=True)
    name = page.locator(".tinyllama-out-looks .tinyllama-piece").nth(1).text_content()
    page.get_by_role("button", name=f"go to {name}").click()
    layer, head = re.findall(r"\d+", name)
    page.locator(f"canvas[aria-label^='layers.{layer}.attention.weights, head {head}.']").wait_for()


def all_heads_are_a_click_or_keys_away(page):
    page.get_by_role("radio", name="All heads").check()
    sheet = page.locator(".tinyllama-out-sheet canvas")
    sheet.wait_for()
    for name in ("Layer", "Head"):
        page.get_by_role("slider", name=name).press("Home")
    place = "layer=0, kind='attention.weights', position=3"  # head 0 goes without saying
    page.locator(".tinyllama-out-line", has_text=place).wait_for()
    for key in ("ArrowDown", "ArrowRight", "ArrowRight"):
        sheet.press(key)
    page.locator(".tinyllama-out-sheet figcaption", has_text="layer 1, head 2").wait_for()
    sheet.press("Enter")
    page.locator("canvas[aria-label^='layers.1.attention.weights, head 2.']:focus").wait_for()
    page.get_by_role("radio", name="All heads").check()
    sheet.wait_for()
    box = sheet.bounding_box()
    sheet.click(position={"x": box["width"] - 10, "y": box["height"] - 10})
    page.locator("canvas[aria-label^='layers.3.attention.weights, head 7.']").wait_for()
    page.locator(MAP).press("ArrowUp")
    page.locator(".tinyllama-out-map figcaption", has_text="␣old (2) looks at ␣The (1): 0.").wait_for()
    page.locator(MAP).press("Enter")
    page.locator(".tinyllama-out-looks", has_text="␣old (2) looks at ␣The (1)").wait_for()


def a_cell_of_the_lens_goes_to_its_layer_and_token(page):
    page.get_by_role("radio", name="All layers").check()
    cells = page.locator(".tinyllama-grid td")
    cells.nth(19).wait_for()
    assert cells.count() == 4 * 5
    page.locator(".tinyllama-grid [aria-selected='true']").press("ArrowDown")
    page.locator(".tinyllama-grid :focus").press("Enter")
    page.locator("canvas[aria-label^='layers.2.residual']").wait_for()
    page.get_by_role("radio", name="All layers").check()
    page.locator(".tinyllama-grid [data-place='1 4']").click()
    page.locator("canvas[aria-label^='layers.1.residual']").wait_for()


def its_line_of_python_is_copied(page):
    page.get_by_role("button", name="Copy this line of Python").click()
    page.locator(".tinyllama-copies button", has_text="Copied").wait_for()
    line = page.evaluate("navigator.clipboard.readText()")
    place = "layer=1, kind='residual', head=7, looks_at=1"
    assert line == f"tinyllama.stepper('The old king had', model='small', {place})"


def a_changed_prompt_marks_what_is_old(page):
    page.locator(STEPPER_PROMPT).press("End")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("a")
    page.locator(".tinyllama-stale", has_text="of the earlier prompt").wait_for()
    assert page.locator(STEPPER_PROMPT).input_value() == "The old king had\na"
    page.locator(STEPPER_PROMPT).fill("The old king had a")
    page.keyboard.press("Enter")
    page.locator(".tinyllama-stale").wait_for(state="detached")
    assert page.locator(".tinyllama-out-tokens [role='option']").count() == 6


def a_likely_token_is_taken(page):
    page.locator(".tinyllama-in-kind select").select_option(label="Logits")
    likely = page.locator(".tinyllama-out-next .tinyllama-piece").nth(2)
    likely.wait_for()
    word = likely.text_content().replace("␣", " ")
    page.locator(".tinyllama-out-next .tinyllama-pick").nth(1).click()
    page.locator(".tinyllama-out-tokens [data-index='6'][aria-selected='true']").wait_for()
    assert page.locator(STEPPER_PROMPT).input_value() == f"The old king had a{word}"


def it_has_the_whole_screen(page):
    page.get_by_role("button", name="Full screen").click()
    page.get_by_role("button", name="Leave full screen").wait_for()
    assert page.evaluate("document.fullscreenElement.matches('.tinyllama-stepper')")
    page.set_viewport_size({"width": 1024, "height": 768})
    page.get_by_role("radio", name="All heads").check()
    page.wait_for_timeout(300)  # drawn anew
    box = page.locator(".tinyllama-out-sheet canvas").bounding_box()
    assert box["y"] + box["height"] <= 768
    page.set_viewport_size({"width": 1280, "height": 1000})
    page.get_by_role("button", name="Leave full screen").click()
    page.get_by_role("button", name="Full screen", exact=True).wait_for()
    assert page.evaluate("document.fullscreenElement") is None


def its_views_can_be_clicked_on_a_narrow_page(page):
    page.set_viewport_size({"width": 400, "height": 800})
    for name in ("All layers", "All heads"):
        page.get_by_role("radio", name=name).click(timeout=5000)


def test_two_playgrounds_and_a_cell_run_twice_do_not_disturb_each_other(opened, lab):
    call_twice = (
        "import ipywidgets, tinyllama\nipywidgets.VBox([tinyllama.playground(), tinyllama.playground()])"
    )
    page = opened(notebook_of(lab, "two.ipynb", call_twice))
    run_all_cells(lab, page, "notebooks/two.ipynb", ".tinyllama >> nth=1")
    tools = [page.locator(".tinyllama").nth(i) for i in (0, 1)]
    for seed, tool in enumerate(tools):
        tool.locator(PROMPT).fill(STORY)
        tool.locator(".tinyllama-in-more").click()
        tool.locator(".tinyllama-in-seed input").fill(str(seed))
        tool.locator(PROMPT).press("Control+Enter")
    for seed, tool in enumerate(tools):
        tool.locator(".tinyllama-out-status", has_text="ended").wait_for()
        assert tool.locator(TEXT).text_content() == STORY + tinyllama.generate(STORY, seed=seed)
    a_kernel_that_is_shut_down_in_the_middle_of_a_run_is_gone(tools[1], lab)


def a_kernel_that_is_shut_down_in_the_middle_of_a_run_is_gone(tool, lab):
    tool.locator(".tinyllama-in-backend select").select_option(label="numpy")
    generate(tool, STORY * 3, n_predict=-1)
    tool.locator(f"{TEXT} .tinyllama-completion").nth(5).wait_for()
    children = psutil.Process(lab.pid).children()
    kernels = [process for process in children if "ipykernel" in str(process.cmdline())]
    assert kernels
    lab.shut_down_kernels()
    assert psutil.wait_procs(kernels, timeout=15)[1] == []


def every_control_has_a_name(page):
    nameless = page.evaluate(
        """() => [...document.querySelectorAll(
            ".tinyllama button, .tinyllama input, .tinyllama select, .tinyllama textarea, "
            + ".tinyllama [role=slider], .tinyllama [role=listbox], .tinyllama [role=application],"
            + ".tinyllama [role=grid]")]
          .filter((e) => !(e.labels?.length || e.getAttribute("aria-label") || e.textContent.trim()))
          .map((e) => e.outerHTML)"""
    )
    assert nameless == []
