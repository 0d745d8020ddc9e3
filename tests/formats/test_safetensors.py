"""safetensors files: what the safetensors package writes is read, anything else refused in one line."""

import json
import struct
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from checkpoints import refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tinyllama.errors import TinyllamaError
from tinyllama.formats.safetensors import LARGEST_HEADER, read_shards, read_tensors


def tensors(dtype=torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"b.weight": (6, 8), "a.norm": (5,), "c.weight": (1, 3)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


@pytest.fixture
def path(tmp_path):
    save_file(tensors(), tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path / "model.safetensors"


def write(path, header, data: bytes = b""):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


# --- what is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_weight_is_what_was_saved(tmp_path, dtype):
    saved = tensors(dtype)
    save_file(saved, tmp_path / "a.safetensors", {"format": "pt"})
    pieces = read_tensors(tmp_path / "a.safetensors")
    assert pieces.keys() == saved.keys()
    for name, piece in pieces.items():
        assert np.array_equal(piece.kind.dequantize(piece.blocks()), saved[name].float().numpy())


def test_types_may_differ_and_begin_at_odd_bytes(tmp_path):
    a, b = np.arange(3, dtype=np.float16), np.arange(6, dtype=np.float32).reshape(2, 3)
    header = {"a": entry("F16", (3,), (0, 6)), "b": entry("F32", (2, 3), (6, 30))}
    path = write(tmp_path / "odd", json.dumps(header).encode() + b" " * 3, a.tobytes() + b.tobytes())
    for name, expected in {"a": a, "b": b}.items():
        piece = read_tensors(path)[name]
        assert np.array_equal(piece.kind.dequantize(piece.blocks()), expected)


def test_weights_are_mapped_and_not_copied(path):
    piece = read_tensors(path)["b.weight"]
    assert np.shares_memory(piece.blocks(), np.frombuffer(piece.data, np.uint8))


# --- several files --------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path):
    places = {}
    for number, (name, tensor) in enumerate(tensors().items()):
        places[name] = f"model-{number}.safetensors"
        save_file({name: tensor}, tmp_path / places[name])
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return tmp_path


def test_files_of_an_index_are_read_together(sharded):
    found = read_shards(sharded, "model.safetensors")
    assert found.keys() == tensors().keys()
    assert len({piece.data.path for piece in found.values()}) == 3


def test_the_file_itself_comes_before_an_index(sharded):
    save_file(tensors(), sharded / "model.safetensors")
    assert len({piece.data.path for piece in read_shards(sharded, "model.safetensors").values()}) == 1


@pytest.mark.parametrize("name", ["model-1.safetensors", "model.safetensors.index.json"])
def test_a_missing_file_is_named(sharded, name):
    (sharded / name).unlink()
    named = name.removesuffix(".index.json")
    refused(lambda: read_shards(sharded, "model.safetensors"), f"{sharded / named}: is missing")


def test_a_tensor_in_two_files_is_refused(sharded):
    save_file(tensors(), sharded / "model-2.safetensors")
    refused(lambda: read_shards(sharded, "model.safetensors"), "model-2.safetensors: holds", "another file")


@pytest.mark.parametrize(
    "index",
    [
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": "../model-0.safetensors"}}',
        '{"weight_map": {"a": "/etc/passwd"}}',
        "{" * 10,
    ],
)
def test_an_index_that_names_no_files_of_its_folder_is_refused(sharded, index):
    path = sharded / "model.safetensors.index.json"
    path.write_text(index)
    refused(lambda: read_shards(sharded, "model.safetensors"), str(path))


@pytest.mark.parametrize("name", ["", ".", "..", "\0", "x" * 300, "model-9.safetensors"])
def test_a_name_that_no_file_has_is_refused(sharded, name):
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    refused(lambda: read_shards(sharded, "model.safetensors"), str(sharded))


# --- what isn't a safetensors file ----------------------------------------------------------------

ONE = {"a": entry()}
DAMAGES = {
    "a web page": (b"<!DOCTYPE html><html>", "a web page"),
    "a git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid x\n", "git-lfs"),
    "a GGUF file": (b"GGUF" + bytes(40), "a GGUF file"),
    "zeros": (bytes(100), "nothing but zeros"),
    "a byte": (b"x", "something else"),
}


@pytest.mark.parametrize(("data", "words"), DAMAGES.values(), ids=DAMAGES)
def test_another_file_is_refused_by_what_it_is(tmp_path, data, words):
    (tmp_path / "a").write_bytes(data)
    refused(lambda: read_tensors(tmp_path / "a"), str(tmp_path / "a"), words)


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        ({}, b"", "holds no tensors"),
        ({"__metadata__": {"a": "b"}}, b"", "holds no tensors"),
        (b"{]", b"", "isn't JSON"),
        (b'{"a": ' + b"[" * 50_000, b"", "isn't JSON"),
        (b'{"a": {}, "a": {}}', b"", "a key is there twice"),
        ({"a": 3}, b"", "the tensor a: is damaged"),
        ({"a": {"dtype": "F32"}}, b"", "the tensor a: is damaged"),
        ({"a": entry(shape=[2.0])}, bytes(8), "the tensor a: is damaged"),
        ({"a": entry(shape=[-2])}, bytes(8), "the tensor a: is damaged"),
        ({"a": entry(shape=[True, 2])}, bytes(8), "the tensor a: is damaged"),
        ({"a": entry(offsets=[0])}, bytes(8), "the tensor a: is damaged"),
        ({"a": entry(offsets=[8, 0])}, bytes(8), "has 8 bytes, but lies at 8 to 0"),
        ({"a": entry(offsets=[0, 4])}, bytes(4), "has 8 bytes, but lies at 0 to 4"),
        ({"a": entry(shape=[0], offsets=[0, 0])}, b"", "has the shape [0]"),
        ({"a": entry(shape=[], offsets=[0, 4])}, bytes(4), "has the shape []"),
        ({"a": entry(shape=[1, 1, 2])}, bytes(8), "has the shape [1, 1, 2]"),
        ({"a": entry("F8_E4M3", [8])}, bytes(8), "is of the type F8_E4M3, which can't be read"),
        ({"a": entry("I32")}, bytes(8), "is of the type I32"),
        (ONE, bytes(7), "is cut short: a ends at"),
        (ONE, bytes(9), "1 bytes follow its last tensor"),
        ({"a": entry(offsets=[4, 12])}, bytes(12), "is damaged: a begins"),
        ({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12), "is damaged: b begins"),
        ({"a": entry(), "b": entry()}, bytes(8), "is damaged: b begins"),
        ({"a": entry(shape=[2**60, 2**60], offsets=[0, 2**122])}, bytes(8), "is cut short"),
    ],
)
def test_what_a_header_cant_say_is_refused(tmp_path, header, data, words):
    path = write(tmp_path / "a", header, data)
    refused(lambda: read_tensors(path), str(path), words)
    ours_alone = words.startswith(("has the shape", "is of the type", "holds no"))
    with nullcontext() if ours_alone else pytest.raises(SafetensorError):
        safe_open(path, "np").keys()


def test_a_header_longer_than_the_file_or_than_any_is_refused(path):
    data = path.read_bytes()
    for length, words in ((len(data), "cut short within its header"), (LARGEST_HEADER + 1, "its header has")):
        path.write_bytes(struct.pack("<Q", length) + data[8:])
        refused(lambda: read_tensors(path), str(path), words)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes_give_the_tensors_or_one_line(path, data):
    good = path.read_bytes()
    damaged = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged[: data.draw(st.sampled_from([len(good)] * 3 + [len(good) // 2]))])
    try:
        read_tensors(path)
    except TinyllamaError as error:
        assert "\n" not in str(error)
    finally:
        path.write_bytes(good)
