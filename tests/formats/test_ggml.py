import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import checkpoints
import historical
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinyllama.config import PRESETS
from tinyllama.errors import TinyllamaError
from tinyllama.formats import ggml, headers, meta, open_checkpoint
from tinyllama.formats.tokenizer_model import vocabulary_from_model
from tinyllama.quant import TYPES
from tinyllama.tokenizer import make_tokenizer, token_texts

FTYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3}


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """Folders `1`, `2` and `4` of so many parts, with f32, f16, q4_0 and q4_1 files of the same weights."""
    root = tmp_path_factory.mktemp("ggml")
    for n_parts in (1, 2, 4):
        folder = checkpoints.write(root / str(n_parts), checkpoints.cut(checkpoints.weights(), n_parts))
        for name, ftype in FTYPES.items():
            if n_parts == 4 and ftype > 1:
                continue  # rows of 16 weights don't make blocks
            for number, data in enumerate(historical.convert(folder, checkpoints.PARAMS, min(ftype, 1))):
                data = historical.quantize(data, ftype) if ftype > 1 else data
                ggml.part_path(folder / f"{name}.bin", number).write_bytes(data)
    return root


@pytest.fixture
def folder(made, tmp_path) -> Path:
    return Path(shutil.copytree(made / "2", tmp_path / "model"))


# --- what is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("type", ["f16", "f32"])
@pytest.mark.parametrize("n_parts", [1, 2, 4])
def test_every_weight_is_the_checkpoints(made, type, n_parts):
    checkpoint = ggml.read(made / str(n_parts) / f"{type}.bin")
    expected = meta.read(made / str(n_parts))
    assert checkpoint.config == expected.config
    assert len(checkpoint.files) == n_parts
    assert [*checkpoint.tensors] == [*expected.tensors]
    for name, tensor in expected.tensors.items():
        assert checkpoint.tensors[name].type == (type if len(tensor.shape) == 2 else "f32")
        assert np.array_equal(checkpoint.tensors[name].dequantize(), tensor.dequantize())


def test_a_tensor_may_be_as_large_as_its_file(tmp_path):
    """Of 7B, one layer: 931 MB of holes, which take no room on the disk."""
    config, path = replace(PRESETS["7B"], n_layers=1), tmp_path / "f16.bin"
    with path.open("wb") as file:
        file.write(headers.ggml_header(config, [b"a"] * config.vocab_size, 1))
        for name, shape in config.tensor_shapes().items():
            type = "f16" if len(shape) == 2 else "f32"
            file.write(headers.ggml_record(name, type, shape))
            file.seek(TYPES[type].nbytes(shape), 1)
        file.truncate(file.tell())
    assert ggml.read_part(path).pieces["output.weight"].nbytes == 32000 * 4096 * 2


@pytest.mark.parametrize(("type", "blocks"), [("q4_0", "q4_0_2023"), ("q4_1", "q4_1_2023")])
def test_one_part_and_two_hold_the_same_weights(made, type, blocks):
    whole, cut = (ggml.read(made / n_parts / f"{type}.bin") for n_parts in "12")
    for name, tensor in whole.tensors.items():
        assert tensor.type == (blocks if len(tensor.shape) == 2 else "f32")
        assert cut.tensors[name].shape == tensor.shape
        assert np.array_equal(cut.tensors[name].dequantize(), tensor.dequantize())


def make_planar(source: Path, target: Path) -> None:
    """The q4_0 file as llama.cpp wrote it on 10 March."""
    data = bytearray(source.read_bytes())
    for piece in ggml.read_part(source).pieces.values():
        if piece.type == "q4_0_2023":
            row_bytes = piece.row_bytes
            for start in range(piece.offset, piece.offset + piece.nbytes, row_bytes):
                blocks = [data[i : i + 20] for i in range(start, start + row_bytes, 20)]
                data[start : start + row_bytes] = b"".join(d[:4] for d in blocks) + b"".join(
                    d[4:] for d in blocks
                )
    target.write_bytes(data)


def test_both_layouts_of_q4_0_are_told_apart(folder):
    for suffix in ("", ".1"):
        make_planar(folder / f"q4_0.bin{suffix}", folder / f"planar.bin{suffix}")
    blocks, planar = ggml.read(folder / "q4_0.bin"), ggml.read(folder / "planar.bin")
    assert planar.tensors["output.weight"].type == "q4_0_2023_planar"
    for name, tensor in blocks.tensors.items():
        assert np.array_equal(planar.tensors[name].dequantize(), tensor.dequantize())


def test_the_layout_can_be_said(folder):
    path = folder / "q4_0.bin"
    assert ggml.read(path, "planar").tensors["output.weight"].type == "q4_0_2023_planar"
    assert ggml.read(path, "blocks").tensors["output.weight"].type == "q4_0_2023"
    checkpoints.refused(lambda: ggml.read(path, "round"), str(path), "blocks or planar")


def test_scales_that_are_absurd_either_way_are_refused(folder):
    path = folder / "q4_0.bin"
    data = bytearray(path.read_bytes())
    for piece in ggml.read_part(path).pieces.values():
        if piece.type == "q4_0_2023":
            data[piece.offset : piece.offset + piece.nbytes] = b"\xff" * piece.nbytes
    path.write_bytes(data)
    checkpoints.refused(lambda: ggml.read(path), str(path), "absurd")


def test_a_checkpoint_opens_by_its_file(made):
    assert open_checkpoint(made / "1" / "q4_0.bin").format == "ggml"


# --- what the file doesn't say --------------------------------------------------------------------


def test_norm_eps_comes_from_params_beside_it(folder):
    path = folder / "f16.bin"
    (folder / "params.json").write_text(
        json.dumps(checkpoints.PARAMS | {"norm_eps": 0.25, "rope_theta": 5e3})
    )
    config = ggml.read(path).config
    assert (config.norm_eps, config.rope_theta) == (0.25, 5e3)
    (folder / "params.json").write_text(json.dumps(checkpoints.PARAMS | {"norm_eps": 0.25, "n_layers": 3}))
    assert ggml.read(path).config.norm_eps == 1e-6
    (folder / "params.json").unlink()
    assert ggml.read(path).config.norm_eps == 1e-6


def test_metas_sizes_have_the_norm_eps_they_were_published_with():
    for preset in PRESETS.values():
        assert ggml.published_norm_eps(preset.dim) == preset.norm_eps


def test_the_tokenizer_is_beside_it_or_one_folder_up(folder):
    assert ggml.read(folder / "f16.bin").vocabulary.path == folder / "tokenizer.model"
    shutil.move(folder / "tokenizer.model", folder.parent)
    assert ggml.read(folder / "f16.bin").vocabulary.path == folder.resolve().parent / "tokenizer.model"


def test_without_a_tokenizer_the_vocabulary_is_rebuilt(folder):
    model = folder / "tokenizer.model"
    expected = vocabulary_from_model(model)
    model.unlink()
    vocabulary = ggml.read(folder / "f16.bin").vocabulary
    assert vocabulary.pieces == expected.pieces
    assert vocabulary.types == expected.types


def test_the_rebuilt_vocabulary_of_llama_is_exact(shared_data):
    model = shared_data / "llama_tokenizer" / "tokenizer.model"
    vocabulary = vocabulary_from_model(model)
    assert ggml.rebuild_vocabulary(token_texts(vocabulary)) == vocabulary


def test_another_models_tokenizer_is_left_alone(folder, shared_data):
    shutil.copyfile(shared_data / "llama_tokenizer" / "tokenizer.model", folder / "tokenizer.model")
    tokenizer = make_tokenizer(ggml.read(folder / "f16.bin").vocabulary)
    assert tokenizer.vocab_size == 400
    assert (
        tokenizer.decode(tokenizer.encode("the youngest was so beautiful")) == "the youngest was so beautiful"
    )


# --- parts ----------------------------------------------------------------------------------------


def test_a_missing_part_is_named(folder):
    (folder / "f16.bin.1").unlink()
    checkpoints.refused(lambda: ggml.read(folder / "f16.bin"), str(folder / "f16.bin.1"), "missing")


def test_a_later_part_alone_says_which_to_name(folder):
    checkpoints.refused(
        lambda: ggml.read(folder / "f16.bin.1"), "f16.bin.1", f"{folder / 'f16.bin'}", "one of 2 parts"
    )


def test_a_name_that_ends_in_a_number_may_be_a_first_part(folder):
    shutil.move(folder / "f16.bin", folder / "llama.1")
    shutil.move(folder / "f16.bin.1", folder / "llama.1.1")
    assert len(ggml.read(folder / "llama.1").files) == 2


def test_a_part_of_another_model_is_refused(made, folder):
    shutil.copyfile(made / "4" / "f16.bin.1", folder / "f16.bin.1")
    checkpoints.refused(lambda: ggml.read(folder / "f16.bin"), str(folder / "f16.bin.1"))
    shutil.copyfile(made / "2" / "q4_0.bin.1", folder / "f16.bin.1")
    checkpoints.refused(lambda: ggml.read(folder / "f16.bin"), str(folder / "f16.bin.1"))


def test_a_part_with_other_tokens_is_refused(folder):
    path = folder / "f16.bin.1"
    data = path.read_bytes()
    path.write_bytes(data[:36] + bytes([data[36] ^ 1]) + data[37:])
    checkpoints.refused(
        lambda: ggml.read(folder / "f16.bin"), str(path), "it has other hyper-parameters, tokens"
    )


# --- what is no ggml file -------------------------------------------------------------------------


def patch(offset: int, *numbers: int):
    return lambda data: (
        data[:offset] + struct.pack(f"<{len(numbers)}i", *numbers) + data[offset + 4 * len(numbers) :]
    )


def ggml_header_size(data: bytes) -> int:
    position = 32
    for _ in range(400):
        position += 4 + struct.unpack_from("<i", data, position)[0]
    return position


def patch_tensor(offset: int, *numbers: int):
    return lambda data: patch(ggml_header_size(data) + offset, *numbers)(data)


DAMAGES = {
    "nothing": lambda data: b"",
    "a web page": lambda data: b"<!DOCTYPE html><html>" * 100,
    "a git-lfs pointer": lambda data: b"version https://git-lfs.github.com/spec/v1\n",
    "noise": lambda data: np.random.default_rng(0).bytes(10_000),
    "a zip": lambda data: b"PK\x03\x04" + bytes(1000),
    "magic only": lambda data: data[:4],
    "half a header": lambda data: data[:20],
    "half a vocabulary": lambda data: data[:2000],
    "half of it": lambda data: data[: len(data) // 2],
    "all but a byte": lambda data: data[:-1],
    "no tensor": lambda data: data[: ggml_header_size(data)],
    "one byte more": lambda data: data + b"\0",
    "one tensor more": lambda data: data + struct.pack("<4i", 1, 1, 0, 1) + b"x" + bytes(4),
    "ggmf": lambda data: b"fmgg" + data[4:],
    "ggjt": lambda data: b"tjgg" + data[4:],
    "big-endian": lambda data: data[3::-1] + data[4:],
    "huge vocabulary": patch(4, 2**31 - 1),
    "negative vocabulary": patch(4, -1),
    "no vocabulary": patch(4, 0),
    "dim 0": patch(8, 0),
    "dim that heads don't divide": patch(8, 65),
    "multiple_of 0": patch(12, 0),
    "no heads": patch(16, 0),
    "huge layers": patch(20, 2**31 - 1),
    "one layer more": patch(20, 3),
    "one layer less": patch(20, 1),
    "wrong n_rot": patch(24, 8),
    "unknown ftype": patch(28, 7),
    "huge token": patch(32, 2**31 - 1),
    "negative token": patch(32, -5),
    "no axes": patch_tensor(0, 0),
    "three axes": patch_tensor(0, 3),
    "huge name": patch_tensor(4, 2**30),
    "no name": patch_tensor(4, 0),
    "unknown tensor type": patch_tensor(8, 4),
    "another tensor type": patch_tensor(8, 0),
    "rows of 33 in blocks": patch_tensor(8, 2, 33),
    "huge tensor": patch_tensor(12, 2**30, 2**30),
    "negative axis": patch_tensor(12, -32),
    "renamed tensor": lambda data: data.replace(b"norm.weight", b"morn.weight"),
    "same tensor twice": lambda data: data.replace(b"layers.1.attention.wq", b"layers.1.attention.wk"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_what_is_no_ggml_file_is_refused_with_its_name(folder, damage):
    path = folder / "f16.bin"
    path.write_bytes(damage(path.read_bytes()))
    checkpoints.refused(lambda: ggml.read(path), str(path))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("a web page", "a web page"),
        ("ggmf", "20 March 2023"),
        ("ggjt", "ggjt"),
        ("half of it", "truncated or damaged"),
        ("one byte more", "1 bytes follow its last tensor"),
        ("no tensor", "0 of 21 tensors"),
        ("renamed tensor", "is missing"),
    ],
)
def test_the_error_says_what_is_wrong(folder, damage, words):
    path = folder / "f16.bin"
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    checkpoints.refused(lambda: ggml.read(path), words)


def test_a_missing_file_is_named(tmp_path):
    checkpoints.refused(lambda: ggml.read(tmp_path / "no.bin"), str(tmp_path / "no.bin"), "No such file")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes_give_the_checkpoint_or_one_line(made, tmp_path, data):
    good = (made / "1" / "q4_0.bin").read_bytes()
    size = ggml_header_size(good)
    damaged = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        offset = data.draw(
            st.one_of(st.integers(0, 40), st.integers(size, size + 60), st.integers(0, len(good) - 1))
        )
        damaged[offset] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.bin"
    path.write_bytes(damaged)
    try:
        ggml.read(path)
    except TinyllamaError as error:
        assert "\n" not in str(error)
        assert str(path) in str(error)
