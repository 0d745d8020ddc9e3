"""Importance matrices in files: both kinds are read, the gguf package reads ours, others are refused."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from tinyllama.errors import TinyllamaError
from tinyllama.formats import imatrix
from tinyllama.formats.imatrix import ImportanceMatrix
from tinyllama.machine.download import small_folder

QUERY, DOWN = "blk.1.attn_q.weight", "blk.0.ffn_down.weight"
SUMS = {
    QUERY: np.array([0, 1.5, 3, 700, 1e-3], np.float32),
    DOWN: np.random.default_rng(0).random(70, np.float32),
}


@pytest.fixture
def written(tmp_path) -> Path:
    path = tmp_path / "imatrix.gguf"
    ImportanceMatrix(SUMS, {QUERY: 1024, DOWN: 1024}, ("a text.txt",), 2, 512).write(path)
    return path


def older(*entries: tuple[str, int, list[float]], end: bytes = b"") -> bytes:
    """A file as llama-imatrix wrote it before GGUF: entries of (name, n_chunks, mean squares)."""
    data = struct.pack("<i", len(entries))
    for name, n_chunks, means in entries:
        values = np.array(means, "<f4") * np.float32(n_chunks)
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", n_chunks, len(means))
        data += values.tobytes()
    return data + end


# --- there and back -------------------------------------------------------------------------------


def test_what_is_written_is_read_again(written):
    found = imatrix.read(written)
    assert (found.datasets, found.n_chunks, found.chunk_size) == (("a text.txt",), 2, 512)
    assert found.counts == {QUERY: 1024, DOWN: 1024}
    assert {name: sums.tolist() for name, sums in found.sums.items()} == {
        name: sums.tolist() for name, sums in SUMS.items()
    }
    assert np.array_equal(found.means()[QUERY], SUMS[QUERY] / np.float32(1024))
    assert found.means()[QUERY].dtype == np.float32


def test_the_gguf_package_reads_what_is_written(written):
    file = gguf.GGUFReader(written)
    keys = {key: field.contents() for key, field in file.fields.items()}
    assert (keys["general.type"], keys["imatrix.datasets"]) == ("imatrix", ["a text.txt"])
    assert (keys["imatrix.chunk_count"], keys["imatrix.chunk_size"]) == (2, 512)
    found = {tensor.name: (tensor.tensor_type.name, tensor.data.tolist()) for tensor in file.tensors}
    assert list(found) == [f"{name}.{what}" for name in (DOWN, QUERY) for what in ("in_sum2", "counts")]
    assert found[f"{QUERY}.in_sum2"] == ("F32", SUMS[QUERY].tolist())
    assert found[f"{QUERY}.counts"] == ("F32", [1024])


def test_a_file_of_the_gguf_package_is_read(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x", "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["a", "b"])
    writer.add_uint32("imatrix.chunk_count", 3)
    writer.add_uint32("imatrix.chunk_size", 64)
    writer.add_tensor(f"{QUERY}.in_sum2", SUMS[QUERY][None])  # as llama.cpp has them, of one expert
    writer.add_tensor(f"{QUERY}.in_sum", SUMS[QUERY][None])  # of newer ones, which nothing needs
    writer.add_tensor(f"{QUERY}.counts", np.array([[192]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = imatrix.read(tmp_path / "x")
    assert (found.datasets, found.n_chunks, found.chunk_size) == (("a", "b"), 3, 64)
    assert np.array_equal(found.means()[QUERY], SUMS[QUERY] / np.float32(192))


@pytest.mark.parametrize("end, n_chunks, datasets", [
    (b"", 5, ()),
    (struct.pack("<i", 7), 7, ()),
    (struct.pack("<ii", 7, 5) + b"a.txt", 7, ("a.txt",)),
])  # fmt: skip
def test_the_older_kind_of_file_has_the_means_that_llama_quantize_takes(tmp_path, end, n_chunks, datasets):
    path = tmp_path / "imatrix.dat"
    path.write_bytes(older((QUERY, 5, [1, 2, 0.1]), (DOWN, 3, [4]), end=end))
    found = imatrix.read(path)
    assert (found.n_chunks, found.datasets, found.chunk_size) == (n_chunks, datasets, 512)
    assert found.counts == {QUERY: 5 * 512, DOWN: 3 * 512}
    stored = np.array([1, 2, 0.1], np.float32) * np.float32(5)
    assert np.array_equal(found.means()[QUERY], stored / np.float32(5))  # to the bit


# --- what can't be right --------------------------------------------------------------------------


def refused(path: Path, *words: str) -> None:
    with pytest.raises(TinyllamaError) as told:
        imatrix.read(path)
    assert str(told.value).startswith(str(path)) and "\n" not in str(told.value)
    for word in words:
        assert word in str(told.value)


@pytest.mark.parametrize("name", ["README.md", "pyproject.toml", "docs/chat.png"])
def test_what_is_something_else_is_refused(name):
    refused(Path(__file__).parents[2] / name, "is not an importance matrix, or damaged")


def test_a_model_is_refused(tmp_path, smollm2_file):
    refused(smollm2_file, "is not an importance matrix", "general.type")
    refused(small_folder(), "is a folder")


@pytest.mark.parametrize("data", [
    older((QUERY, 0, [1.0])),
    older((QUERY, 1, [-1.0])),
    older((QUERY, 1, [np.nan])),
    older((QUERY, 1, [])),
    older((QUERY, 1, [1.0])) + b"\0\0\0",
    struct.pack("<ii", 1, 1 << 30),
    struct.pack("<i", 0),
])  # fmt: skip
def test_an_older_file_that_is_damaged_is_refused(tmp_path, data):
    (tmp_path / "imatrix.dat").write_bytes(data)
    refused(tmp_path / "imatrix.dat", "damaged")


def test_a_file_that_is_cut_short_is_refused_wherever_that_is(written, tmp_path):
    whole = {".gguf": written.read_bytes(), ".dat": older((QUERY, 5, [1, 2, 0.1]), (DOWN, 3, [4, 5]))}
    for suffix, data in whole.items():
        cut = tmp_path / f"cut{suffix}"
        for size in range(1, len(data) - 32, 7):
            cut.write_bytes(data[:size])
            refused(cut)


@pytest.mark.parametrize("sums, count, words", [
    ([1, np.inf], 1, "NaN or infinity"),
    ([1, -1], 1, "can't be sums of squares"),
    ([1, 1], 0, "can't be sums of squares"),
])  # fmt: skip
def test_sums_that_can_not_be_are_refused(tmp_path, sums, count, words):
    wrong = ImportanceMatrix({QUERY: np.array(sums, np.float32)}, {QUERY: count}, (), 1, 512)
    wrong.write(tmp_path / "x")
    refused(tmp_path / "x", QUERY, words)


def test_an_empty_matrix_is_refused(tmp_path):
    ImportanceMatrix({}, {}, (), 1, 512).write(tmp_path / "x")
    refused(tmp_path / "x", ".in_sum2")


def test_where_nothing_can_be_written_nothing_is_left(tmp_path):
    matrix = ImportanceMatrix(SUMS, {QUERY: 1, DOWN: 1}, (), 1, 512)
    with pytest.raises(TinyllamaError, match="there is no folder"):
        matrix.write(tmp_path / "none" / "x")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("kind", ["gguf", "older"])
def test_one_that_does_not_fit_into_memory_is_refused(tmp_path, free_memory, kind):
    path = tmp_path / "x"
    path.write_bytes(older((QUERY, 1, [1.0] * 5000)))
    if kind == "gguf":
        imatrix.read(path).write(path)
    free_memory(1 << 14)
    with pytest.raises(TinyllamaError, match=r"reading it needs 20 kB of memory") as told:
        imatrix.read(path)
    assert str(told.value).startswith(f"{path}: ")
