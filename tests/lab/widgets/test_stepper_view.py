"""The stepper's widgets, without a browser."""

from html import escape

import numpy as np
import pytest

import tinyllama
from tinyllama.errors import TinyllamaError
from tinyllama.lab.widgets.kinds import KINDS
from tinyllama.machine.download import small_folder

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


def shown(tool) -> set[str]:
    """The outputs that one sees."""
    return {name for name, output in tool.outputs.items() if output.layout.display != "none"}


def test_every_step_can_be_shown(tool):
    titles = set()
    for name in tool.walk.names:
        titles.add(tool.walk.kind)
        assert escape(KINDS[tool.walk.kind].title) in tool.outputs["what"].value
        assert "<mark>" in tool.outputs["code"].value
        if name != "logits":
            frame = tool.outputs["map"].frame
            assert "map" in shown(tool) and "next" not in shown(tool)
            assert frame["n_rows"] == 5 and frame["title"].startswith(name)
            assert len(tool.outputs["map"].values) == 4 * 5 * frame["n_columns"]
        tool.buttons["Next"].click()
    assert titles == set(KINDS) and tool.buttons["Next"].disabled


def test_logits_are_shown_as_the_ten_likeliest_tokens(tool):
    tool.inputs["kind"].value = "logits"
    assert "next" in shown(tool) and "map" not in shown(tool)
    rows = tool.outputs["next"].report["rows"]
    logits = tinyllama.load("small", "numpy").logits("Once upon a time")[-1]
    assert [row["id"] for row in rows] == np.argsort(-logits)[:10].tolist()
    assert rows[0]["cells"][1] == f"{logits.max():.2f}"


def test_a_token_that_is_taken_is_behind_the_prompt(tool):
    tool.inputs["kind"].value = "logits"
    token, before = tool.outputs["next"].report["rows"][1]["id"], tool.walk.tokens
    tool.outputs["next"].act("pick", token)
    assert finished(tool).walk.tokens == [*before, token] and tool.walk.position == 5
    assert tool.walk.kind == "logits" and tool.inputs["prompt"].value == tool.walk.text
    assert "old" not in shown(tool)


def test_a_token_is_taken_by_its_id_though_its_text_would_be_another(tool):
    llama = tinyllama.load("small", "numpy")
    tool.inputs["position"].value = 3  # of " a"
    token = llama.tokenizer.vocabulary.pieces.index("n")  # " an" is one token
    tool.outputs["next"].act("pick", token)
    ids = finished(tool).walk.tokens
    assert ids == [*llama.tokens("Once upon a"), token] and "old" not in shown(tool)
    assert tool.inputs["prompt"].value == "Once upon an" and ids != llama.tokens("Once upon an")
    tool.buttons["Run"].click()
    assert finished(tool).walk.tokens == ids
    tool.inputs["model"].options = [("other", str(small_folder())), ("small", "small")]
    tool.inputs["model"].value = str(small_folder())
    tool.buttons["Run"].click()
    assert finished(tool).walk.tokens == llama.tokens("Once upon an")  # ids are of one vocabulary


def test_a_changed_prompt_model_or_backend_marks_what_is_shown_as_old(tool):
    assert "old" not in shown(tool)
    tool.inputs["prompt"].value = "The wolf"
    assert "of the earlier prompt: Run" in tool.outputs["old"].value and "old" in shown(tool)
    tool.inputs["prompt"].value = ""
    assert "of the earlier prompt.<" in tool.outputs["old"].value
    tool.inputs["prompt"].value = "The wolf"
    tool.inputs["backend"].value = "auto"
    assert "of the earlier prompt and backend: " in tool.outputs["old"].value
    assert "tinyllama-old" in tool._dom_classes
    tool.buttons["Run"].click()
    assert finished(tool) and "old" not in shown(tool) and "tinyllama-old" not in tool._dom_classes
    tool.inputs["prompt"].value = "The fox"
    tool.inputs["prompt"].value = "The wolf"
    assert "old" not in shown(tool)


def test_two_tokens_rank_the_heads_and_a_click_goes_to_one(tool):
    tool.outputs["tokens"].act("select", 4)
    tool.inputs["view"].value = "heads"
    tool.outputs["looked"].act("select", 2)
    report, best = tool.outputs["looks"].report, tool.walk.looks()[0]
    assert report["facts"].startswith("looks at ␣upon (2)") and report["piece"] == "␣time (4)"
    assert report["rows"][0]["piece"] == f"layer {best.layer}, head {best.head}"
    tool.outputs["looks"].act("pick", 0)
    assert tool.walk.name == f"layers.{best.layer}.attention.weights" and tool.walk.head == best.head
    assert tool.inputs["view"].value == "step" and {"map", "looks", "looked"} <= shown(tool)
    assert tool.outputs["map"].frame["column"] == tool.outputs["looked"].selected == 2
    tool.outputs["looked"].act("select", 2)
    look = tool.walk.looks()[0]
    assert tool.walk.looks_at is None and look.looks_at in (1, 2, 3)  # neither the first nor itself
    there = f"→ {tool.outputs['looked'].text['pieces'][look.looks_at]} ({look.looks_at})"
    assert tool.outputs["looks"].report["rows"][0]["piece"].endswith(there)


def test_a_cell_of_an_attention_map_is_two_tokens(tool):
    tool.inputs["kind"].value = "attention.weights"
    tool.outputs["map"].act("cell", [3, 1])
    assert (tool.walk.position, tool.walk.looks_at) == (3, 1)
    tool.outputs["map"].act("cell", [2, 4])  # in the future
    assert (tool.walk.position, tool.walk.looks_at) == (2, 2)
    tool.inputs["kind"].value = "attention.q"
    tool.outputs["map"].act("cell", [4, 11])
    assert (tool.walk.position, tool.walk.looks_at) == (4, 2)


def test_the_sheet_has_a_map_for_every_head_and_a_click_goes_to_one(tool):
    tool.inputs["view"].value = "heads"
    assert {"sheet", "looks", "looked"} <= shown(tool) and not {"map", "code"} & shown(tool)
    frame = tool.outputs["sheet"].frame
    assert [frame[name] for name in ("n_layers", "n_heads", "side")] == [4, 8, 5]
    assert len(tool.outputs["sheet"].values) == 4 * 8 * 5 * 5 and len(frame["marked"]) == 10
    tool.outputs["sheet"].act("head", [2, 5])
    assert (tool.walk.name, tool.walk.head) == ("layers.2.attention.weights", 5)


def test_the_lens_has_a_cell_for_every_layer_and_token_and_a_click_goes_to_one(tool):
    tool.inputs["view"].value = "lens"
    table = finished(tool).outputs["lens"].table
    assert [row["layer"] for row in table["rows"]] == [3, 2, 1, 0] and "lens" in shown(tool)
    assert all(len(row["pieces"]) == len(row["probs"]) == 5 for row in table["rows"])
    assert all(table["rows"][0]["settled"])
    tool.outputs["lens"].act("go", [1, 2])
    assert (tool.walk.name, tool.walk.position) == ("layers.1.residual", 2)
    tool.inputs["view"].value = "lens"
    assert tool.outputs["lens"].table["at"] == [1, 2]


STATES = [
    {"layer": 2, "kind": "attention.weights", "head": 3, "position": 2, "looks_at": 1},
    {"kind": "logits", "view": "lens", "backend": "numpy"},
    {"view": "heads", "position": 0},
]


@pytest.mark.parametrize("state", STATES)
def test_its_line_of_python_opens_it_in_the_same_state(state):
    tool = finished(tinyllama.stepper("Once upon a time", model="small", **state))
    (line,) = tool.outputs["keys"].copies.values()
    assert escape(line) in tool.outputs["line"].value
    assert line == finished(eval(line)).outputs["keys"].copies["Copy this line of Python"]
    assert all(f"{name}={value!r}" in line for name, value in state.items())


def test_it_opens_with_ids():
    ids = [1, 403, 407]
    tool = finished(tinyllama.stepper(ids))
    assert tool.walk.tokens == ids and tool.inputs["prompt"].value == tool.walk.text
    assert "old" not in shown(tool)


def test_a_state_that_is_not_there_is_an_error():
    with pytest.raises(TinyllamaError, match="there is no view 'all': there are step, heads, lens"):
        tinyllama.stepper(view="all")
    with pytest.raises(
        TinyllamaError, match="the stepper has no layers: there are layer, kind, head, position"
    ):
        tinyllama.stepper(layers=3)
    with pytest.raises(TinyllamaError, match="a prompt is text or a list of token ids, not 5"):
        tinyllama.stepper(prompt=5)
    tool = finished(tinyllama.stepper(layer=7))
    assert "layer is 7, but must be in 0..3" in tool.outputs["error"].value
    tool.buttons["Run"].click()
    assert finished(tool).outputs["error"].value == "" and tool.walk.at == 0


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
