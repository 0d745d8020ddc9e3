"""The panel of experiments in a tool, without a browser."""

import pytest

import tinyllama
from tinyllama.errors import TinyllamaError

pytest.importorskip("anywidget")
w = pytest.importorskip("ipywidgets")

from tinyllama.lab.widgets.controls import Tool  # noqa: E402
from tinyllama.lab.widgets.experiment import Change, Here, Side, run  # noqa: E402
from tinyllama.lab.widgets.experiment_view import ExperimentPanel  # noqa: E402
from tinyllama.lab.widgets.worker import Worker  # noqa: E402

GIRL = "Once upon a time there was a girl named Lily. One day,"
BOY = "Once upon a time there was a boy named Tim. One day,"


class Stand(Tool):
    """A tool that stands in a model and shows nothing but the panel."""

    def __init__(self, **state):
        super().__init__("stand", Worker(self.refresh), "Run", "")
        config = tinyllama.load("small", "numpy").config
        self.here = Here(GIRL, "small", "numpy", config, "layers.2.residual", 2, 3, 10)
        self.inputs["prompt"] = w.Text(GIRL)
        self.panel = ExperimentPanel(self, lambda: self.here, **state)
        self.show(self.inputs["prompt"], self.panel, *self.outputs.values())

    def start(self):
        """Nothing is to be run."""

    def update(self):
        self.panel.update()


@pytest.fixture
def tool():
    return Stand()


def finished(tool):
    assert tool.worker.wait(30)
    return tool.panel


def is_shown(widget):
    return widget.layout.display is None


def test_nothing_is_run_before_something_is_changed(tool):
    assert tool.panel.sides is None and not tool.worker.busy and is_shown(tool.panel.outputs["hint"])
    assert not is_shown(tool.panel._results) and tool.panel.state() == {}


def test_a_head_is_switched_off_and_its_answer_stands_beside_the_one_as_it_is(tool):
    button = tool.panel.buttons["head_off"]
    assert button.description == "Switch off head 3 of layer 2"
    button.click()
    panel, llama = finished(tool), tinyllama.load("small", "numpy")
    left = llama.generate(GIRL, n_predict=16, temp=0)
    with llama.edit(tinyllama.ablate("layers.2.attention.heads", heads=[3])):
        right = llama.generate(GIRL, n_predict=16, temp=0)
    assert left in panel.outputs["left"].value and "As it is" in panel.outputs["left"].value
    assert right in panel.outputs["right"].value and "With 1 change<" in panel.outputs["right"].value
    assert panel.outputs["likeliest"].value.count("<tr>") == 11
    frame = panel.outputs["differences"].frame
    assert (frame["n_rows"], frame["n_columns"]) == (15, 4) and "most in layer" in frame["title"]
    (code,) = panel.copies.values()
    assert code == panel.outcomes[1].code and "change of its logit" in panel.outputs["likeliest"].value
    assert panel.state() == {"changes": [{"at": "layers.2.attention.heads", "heads": [3]}]}


def test_a_layer_s_parts_are_switched_off_and_a_change_is_removed(tool):
    for name in ("attention_off", "feed_forward_off"):
        tool.panel.buttons[name].click()
    panel = finished(tool)
    assert panel.changes == [Change(f"layers.2.{part}.output") for part in ("attention", "feed_forward")]
    assert "With 2 changes" in panel.outputs["right"].value
    first, second = panel.outputs["changes"].children
    assert "layers.2.attention.output = 0" in first.children[1].value
    first.children[0].click()
    assert finished(tool).changes == [Change("layers.2.feed_forward.output")]
    assert panel.outputs["changes"].children == (second,)
    second.children[0].click()
    assert finished(tool).sides is None and not is_shown(panel._results)


def test_a_value_is_set_scaled_and_patched_where_one_stands(tool):
    panel = tool.panel
    panel.buttons["patch"].click()
    assert panel.changes == [] and "the second prompt is empty" in panel.outputs["error"].value
    panel.inputs["second"].value = BOY
    panel.inputs["where"].value, panel.inputs["dim"].value, panel.inputs["number"].value = False, 7, 2.5
    assert panel.buttons["set"].description == "Set it to 2.5"
    patches = "Patch all of layers.2.residual, token 10 from the second prompt"
    assert panel.buttons["patch"].description == patches
    assert "<code>layers.2.residual, dim 7, token 10</code>" in panel.outputs["value"].value
    for name in ("set", "scale", "patch"):
        panel.buttons[name].click()
    place = {"at": "layers.2.residual", "positions": [10]}
    assert [one.keywords() for one in finished(tool).changes] == [
        place | {"dims": [7], "value": 2.5},
        place | {"dims": [7], "times": 2.5},
        place | {"prompt": BOY},
    ]
    expected = run(Side(GIRL, "small", "numpy", tuple(panel.changes)))
    assert panel.outcomes[1].text == expected.text and panel.outcomes[1].code == expected.code
    assert "tinyllama.patch(" in panel.outputs["code"].value


def test_what_is_copied_is_of_what_is_chosen_now(tool):
    tool.panel.buttons["head_off"].click()
    (first,) = finished(tool).copies.values()
    tool.panel.changes.append(Change("layers.1.residual", positions=[99]))
    tool.refresh()
    assert finished(tool).copies == {}  # it was refused
    tool.panel.changes = [Change("layers.1.attention.output")]
    tool.refresh()
    (second,) = finished(tool).copies.values()
    assert "layers.1.attention.output" in second and "layers.1.attention.output" not in first


def test_the_status_says_what_runs_after_a_model_was_loaded(tool):
    told = []
    tool.worker.tell = lambda: told.append(tool.worker.doing)
    tool.panel.buttons["head_off"].click()
    finished(tool)
    assert told and set(told) <= {"Running the prompt as it is", "Running what is on the right"}


def test_a_value_is_set_to_its_mean(tool):
    tool.panel.buttons["mean"].click()
    assert finished(tool).changes == [Change("layers.2.residual", value="mean")] and tool.panel.outcomes


def test_what_another_model_does_not_have_is_an_error_with_its_name(smollm2_file):
    tool = Stand(other=str(smollm2_file), changes=[{"at": "layers.1.attention.q", "dims": [100]}])
    assert f"{smollm2_file.name}: edit of layers.1" in finished(tool).outputs["error"].value


def test_an_answer_that_ends_at_once_says_so(tool):
    end = tinyllama.load("small", "numpy").tokenizer.eos_id
    logits = {"at": "logits", "dims": [end], "value": 99.0}
    panel = finished(Stand(changes=[logits]))
    assert "the model ended the text" in panel.outputs["right"].value
    assert "the model ended the text" not in panel.outputs["left"].value


def test_a_second_prompt_stands_on_the_right(tool):
    tool.panel.inputs["second"].value = BOY
    assert tool.panel.sides is None
    tool.panel.inputs["beside"].value = "second"
    panel = finished(tool)
    assert "With the second prompt" in panel.outputs["right"].value
    assert panel.outcomes[1].text == tinyllama.generate(BOY, backend="numpy", n_predict=16, temp=0)
    rows = panel.outputs["differences"].frame["rows"]
    assert rows[10] == "␣Lily / ␣Tim" and rows[-1] == ","


def test_a_second_model_stands_on_the_right(smollm2_file):
    panel = finished(Stand(other=str(smollm2_file), n_predict=3))
    assert f"With {smollm2_file.name}" in panel.outputs["right"].value
    assert not is_shown(panel.outputs["differences"]) and "its logit" not in panel.outputs["likeliest"].value


def test_it_opens_in_the_state_that_it_says(tool):
    tool.panel.buttons["head_off"].click()
    tool.panel.inputs["second"].value, tool.panel.inputs["beside"].value = BOY, "second"
    tool.panel.inputs["n_predict"].value = 5
    first, again = finished(tool), finished(Stand(**tool.panel.state()))
    assert again.sides == first.sides and again.state() == first.state()
    assert again.outcomes[1].text == first.outcomes[1].text and len(again.outcomes[1].text.tokens) == 5


def test_what_is_refused_is_an_error_in_the_tool_and_can_be_taken_back(tool):
    tool.panel.inputs["dim"].value = 9999
    tool.panel.buttons["set"].click()
    panel = finished(tool)
    assert "is not in 0..255" in panel.outputs["error"].value and is_shown(panel.buttons["compare"])
    assert not is_shown(panel._results) and tool.outputs["error"].value == ""
    panel.outputs["changes"].children[0].children[0].click()
    assert finished(tool).changes == [] and not is_shown(panel.buttons["compare"])
    assert panel.outputs["error"].value == ""


def test_a_run_that_was_stopped_can_be_started_again(tool):
    tool.panel.inputs["n_predict"].value = 2000
    tool.panel.buttons["head_off"].click()
    tool.worker.stop()
    panel = finished(tool)
    assert not panel.outcomes and is_shown(panel.buttons["compare"])
    assert "stopped: Compare runs it again" in panel.outputs["error"].value and panel.copies == {}
    panel.inputs["n_predict"].value = 4
    assert len(finished(tool).outcomes) == 2 and panel.outputs["error"].value == ""
    panel._again()
    assert len(finished(tool).outcomes[1].text.tokens) == 4


def test_where_one_stands_somewhere_else_or_nowhere_yet_the_buttons_say_so(tool):
    tool.here = Here(GIRL, "small", "numpy", tool.here.config, "embedding", 1, 5, 0)
    tool.refresh()
    assert tool.panel.buttons["head_off"].description == "Switch off head 5 of layer 1"
    assert "<code>embedding</code>" in tool.panel.outputs["value"].value
    tool.here = None
    tool.refresh()
    assert all(tool.panel.buttons[name].disabled for name in ("head_off", "set", "patch"))


def test_another_prompt_is_compared_as_soon_as_it_is_there(tool):
    tool.panel.buttons["head_off"].click()
    finished(tool)
    tool.here = Here(BOY, "small", "numpy", tool.here.config, "layers.2.residual", 2, 3, 10)
    tool.refresh()
    assert "Tim" in finished(tool).outputs["left"].value


def test_a_state_that_makes_no_sense_is_refused():
    with pytest.raises(TinyllamaError, match="a change is a dict"):
        Stand(changes=[{"at": "layers.0.residual", "head": 3}])
    with pytest.raises(TinyllamaError, match="beside is 'left', but must be one of changes, second"):
        Stand(beside="left")
    for name, wrong in [("n_predict", -5), ("n_predict", "a"), ("second", 3), ("other", 3)]:
        with pytest.raises(TinyllamaError, match=f"{name} is {wrong!r}, but must be"):
            Stand(**{name: wrong})
