"""quantize with an importance matrix: what it takes, says and refuses. test_mixes.py has the bytes."""

import re
from dataclasses import replace
from pathlib import Path

import mixed
import numpy as np
import pytest
from checkpoints import refused

from tinyllama.commands import main
from tinyllama.commands.convert import convert, quantize
from tinyllama.formats import open_checkpoint
from tinyllama.formats.imatrix import ImportanceMatrix

WO, W2 = "blk.0.attn_output.weight", "blk.0.ffn_down.weight"


@pytest.fixture
def source(tmp_path):
    return Path(mixed.write(tmp_path / "f16.gguf", n_layers=1))


@pytest.fixture
def matrix(source):
    """Sums over 512 tokens."""
    sums = {name: means * np.float32(512) for name, means in mixed.importance(source).items()}
    return ImportanceMatrix(sums, dict.fromkeys(sums, 512), ("some text.txt", "more"), 2, 256)


def data_of(path: Path) -> dict[str, bytes]:
    return {name: tensor.dequantize().tobytes() for name, tensor in open_checkpoint(path).tensors.items()}


@pytest.fixture
def made(source, tmp_path):
    """Quantizes and says what the weights became."""

    def quantized(imatrix, mix="Q4_K_M", **options):
        (path,) = quantize(source, tmp_path / "made.gguf", mix, imatrix=imatrix, **options)
        return data_of(path)

    return quantized


def test_a_file_its_contents_and_its_means_give_the_same_weights(made, matrix, tmp_path):
    path = tmp_path / "imatrix.gguf"
    matrix.write(path)
    weights = made(path)
    assert weights == made(str(path)) == made(matrix) == made(matrix.means())
    assert weights != made(None)


def test_the_file_says_what_it_was_made_with(source, matrix, tmp_path):
    path = tmp_path / "imatrix.gguf"
    matrix.write(path)
    expected = {"file": str(path)[:127], "dataset": "some text.txt", "entries_count": 7, "chunks_count": 2}
    for given, keys in (
        (path, expected),
        (matrix, {key: expected[key] for key in expected if key != "file"}),
        (matrix.means(), {"entries_count": 7}),
        (None, {}),
    ):
        (made,) = quantize(source, tmp_path / "made.gguf", "Q4_0", imatrix=given)
        metadata = open_checkpoint(made).metadata
        found = {key: value for key, value in metadata.items() if key.startswith("quantize.")}
        assert found == {f"quantize.imatrix.{key}": value for key, value in keys.items()}
        (again,) = convert(made, outfile=tmp_path / "again.gguf")
        assert open_checkpoint(again).metadata == metadata


def test_numpy_and_c_write_the_same(made, matrix, monkeypatch):
    pytest.importorskip("tinyllama._native", reason="the C backend is not built")
    found = []
    for backend in ("numpy", "c"):
        monkeypatch.setenv("TINYLLAMA_BACKEND", backend)
        found.append([made(matrix, mix) for mix in ("Q4_0", "Q4_1", "Q2_K_S", "IQ4_XS")])
    assert found[0] == found[1]


def test_q2_k_s_needs_it_for_every_matrix_of_q2_k(made, matrix):
    made(matrix, "Q2_K_S")
    less = replace(matrix, sums={name: sums for name, sums in matrix.sums.items() if name != WO})
    with pytest.warns(UserWarning, match="attention.wo.weight missing"):
        refused(lambda: made(less, "Q2_K_S"), "attention.wo.weight", "importance matrix", "Q2_K")


def test_a_matrix_it_says_nothing_of_is_quantized_without_it_and_a_line_says_so(made, matrix):
    del matrix.sums[WO], matrix.sums[W2]
    with pytest.warns(UserWarning, match="attention.wo.weight and 1 other missing"):
        some = made(matrix, "Q3_K_S")
    without, name = made(None, "Q3_K_S"), "layers.0.attention.wo.weight"
    assert some[name] == without[name]
    assert some["layers.0.attention.wq.weight"] != without["layers.0.attention.wq.weight"]


def test_what_is_not_in_the_model_is_ignored_and_a_line_says_so(made, matrix):
    more = matrix.means() | {"blk.7.attn_q.weight": np.ones(256, np.float32)}
    with pytest.warns(UserWarning, match=r"blk\.7\.attn_q\.weight not in the model"):
        assert made(more) == made(matrix)


def test_an_embedding_of_another_length_is_ignored_as_llama_quantize_does(made, matrix):
    means = matrix.means()
    assert made(means | {"token_embd.weight": np.ones(40, np.float32)}) == made(means)
    assert made(means | {"token_embd.weight": np.arange(256, dtype=np.float32)}) != made(means)


def test_a_mix_that_makes_no_use_of_it_says_so(made, matrix):
    with pytest.warns(UserWarning, match="Q8_0 makes no use of an importance matrix"):
        assert made(matrix, "Q8_0") == made(None, "Q8_0")


@pytest.mark.parametrize("value", [np.nan, np.inf, -1])
def test_what_cannot_be_mean_squares_is_refused(made, matrix, value):
    means = matrix.means()
    means[WO][3] = value
    refused(lambda: made(means), "the importance matrix", "attention.wo.weight", "mean squares")


@pytest.mark.parametrize("value", [2.0**41, 1e36, 3e38])
def test_mean_squares_that_would_overflow_are_refused(made, matrix, value, tmp_path):
    matrix.sums[WO][3] = 0
    means = matrix.means()
    means[WO][3] = 2.0**40
    made(means)
    (tmp_path / "made.gguf").unlink()
    means[WO][3] = value
    path = tmp_path / "large.gguf"
    ImportanceMatrix(means, dict.fromkeys(means, 1), (), 1, 1).write(path)
    refused(lambda: made(path), str(path), "layers.0.attention.wo.weight go up to", "1.1e+12 is the largest")
    assert not (tmp_path / "made.gguf").exists()


def test_it_is_not_replaced_by_what_it_makes(source, matrix, tmp_path):
    path = tmp_path / "imatrix.gguf"
    matrix.write(path)
    before = path.read_bytes()
    refused(lambda: quantize(source, path, "Q4_0", imatrix=path), str(path), "would replace what it is made")
    assert path.read_bytes() == before


def test_a_matrix_of_another_model_is_refused(made, matrix, tmp_path):
    shorter = {name: means[:128] for name, means in matrix.means().items()}
    refused(lambda: made(shorter), "another model", "128", "256")
    refused(lambda: made({"blk.9.attn_q.weight": np.ones(256, np.float32)}), "another model", "f16.gguf")
    assert not list(tmp_path.glob("made*"))


def test_what_is_no_importance_matrix_is_refused(source, made, tmp_path):
    refused(lambda: made(source), str(source), "importance matrix")
    refused(lambda: made(tmp_path / "none.gguf"), "none.gguf")
    refused(lambda: made(3), "imatrix is a file, an ImportanceMatrix or a dict, not 3")


def test_a_ggml_file_has_no_place_for_it(tmp_path, matrix):
    small = Path(__file__).parents[2] / "data" / "small"
    (ggml,) = convert(small, outfile=tmp_path / "f16.bin", format="ggml")
    refused(lambda: quantize(ggml, tmp_path / "made.bin", "Q4_0", imatrix=matrix), str(ggml), "GGUF")


def test_the_option_is_llama_quantizes(source, matrix, tmp_path, capsys):
    path, made = tmp_path / "imatrix.gguf", tmp_path / "made.gguf"
    matrix.write(path)
    args = ["quantize", str(source), str(made), "q4_0", "--imatrix", str(path)]
    assert main(args) == 0
    said = capsys.readouterr()
    assert re.search(r"made\.gguf +\d+ kB", said.out)
    (other,) = quantize(source, tmp_path / "other.gguf", "q4_0", imatrix=path)
    assert made.read_bytes() == other.read_bytes()
