"""The stepper's widgets, without a browser."""

from html import escape

import pytest

import tinyllama
from tinyllama.lab.widgets.kinds import KINDS

pytest.importorskip("anywidget")
pytest.importorskip("ipywidgets")


def finished(tool):
    assert tool.worker.wait(30)
    tool._refresh()
    return tool


@pytest.fixture
def tool():
    return finished(tinyllama.stepper("Once upon a time", backend="numpy"))


def test_it_stands_at_the_embedding_once_the_prompt_has_been_read(tool):
    assert "Step 1 of" in tool._status.value and "<h3>Embedding</h3>" in tool._what.value
    assert tool._previous.disabled and not tool._next.disabled


def test_every_step_can_be_shown(tool):
    titles = set()
    for _ in tool.walk.names:
        titles.add(tool.walk.kind)
        assert escape(KINDS[tool.walk.kind].title) in tool._what.value
        assert "<mark>" in tool._code.value and tool._map.frame["n_rows"] == 5
        assert len(tool._map.values) == 4 * 5 * tool._map.frame["n_columns"]
        tool._next.click()
    assert titles == set(KINDS) and tool._next.disabled


def test_sliders_and_list_go_to_a_step(tool):
    tool._kind.value = "attention.weights"
    tool._layer.value, tool._head.value, tool._position.value = 2, 3, 1
    assert tool.walk.name == "layers.2.attention.weights"
    assert (tool.walk.head, tool.walk.position) == (3, 1)
    assert tool._map.frame["title"].startswith("layers.2.attention.weights, head 3")
    assert tool._map.frame["row"] == tool._tokens.selected == 1


def test_sliders_follow_the_steps(tool):
    for _ in range(20):
        tool._next.click()
    assert tool._layer.value == 1 and tool._kind.value == tool.walk.kind == "attention.v"


def test_after_each_layer_it_is_told_what_the_model_would_say(tool):
    assert "No layer is complete yet" in tool._says.value
    tool._layer.value = 2
    tool._kind.value = "residual"
    assert [f"layer {n}<" in tool._says.value for n in range(4)] == [True, True, True, False]
    tool._kind.value = "logits"
    assert "layer 3<" in tool._says.value


def test_a_prompt_that_is_sent_while_another_is_on_its_way_takes_its_place():
    tool = tinyllama.stepper("Once upon a time", backend="numpy")
    tool.prompt.value = "The wolf"
    tool.read()
    assert "".join(finished(tool).walk.pieces) == "<s> The wolf"


def test_a_missing_model_is_an_error_in_the_tool_and_the_old_walk_stays(tool):
    tool.model.options = [("gone", "gone.gguf"), ("small", "small")]
    tool._run.click()
    assert "gone.gguf: there is no such file" in finished(tool)._error.value
    assert tool.walk is not None
    tool.model.value, tool.prompt.value = "small", "The wolf"
    tool._run.click()
    assert finished(tool)._error.value == "" and "".join(tool.walk.pieces) == "<s> The wolf"
