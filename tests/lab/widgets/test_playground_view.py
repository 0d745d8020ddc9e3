"""The widgets on top of the state, without a browser: what a click does, and what is then shown."""

import json

import numpy as np
import pytest

import tinyllama
from tinyllama.errors import TinyllamaError
from tinyllama.texts.drafts import Pace

pytest.importorskip("anywidget")
pytest.importorskip("ipywidgets")

STORY = "Once upon a time"


@pytest.fixture
def tool():
    return tinyllama.playground(prompt=STORY, seed=3, n_predict=20, backend="numpy", threads=1)


def finished(tool):
    assert tool.worker.wait(30)
    return tool


def test_generate_writes_with_the_settings_that_are_shown(tool):
    tool.buttons["Generate"].click()
    text = tinyllama.generate(STORY, seed=3, n_predict=20, backend="numpy", threads=1)
    assert "".join(finished(tool).outputs["text"].text["texts"]) == STORY + text
    assert eval(tool.outputs["keys"].copies["Copy as tinyllama.generate(…)"]) == text
    assert tool.outputs["keys"].copies["Copy as text"] == STORY + text


def test_ctrl_enter_generates_and_escape_stops(tool):
    tool.inputs["n_predict"].value = -1
    tool.outputs["keys"].act("generate")
    tool.outputs["keys"].act("stop")
    assert finished(tool).session.run is None or tool.session.run.completion.stop_reason == "cancelled"


def test_ctrl_enter_waits_for_a_prompt_that_is_still_on_its_way(tool):
    tool.outputs["keys"].act("generate", "A dog")
    assert not tool.worker.busy and tool.session.run is None
    tool.inputs["prompt"].value = "A dog"
    assert finished(tool).session.run.prompt == "A dog"


def test_buttons_are_enabled_when_they_do_something(tool):
    buttons = [tool.buttons[name] for name in ("Generate", "Stop", "Continue")]
    assert [button.disabled for button in buttons] == [False, True, True]
    tool.buttons["Generate"].click()
    assert [button.disabled for button in buttons] == [True, False, True]
    finished(tool)
    assert [button.disabled for button in buttons] == [False, True, False]


def test_a_prompt_that_is_too_long_is_refused_in_a_line(tool):
    tool.inputs["prompt"].value = "a word " * 500_000
    tool.buttons["Generate"].click()
    assert "the context is full: the prompt has 3500000 characters" in finished(tool).outputs["error"].value


def test_a_click_on_a_token_shows_alternatives_and_one_can_be_picked(tool):
    tool.buttons["Generate"].click()
    finished(tool)
    tool.outputs["text"].act("select", 7)
    other = next(row for row in tool.outputs["alternatives"].report["rows"] if not row["is_chosen"])
    tool.outputs["alternatives"].act("pick", other["id"])
    assert finished(tool).session.run.tokens[7].id == other["id"]
    assert tool.outputs["text"].text["changed"] == 7 and tool.outputs["alternatives"].report == {}


def test_two_runs_stand_side_by_side(tool):
    for seed in (1, 2):
        tool.inputs["seed"].value = seed
        tool.buttons["Generate"].click()
        finished(tool)
    assert [number for _, number in tool.inputs["history"].options] == [0, 2, 1]
    assert tool.inputs["history"].value == 2 and len(tool.outputs["texts"].children) == 1
    tool.inputs["other"].value = 1
    assert len(tool.outputs["texts"].children) == 2
    assert tool.outputs["other"].text["run"] == 1 and "differs" in tool.outputs["settings"].value
    tool.inputs["history"].value = 1
    assert tool.session.run.number == 1


def test_an_error_is_shown_and_the_next_run_takes_it_away(tool):
    tool.inputs["prompt"].value = "<b>"
    tool.inputs["backend"].options = ["abacus", "numpy"]
    tool.buttons["Generate"].click()
    assert "no backend &#x27;abacus&#x27;" in finished(tool).outputs["error"].value
    tool.inputs["backend"].value = "numpy"
    tool.buttons["Generate"].click()
    assert finished(tool).outputs["error"].value == ""


def test_tokens_that_were_guessed_can_be_tinted(monkeypatch):
    note = Pace.note  # a pass takes a second, whatever it computes: guesses pay
    monkeypatch.setattr(Pace, "note", lambda self, n_tokens, _: note(self, n_tokens, 1.0))
    tool = tinyllama.playground(prompt="a b " * 30, seed=3, n_predict=60, temp=0, draft_lookup=True)
    tool.inputs["repeat_penalty"].value = 0.7  # so that the text repeats itself
    for _ in range(3):  # the first of them measures what passes take
        tool.buttons["Generate"].click()
        text = finished(tool).outputs["text"].text
    assert len(text["drafted"]) == len(text["texts"]) and not any(text["drafted"][: text["n_prompt"]])
    assert sum(text["drafted"]) == tool.session.run.completion.timings.n_accepted > 0
    assert "draft_lookup=True" in tool.outputs["keys"].copies["Copy as tinyllama.generate(…)"]
    tool.inputs["tint_drafted"].value = True
    assert tool.outputs["text"].tint_drafted and not tool.outputs["text"].tint


def test_what_a_clicked_token_attended_to_is_tinted_by_layer(tool):
    tool.inputs["attend"].value = True
    assert "Click a token" in tool.outputs["attention"].value
    tool.buttons["Generate"].click()
    finished(tool).outputs["text"].act("select", 9)
    found = finished(tool).session.attention
    assert found.shape == (4, 9) and len(tool.inputs["layers"].options) == 5
    np.testing.assert_allclose(tool.outputs["text"].attention["shares"], found.mean(axis=0), atol=1e-4)
    tool.inputs["layers"].value = 2
    np.testing.assert_allclose(tool.outputs["text"].attention["shares"], found[2], atol=1e-4)
    assert tool.outputs["text"].attention["levels"][0] == 0 and "it gets" in tool.outputs["attention"].value
    tool.inputs["sinks"].value = True
    assert tool.outputs["text"].attention["levels"][0] > 0
    tool.inputs["attend"].value = False
    assert tool.outputs["text"].attention == {}


def test_the_four_prompts_are_a_click_away(tool):
    examples = tool.examples[0].children
    assert len(examples) == 4
    examples[2].click()
    assert tool.inputs["prompt"].value == "def open_and_return_content(filename):"


def test_stop_strings_and_context_are_taken_as_they_are_typed(tool):
    tool.inputs["stops"].value, tool.inputs["ctx_size"].value = "little\n\\n", 100
    tool.buttons["Generate"].click()
    settings = finished(tool).session.run.completion.settings
    assert settings["stop"] == ("little", "\n") and settings["ctx_size"] == 100
    assert tinyllama.playground(stop="\n").inputs["stops"].value == "\\n"


def test_a_run_can_be_named_and_all_be_saved(tool, monkeypatch):
    assert tool.outputs["keys"].save == ""
    tool.buttons["Generate"].click()
    finished(tool).inputs["name"].value = "the first"
    assert tool.inputs["history"].options[1] == ("1: the first", 1)
    sent = []
    monkeypatch.setattr(tool.outputs["keys"], "send", sent.append)
    tool.outputs["keys"].act("save")
    ((run,),) = [json.loads(file["content"]) for file in sent]
    assert run["name"] == "the first" and run["text"] == tool.session.run.text


def test_settings_are_folded_away_until_they_are_asked_for(tool):
    def is_shown(name):
        return next(box for box in tool.children if tool.inputs[name] in getattr(box, "children", ())).layout

    assert is_shown("temp").display == "none"
    tool.inputs["more"].value = True
    assert is_shown("temp").display is None


def test_clear_takes_the_text_away(tool):
    tool.buttons["Generate"].click()
    finished(tool)
    tool.buttons["Clear"].click()
    assert (
        tool.outputs["text"].text == {}
        and tool.outputs["settings"].value == ""
        and tool.outputs["keys"].copies == {}
    )
    assert len(tool.inputs["history"].options) == 2


def test_all_that_is_sent_to_the_page_is_json(tool):
    tool.inputs["attend"].value = True
    tool.buttons["Generate"].click()
    finished(tool)
    tool.outputs["text"].act("select", 7)
    finished(tool)
    for state in (
        tool.outputs["text"].text,
        tool.outputs["text"].attention,
        tool.outputs["alternatives"].report,
        tool.outputs["keys"].copies,
    ):
        json.dumps(state, allow_nan=False)


def test_a_model_that_is_not_listed_can_be_asked_for():
    assert tinyllama.playground("some/where.gguf").inputs["model"].value == "some/where.gguf"


def test_a_setting_without_a_control_is_refused():
    with pytest.raises(TinyllamaError, match="no control for 'remember'"):
        tinyllama.playground(remember=False)


def test_without_widgets_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr("tinyllama.lab.widgets.find_spec", lambda name: name != "anywidget" or None)
    with pytest.raises(TinyllamaError, match=r"anywidget missing: `pip install tinyllama-lab\[notebooks\]`"):
        tinyllama.playground()


def test_a_cell_that_runs_again_stops_the_playground_it_showed_before(monkeypatch):
    class Shell:
        request = "1"

        def get_parent(self):
            return {"metadata": {"cellId": "a"}, "header": {"msg_id": self.request}}

    shell = Shell()
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    first, beside = tinyllama.playground(), tinyllama.playground()
    for tool in (first, beside):
        tool.inputs["prompt"].value, tool.inputs["n_predict"].value = STORY, -1
        tool.buttons["Generate"].click()
    shell.request = "2"
    again = tinyllama.playground()
    for tool in (first, beside):
        assert tool.session.worker.wait(30) and tool.comm is None
    assert again.comm is not None
