"""The page of `tinyllama serve` as a person meets it, in a browser."""

import json
from contextlib import ExitStack
from pathlib import Path

import pytest
from lab import CHROMIUM, browser, served

import tinyllama
from tinyllama.lab.widgets.report import percent

pytest.importorskip("playwright")
pytestmark = pytest.mark.browser

STORY = "Once upon a time"
CHAT = "**/v1/chat/completions"


@pytest.fixture
def start(tmp_path):
    """A function: a server of the small model with these options; gives its address and its process."""
    with ExitStack() as stack:
        yield lambda *options: stack.enter_context(served(tmp_path / "log", "-m", "small", *options))


@pytest.fixture(scope="module")
def chromium():
    if not Path(CHROMIUM).exists():
        pytest.fail(f"no browser at {CHROMIUM}; on Debian `apt-get install chromium`, or set CHROMIUM")
    with browser() as chromium:
        yield chromium


@pytest.fixture
def opened(chromium):
    """Opens a page; afterwards the console must hold no error but of answers that are meant to fail."""
    errors, contexts = [], []

    def opened(url: str, **options):
        contexts.append(chromium.new_context(viewport={"width": 1280, "height": 800}, **options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: message.type == "error" and errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on(
            "request", lambda request: request.url.startswith((url, "data:")) or errors.append(request.url)
        )
        page.goto(url)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert [error for error in errors if not error.startswith("Failed to load resource")] == []


def settle(page, **settings) -> None:
    page.locator("#input:not([disabled])").wait_for()
    page.locator("summary").click()
    for name, value in settings.items():
        page.locator(f"[name={name}]").fill(str(value))
    page.locator("summary").click()


def say(page, text: str, keys: str = "Enter") -> None:
    page.locator("#input").fill(text)
    page.locator("#input").press(keys)


def wait(page, n: int) -> None:
    """Until so many turns are there and nothing runs."""
    page.locator(f"article >> nth={n - 1}").wait_for()
    page.locator("#stop[disabled]").wait_for(timeout=60_000)


def answer_with(page, url: str, choice: dict) -> None:
    """From now on the page gets this answer, in one event."""
    body = f"data: {json.dumps({'choices': [choice]})}\n\ndata: [DONE]\n\n"
    page.route(url, lambda route: route.fulfill(body=body))


def test_a_chat_whose_tokens_are_looked_at_and_that_is_changed(start, opened):
    page = opened(start("--chat-template", "chatml")[0], permissions=["clipboard-read", "clipboard-write"])
    settle(page, max_tokens=12, seed=1)
    say(page, "Hi")
    wait(page, 2)
    how = {"chat_template": "chatml", "n_predict": 12, "seed": 1, "temp": 0.8, "top_p": 0.9}
    answer = tinyllama.load("small").chat([{"role": "user", "content": "Hi"}], **how)
    tokens = page.locator(".tokens")
    assert tokens.text_content() == answer == page.locator("article .unseen").text_content()
    assert tokens.locator("span").count() == len(answer.tokens)
    page.get_by_role("button", name="Copy").click()
    page.get_by_role("button", name="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == answer
    shows_alternatives_by_mouse_and_keyboard(page, answer)
    edits_a_message_and_asks_again(page)
    every_control_has_a_name(page)
    page.locator("#clear").click()
    assert page.locator("article").count() == 0


def shows_alternatives_by_mouse_and_keyboard(page, answer):
    page.locator(".tokens span").nth(2).click()
    assert page.locator("#alternatives tr").count() in (5, 6)
    assert f"Probability {percent(answer.tokens[2].prob)}, " in page.locator(".facts").text_content()
    page.locator(".tokens").press("ArrowRight")
    selected = page.locator("[aria-selected=true]")
    assert selected.get_attribute("data-index") == "3"
    assert page.locator(".tokens").get_attribute("aria-activedescendant") == selected.get_attribute("id")
    assert "Instead:" in page.locator("#said").text_content()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # Close
    assert page.locator("#alternatives").is_hidden()
    assert page.evaluate("document.activeElement.className") == "tokens"
    for _ in range(4):
        page.keyboard.press("Shift+Tab")  # back over New answer, Copy and Edit: no trap
    assert page.evaluate("document.activeElement.closest('header') !== null")


def edits_a_message_and_asks_again(page):
    say(page, "More")
    wait(page, 4)
    page.get_by_role("button", name="Edit").first.click()
    area = page.get_by_label("Your message")
    assert area.input_value() == "Hi"
    area.fill("Hello")
    with page.expect_request(CHAT) as asked:
        area.press("Control+Enter")
    assert asked.value.post_data_json["messages"] == [{"role": "user", "content": "Hello"}]
    wait(page, 2)
    assert page.locator("article").count() == 2
    with page.expect_request(CHAT):
        page.get_by_role("button", name="New answer").click()
    wait(page, 2)


def test_a_completion_that_is_stopped_and_the_dark_theme(start, opened):
    page = opened(start("--backend", "numpy")[0], color_scheme="dark")
    settle(page, max_tokens=2000, temperature=1.2, top_p=1)
    assert page.locator("[value=chat]").is_disabled() and page.locator("[value=completion]").is_checked()
    say(page, STORY * 3, "Control+Enter")
    page.locator(".tokens span").nth(5).wait_for()
    page.keyboard.press("Escape")
    page.locator(".note", has_text="stopped").wait_for()
    assert page.locator("#stop").is_disabled()
    ground, text = page.evaluate(
        "(({backgroundColor, color}) => [backgroundColor, color])(getComputedStyle(document.body))"
    )
    assert (ground, text) == ("rgb(17, 17, 17)", "rgb(236, 236, 236)")
    assert page.locator(".tokens [class^=tint]").count()
    settle(page, max_tokens=8, seed=5, temperature=0.8, top_p=0.9)
    say(page, STORY, "Control+Enter")
    wait(page, 2)
    page.locator(".note", has_text="seed 5").wait_for()
    assert page.locator(".tokens").text_content() == tinyllama.generate(STORY, n_predict=8, seed=5)


def test_what_goes_wrong_is_said_in_a_line(start, opened):
    url, process = start("--chat-template", "chatml", "--api-key", "sésame")
    page = opened(url)
    for key in ("wrong", "sésame"):
        page.get_by_label("API key of this server").fill(key)
        page.keyboard.press("Enter")
    settle(page, temperature=-1)
    error = page.locator("#error")
    say(page, "Hi")
    error.get_by_text("400: temperature").wait_for()
    settle(page, temperature=1)
    busy = {"error": {"message": "too many texts are waiting"}}
    page.route(CHAT, lambda route: route.fulfill(status=429, json=busy))
    error.get_by_role("button").click()
    error.get_by_text("429: too many texts are waiting").wait_for()
    page.unroute(CHAT)
    answer_with(page, CHAT, {"delta": {}, "seed": 1, "finish_reason": "stop", "logprobs": None})
    error.get_by_role("button").click()
    page.locator(".note", has_text="The answer is empty").wait_for()
    assert error.text_content() == ""
    page.unroute(CHAT)
    process.kill()
    process.wait()
    say(page, "Are you there?")
    error.get_by_text("The server can't be reached.").wait_for()
    assert page.locator("#send").is_enabled()


def test_characters_of_several_tokens_and_numbers_stand_in_their_places(start, opened):
    page = opened(start("--chat-template", "chatml")[0])
    page.locator("#input:not([disabled])").wait_for()
    tokens, offsets = [b"a", b"\xf0\x9f", b"\xa6\xa6", b"1"], [0, 1, 1, 2]
    top = [{"token": "a", "logprob": -1.0}, {"token": "1", "logprob": -2.0}]
    pieces = ["a", "\\xf0\\x9f", "\\xa6\\xa6", "1"]
    content = [
        {"token": piece, "bytes": [*token], "logprob": -1.0, "top_logprobs": top}
        for piece, token in zip(pieces, tokens, strict=True)
    ]
    listed = {"tokens": pieces, "token_logprobs": [-1.0] * 4, "text_offset": offsets}
    listed["top_logprobs"] = [{"a": -1.0, "1": -2.0}] * 4
    spoken = {CHAT: {"delta": {"content": "a🦦1"}, "logprobs": {"content": content}}}
    spoken |= {"**/v1/completions": {"text": "a🦦1", "logprobs": listed}}
    for url, choice in spoken.items():
        answer_with(page, url, choice | {"finish_reason": "stop", "seed": 1})
        say(page, "Hi", "Control+Enter")
        wait(page, 2)
        assert page.locator(".tokens span").all_text_contents() == ["a", "", "🦦", "1"]
        page.locator(".tokens").press("Home")
        assert page.locator("#alternatives code").all_text_contents() == ["a", "a", "1"]
        page.locator("[value=completion]").check()


def every_control_has_a_name(page):
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea, [role=listbox]")]
          .filter((e) => !(e.labels?.length || e.getAttribute("aria-label") || e.textContent.trim()))
          .map((e) => e.outerHTML)"""
    )
    assert nameless == []
