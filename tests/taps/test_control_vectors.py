"""Control vectors against llama.cpp, which computes the same with them, the gguf package and NumPy's SVD."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest

import tinyllama
from tinyllama import ControlVector
from tinyllama.errors import TinyllamaError

GOLDEN = Path(__file__).parents[1] / "golden" / "control_vector.json"
PAIRS = [
    ("Lily was very happy and laughed.", "Lily was very sad and cried."),
    ("It was a sunny, lovely day", "It was a dark, horrible day"),
    ("They all played together", "They all fought and lost, and it hurt"),
]


@pytest.fixture(scope="module")
def llama():
    return tinyllama.load("small", "numpy", 1)


@pytest.fixture(scope="module", params=["pca", "mean"])
def made(request, llama):
    return request.param, ControlVector.of(llama, PAIRS, request.param)


def differences(llama, layer: int) -> np.ndarray:
    """What tells the texts of all pairs apart, the slow way: [n_tokens, dim]."""
    rows = []
    for pair in PAIRS:
        ids = [llama.tokens(text) for text in pair]
        space = llama.tokenizer.encode(" ", bos=False)[-1]
        ids = [some + [space] * (max(map(len, ids)) - len(some)) for some in ids]
        ours, theirs = (llama.trace(some)[f"layers.{layer}.residual"] for some in ids)
        rows.append(ours - theirs)
    return np.concatenate(rows)


# --- making ---------------------------------------------------------------------------------------


def test_there_is_a_direction_of_length_1_for_each_layer_but_the_first(llama, made):
    _, vector = made
    assert [*vector.directions] == [*range(1, llama.config.n_layers)]
    assert vector.model_hint == "llama"
    for direction in vector.directions.values():
        assert direction.shape == (llama.config.dim,) and direction.dtype == np.float32
        assert np.linalg.norm(direction) == pytest.approx(1, abs=1e-5)


def test_a_direction_is_the_mean_or_the_first_component_and_leads_to_the_positive_text(llama, made):
    method, vector = made
    for layer, direction in vector.directions.items():
        rows = differences(llama, layer)
        mean = rows.mean(axis=0)
        wanted = mean if method == "mean" else np.linalg.svd(rows)[2][0]
        wanted = wanted / np.linalg.norm(wanted)
        assert abs(direction @ wanted) > 1 - 1e-5
        assert direction @ mean > 0


def test_a_text_moves_to_the_positive_side_with_it_and_to_the_other_against_it(llama):
    vector = ControlVector.of(llama, PAIRS, "mean")
    expects = {}
    happy, sad = (llama.tokens(word, None)[-1] for word in (" happy", " sad"))
    for strength in (-4, 0, 4):
        with llama.edit(vector.edit(strength)):
            logits = llama.logits("Once upon a time, there was a girl who was very")[-1]
        expects[strength] = logits[happy] - logits[sad]
    assert expects[-4] < expects[0] < expects[4]


def test_pairs_of_ids_do_too_and_progress_sees_each_pair(llama):
    seen = []
    ids = [tuple(map(llama.tokens, pair)) for pair in PAIRS]
    vector = ControlVector.of(llama, ids, "mean", lambda texts: (seen.append(text) or text for text in texts))
    assert len(seen) == len(PAIRS)
    for layer, direction in ControlVector.of(llama, PAIRS, "mean").directions.items():
        assert np.array_equal(vector.directions[layer], direction)


@pytest.mark.parametrize(
    "pairs, method, words",
    [
        ([], "pca", "there is no pair of texts"),
        ([("a", "")], "pca", "the prompt is empty"),
        ([("same", "same")], "mean", "the same"),
        ([("a b", "c d"), ("c d", "a b")], "pca", "cancel out"),
        (PAIRS, "ica", "method must be pca or mean"),
    ],
)
def test_what_makes_no_direction_is_refused(llama, pairs, method, words):
    with pytest.raises(TinyllamaError, match=words):
        ControlVector.of(llama, pairs, method)


def test_what_does_not_fit_into_memory_is_refused_before_it_is_computed(llama, free_memory):
    free_memory(1 << 16)
    with pytest.raises(TinyllamaError, match="memory"):
        ControlVector.of(llama, PAIRS)


# --- applying -------------------------------------------------------------------------------------


def test_each_direction_is_added_to_the_residual_stream_after_its_layer(llama):
    vector = ControlVector.of(llama, PAIRS)
    plain = llama.trace("Once upon a time", "*.residual")
    for layer, direction in vector.directions.items():
        with llama.edit(vector.edit(2, [layer])):
            edited = llama.trace("Once upon a time", "*.residual")
        before, at = f"layers.{layer - 1}.residual", f"layers.{layer}.residual"
        assert np.array_equal(edited[before], plain[before])
        np.testing.assert_allclose(edited[at], plain[at] + 2 * direction, atol=1e-5)


@pytest.mark.parametrize("layers", [(1, 29), (10, 20), (15, 15)], ids=["all", "some", "one"])
def test_llama_cpp_computes_the_same_logits(smollm2_file, layers, request):
    recorded = json.loads(GOLDEN.read_text())[request.node.callspec.id]
    rows = np.random.default_rng(5).standard_normal((29, 576), dtype=np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    vector = ControlVector(dict(enumerate(rows, 1)))
    llama = tinyllama.load(str(smollm2_file), "numpy", 2)
    with llama.edit(vector.edit(8, range(layers[0], layers[1] + 1))):
        logits = llama.logits("The capital of France is")[-1]
    assert [int(token) for token in recorded] == np.argsort(-logits)[: len(recorded)].tolist()
    np.testing.assert_allclose(logits[[*map(int, recorded)]], [*recorded.values()], atol=1e-3)


def test_a_layer_without_a_direction_is_refused(llama):
    with pytest.raises(TinyllamaError, match=r"no direction of layer \[7\]"):
        ControlVector.of(llama, PAIRS).edit(layers=[1, 7])


def test_one_of_another_model_is_named_at_the_first_step(llama):
    fits = np.ones(llama.config.dim, np.float32)
    for directions, words in (({1: fits[1:]}, "have 255 numbers"), ({1: fits, 30: fits}, "layers go to 30")):
        vector = ControlVector(directions, name="happy.gguf")
        with llama.edit(vector.edit()), pytest.raises(TinyllamaError) as told:
            llama.logits("Once")
        assert str(told.value).startswith("edit of layers.0.residual: happy.gguf: is of another model: its")
        assert words in str(told.value)


@pytest.mark.parametrize("strength", [1e39, -1e39, np.inf, np.nan, 1e38])
def test_a_strength_that_overflows_is_refused_before_anything_runs(strength):
    with pytest.raises(TinyllamaError, match=r"^happy.gguf: .* times its directions, .* overflows$"):
        ControlVector({1: ROW}, name="happy.gguf").edit(strength)


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda: ControlVector({}), "the control vector: holds no direction"),
        (lambda: ControlVector({1: ROW * np.nan}), "its direction of layer 1 holds NaN"),
        (lambda: ControlVector({1: ROW}).edit("x"), "strength must be a number, not 'x'"),
        (lambda: ControlVector({1: ROW}).edit(layers=2), "layers are numbers"),
        (lambda: ControlVector.read(None), "a control vector is in a file, not in None"),
        (lambda: ControlVector.of("small", ["ab", "cd"]), r"a pair is \(positive, negative\), not 'ab'"),
        (lambda: ControlVector.of("small", [("a", "b", "c")]), "a pair is"),
    ],
)
def test_what_can_be_no_direction_pair_or_strength_is_refused_at_the_door(wrong, words):
    with pytest.raises(TinyllamaError, match=words):
        wrong()


def test_a_model_may_be_given_by_its_name(llama):
    found = ControlVector.of("small", PAIRS, "mean")
    assert found.directions.keys() == ControlVector.of(llama, PAIRS, "mean").directions.keys()


# --- files ----------------------------------------------------------------------------------------


def test_what_is_written_is_read_again_and_by_the_gguf_package(llama, made, tmp_path):
    _, vector = made
    vector.write(tmp_path / "x.gguf")
    again = ControlVector.read(tmp_path / "x.gguf")
    assert again.model_hint == "llama" and again.directions.keys() == vector.directions.keys()
    file = gguf.GGUFReader(tmp_path / "x.gguf")
    keys = {key: field.contents() for key, field in file.fields.items()}
    assert keys["general.architecture"] == "controlvector"
    assert keys["controlvector.model_hint"] == "llama"
    assert keys["controlvector.layer_count"] == len(vector.directions)
    assert file.fields["controlvector.layer_count"].types == [gguf.GGUFValueType.INT32]  # as llama.cpp
    for tensor in file.tensors:
        layer = int(tensor.name.removeprefix("direction."))
        assert tensor.data.tolist() == vector.directions[layer].tolist() == again.directions[layer].tolist()
    again.check(llama)


def file_of(path: Path, tensors: dict[str, np.ndarray], kind="controlvector") -> Path:
    """What another program wrote."""
    writer = gguf.GGUFWriter(path, kind)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


ROW = np.ones(288, np.float32)


def test_a_file_of_another_program_is_read_in_any_order(tmp_path):
    path = file_of(tmp_path / "x", {"direction.3": 3 * ROW, "direction.1": ROW})
    found = ControlVector.read(path)
    assert [*found.directions] == [1, 3] and found.model_hint == "" and found.directions[3][0] == 3


@pytest.mark.parametrize(
    "tensors, kind, words",
    [
        ({}, "controlvector", "holds no direction"),
        ({"direction.1": ROW}, "llama", "is not a control vector: its general.architecture is 'llama'"),
        ({"direction.0": ROW}, "controlvector", "direction.0"),
        ({"direction.x": ROW}, "controlvector", "direction.x"),
        ({"weights": ROW}, "controlvector", "weights"),
        ({"direction.1": ROW, "direction.2": ROW[1:]}, "controlvector", "alike"),
        ({"direction.1": np.ones((2, 288), np.float32)}, "controlvector", "alike"),
        ({"direction.1": ROW.astype(np.float16)}, "controlvector", "float32"),
        ({"direction.1": ROW * np.nan}, "controlvector", "NaN"),
    ],
)
def test_a_file_that_is_none_or_can_not_be_right_is_refused_in_one_line(tmp_path, tensors, kind, words):
    path = file_of(tmp_path / "x", tensors, kind)
    with pytest.raises(TinyllamaError) as told:
        ControlVector.read(path)
    assert str(told.value).startswith(f"{path}: ") and words in str(told.value)


def test_what_is_no_gguf_file_is_refused():
    with pytest.raises(TinyllamaError, match=r"README.md: is not a control vector but something else"):
        ControlVector.read(Path(__file__).parents[2] / "README.md")


def test_a_file_cannot_hold_a_direction_of_the_first_layer(tmp_path):
    with pytest.raises(TinyllamaError, match="direction of layer 0"):
        ControlVector({0: ROW}).write(tmp_path / "x")
    assert not [*tmp_path.iterdir()]


def test_one_of_another_model_is_refused_and_one_of_another_family_warned_about(llama):
    dim = llama.config.dim
    with pytest.raises(TinyllamaError, match=f"is of another model: .* this model's dim is {dim}"):
        ControlVector({1: np.ones(dim + 1, np.float32)}, name="x.gguf").check(llama)
    with pytest.raises(TinyllamaError, match="is of another model: its layers go to 30"):
        ControlVector({30: np.ones(dim, np.float32)}, name="x.gguf").check(llama)
    with pytest.warns(UserWarning, match="was made for qwen2, and this model is llama"):
        ControlVector({1: np.ones(dim, np.float32)}, "qwen2").check(llama)
