"""The stepper's widgets, without a browser."""

from html import escape

import pytest

import tinyllama
from tinyllama.lab.widgets.kinds import KINDS

pytest.importorskip("anywidget")
pytest.importorskip("ipywidgets")


def finished(tool):
    assert tool.worker.wait(30)
    return tool


@pytest.fixture
def tool():
    return finished(tinyllama.stepper("Once upon a time", backend="numpy"))


def test_it_stands_at_the_embedding_once_the_prompt_has_been_read(tool):
    assert "Step 1 of" in tool.outputs["status"].value and "<h3>Embedding</h3>" in tool.outputs["what"].value
    assert tool.buttons["Previous"].disabled and not tool.buttons["Next"].disabled


def test_every_step_can_be_shown(tool):
    titles = set()
    for _ in tool.walk.names:
        titles.add(tool.walk.kind)
        assert escape(KINDS[tool.walk.kind].title) in tool.outputs["what"].value
        assert "<mark>" in tool.outputs["code"].value and tool.outputs["map"].frame["n_rows"] == 5
        assert len(tool.outputs["map"].values) == 4 * 5 * tool.outputs["map"].frame["n_columns"]
        tool.buttons["Next"].click()
    assert titles == set(KINDS) and tool.buttons["Next"].disabled


def test_sliders_and_list_go_to_a_step(tool):
    tool.inputs["kind"].value = "attention.weights"
    for name, value in {"layer": 2, "head": 3, "position": 1}.items():
        tool.inputs[name].value = value
    assert tool.walk.name == "layers.2.attention.weights"
    assert (tool.walk.head, tool.walk.position) == (3, 1)
    assert tool.outputs["map"].frame["title"].startswith("layers.2.attention.weights, head 3")
    assert tool.outputs["map"].frame["row"] == tool.outputs["tokens"].selected == 1


def test_sliders_follow_the_steps(tool):
    for _ in range(21):
        tool.buttons["Next"].click()
    assert tool.inputs["layer"].value == 1 and tool.inputs["kind"].value == tool.walk.kind == "attention.v"


def test_after_each_layer_it_is_told_what_the_model_would_say(tool):
    assert "No layer is complete yet" in tool.outputs["says"].value
    tool.inputs["layer"].value = 2
    tool.inputs["kind"].value = "residual"
    assert [f"layer {n}<" in tool.outputs["says"].value for n in range(4)] == [True, True, True, False]
    tool.inputs["kind"].value = "logits"
    assert "layer 3<" in tool.outputs["says"].value


def test_a_prompt_that_is_sent_while_another_is_on_its_way_takes_its_place():
    tool = tinyllama.stepper("Once upon a time", backend="numpy")
    tool.inputs["prompt"].value = "The wolf"
    tool.start()
    assert "".join(finished(tool).walk.pieces) == "<s> The wolf"


def test_a_missing_model_is_an_error_in_the_tool_and_the_old_walk_stays(tool):
    tool.inputs["model"].options = [("gone", "gone.gguf"), ("small", "small")]
    tool.buttons["Run"].click()
    assert "gone.gguf: there is no such file" in finished(tool).outputs["error"].value
    assert tool.walk is not None
    tool.inputs["model"].value, tool.inputs["prompt"].value = "small", "The wolf"
    tool.buttons["Run"].click()
    assert finished(tool).outputs["error"].value == "" and "".join(tool.walk.pieces) == "<s> The wolf"
