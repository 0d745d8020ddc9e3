import errno
import json
import os
import pickle
import shutil
import sys
import zipfile
from dataclasses import replace

import checkpoints
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinyllama.config import Config
from tinyllama.errors import TinyllamaError
from tinyllama.formats import meta, open_checkpoint


@pytest.fixture
def folder(tmp_path):
    return checkpoints.write(tmp_path / "tiny")


def part_00(folder):
    return folder / "consolidated.00.pth"


def same(tensor, expected: torch.Tensor) -> bool:
    return np.array_equal(tensor.dequantize(), expected.float().numpy())


# --- what is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_weight_is_what_torch_loads(tmp_path, dtype):
    folder = checkpoints.write(tmp_path / "tiny", [checkpoints.weights(dtype=dtype)])
    expected = torch.load(part_00(folder), weights_only=True, mmap=True)
    checkpoint = meta.read(folder)
    assert [*checkpoint.tensors] == [name for name in expected if not name.endswith("freqs")]
    for name, tensor in checkpoint.tensors.items():
        assert tensor.shape == tuple(expected[name].shape)
        assert same(tensor, expected[name])


def test_weights_are_mapped_and_not_copied(folder):
    tensor = meta.read(folder).tensors["layers.1.feed_forward.w2.weight"]
    assert tensor.parts[0].base is not None
    assert not tensor.parts[0].flags.writeable


def test_hyper_parameters_come_from_params_and_the_embedding(folder):
    checkpoint = meta.read(folder)
    assert checkpoint.config == checkpoints.CONFIG
    assert checkpoint.format == "meta"
    assert checkpoint.files == [part_00(folder)]


def test_a_checkpoint_opens_by_its_folder_or_one_of_its_files(folder):
    for path in (folder, part_00(folder), folder / "params.json"):
        assert open_checkpoint(path).config == checkpoints.CONFIG


def test_the_tokenizer_may_lie_one_folder_up(folder):
    shutil.move(folder / "tokenizer.model", folder.parent)
    assert meta.read(folder).vocabulary.model == folder.resolve().parent / "tokenizer.model"


@pytest.mark.parametrize("n_parts", [2, 4])
def test_parts_become_whole_tensors(tmp_path, n_parts):
    state = checkpoints.weights()
    folder = checkpoints.write(tmp_path / "cut", checkpoints.cut(state, n_parts))
    checkpoint = meta.read(folder)
    assert len(checkpoint.files) == n_parts
    for name, tensor in checkpoint.tensors.items():
        assert same(tensor, state[name])


def test_parameters_and_views_of_one_storage_are_read(tmp_path):
    state = checkpoints.weights()
    both = torch.stack([state["norm.weight"], state["norm.weight"] + 1])
    state["norm.weight"] = both[1]
    state["output.weight"] = torch.nn.Parameter(state["output.weight"])
    folder = checkpoints.write(tmp_path / "tiny", [state])
    tensors = meta.read(folder).tensors
    assert same(tensors["norm.weight"], both[1])
    assert same(tensors["output.weight"], state["output.weight"].detach())


def test_grouped_query_attention_is_read(tmp_path):
    config = Config(64, 1, 4, vocab_size=400, hidden_dim=192, n_kv_heads=2, multiple_of=32)
    params = checkpoints.PARAMS | {"n_kv_heads": 2, "n_layers": 1}
    state = checkpoints.weights(config)
    state = {name: tensor for name, tensor in state.items() if "freqs" not in name}
    assert meta.read(checkpoints.write(tmp_path / "gqa", [state], params)).config == config


def test_the_checklist_gives_the_md5_of_each_file(folder):
    (folder / "checklist.chk").write_text("0123456789abcdef0123456789ABCDEF  consolidated.00.pth\n")
    assert meta.read_checklist(folder) == {"consolidated.00.pth": "0123456789abcdef0123456789abcdef"}


# --- what isn't a checkpoint ----------------------------------------------------------------------


def rewrite(path, change=lambda name, data: data, compression=zipfile.ZIP_STORED):
    """Write the archive again; members that `change` turns into None are left out."""
    with zipfile.ZipFile(path) as archive:
        members = [(name, change(name, archive.read(name))) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members:
            if data is not None:
                archive.writestr(name, data)


def change_state(change):
    def damage(path):
        state = torch.load(path)
        change(state)
        torch.save(state, path)

    return damage


def rename(state, old, new):
    state[new] = state.pop(old)


DAMAGES = {
    "a web page": lambda path: path.write_text("<!DOCTYPE html><html><body>Access denied</body></html>"),
    "nothing": lambda path: path.write_bytes(b""),
    "nothing but zeros": lambda path: path.write_bytes(bytes(5000)),
    "a git-lfs pointer": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid x\n"),
    "noise": lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)),
    "half of it": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "all but a byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "a byte more": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "torch before 1.6": lambda path: torch.save(
        {"norm.weight": torch.ones(3)}, path, _use_new_zipfile_serialization=False
    ),
    "compressed": lambda path: rewrite(path, compression=zipfile.ZIP_DEFLATED),
    "another zip archive": lambda path: rewrite(path, lambda name, data: None if "pkl" in name else data),
    "big-endian": lambda path: rewrite(path, lambda name, data: b"big" if "byteorder" in name else data),
    "a storage is missing": lambda path: rewrite(path, lambda name, data: None if "data/3" in name else data),
    "a storage is short": lambda path: rewrite(
        path, lambda name, data: data[:50] if "data/3" in name else data
    ),
    "a pickle is no pickle": lambda path: rewrite(path, lambda name, data: b"?" if "pkl" in name else data),
    "a list": lambda path: torch.save([torch.ones(3)], path),
    "a dict in a dict": lambda path: torch.save({"model": {"norm.weight": torch.ones(3)}}, path),
    "an empty dict": lambda path: torch.save({}, path),
    "transposed": change_state(lambda state: state.update({"output.weight": torch.ones(64, 400).half().t()})),
    "integers": change_state(lambda state: state.update({"output.weight": torch.ones(400, 64, dtype=int)})),
    "three axes": change_state(lambda state: state.update({"output.weight": torch.ones(4, 100, 64).half()})),
    "wrong shape": change_state(lambda state: state.update({"norm.weight": torch.ones(65).half()})),
    "lacks a tensor": change_state(lambda state: state.pop("layers.1.ffn_norm.weight")),
    "lacks embeddings": change_state(lambda state: state.pop("tok_embeddings.weight")),
    "one tensor too many": change_state(lambda state: state.update({"head.bias": torch.ones(3).half()})),
    "Hugging Face's names": change_state(
        lambda state: rename(state, "tok_embeddings.weight", "model.embed_tokens.weight")
    ),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_what_is_no_checkpoint_is_refused_with_its_name(folder, damage):
    damage(part_00(folder))
    checkpoints.refused(lambda: meta.read(folder), str(part_00(folder)))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("a web page", "a web page"),
        ("half of it", "cut short"),
        ("torch before 1.6", "torch older than 1.6"),
        ("compressed", "compressed"),
        ("transposed", "contiguous"),
        ("lacks a tensor", "layers.1.ffn_norm.weight"),
        ("wrong shape", "norm.weight has the shape [65], not [64]"),
        ("integers", "LongStorage"),
    ],
)
def test_the_error_says_what_is_wrong(folder, damage, words):
    DAMAGES[damage](part_00(folder))
    checkpoints.refused(lambda: meta.read(folder), words)


class Malice:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("call", "name"),
    [
        ((os.mkdir, ("proof",)), "mkdir"),
        ((eval, ("__import__('os').mkdir('proof')",)), "eval"),
        ((torch.load, ("proof",)), "torch"),
    ],
)
def test_a_pickle_that_wants_to_run_code_is_refused_and_doesnt_run(folder, monkeypatch, call, name):
    monkeypatch.chdir(folder)
    data = pickle.dumps({"norm.weight": Malice(*call)}, protocol=2)
    rewrite(part_00(folder), lambda member, old: data if member.endswith("data.pkl") else old)
    checkpoints.refused(lambda: meta.read(folder), str(part_00(folder)), "wants to run", name)
    assert not (folder / "proof").exists()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes_give_the_checkpoint_or_one_line(tmp_path, data):
    path = part_00(checkpoints.write(tmp_path / "tiny")) if not (tmp_path / "tiny").exists() else None
    path = path or part_00(tmp_path / "tiny")
    good = path.read_bytes()
    start = good.index(b"data.pkl")
    damaged = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        inside = st.one_of(st.integers(0, start + 3000), st.integers(len(good) - 4000, len(good) - 1))
        damaged[data.draw(inside)] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    try:
        meta.read(path.parent)
    except TinyllamaError as error:
        assert "\n" not in str(error)
    finally:
        path.write_bytes(good)


# --- what is missing around it --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["consolidated.00.pth", "params.json", "tokenizer.model"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    checkpoints.refused(lambda: meta.read(folder), str(folder / name), "missing")


def test_a_missing_folder_is_named(tmp_path):
    checkpoints.refused(lambda: meta.read(tmp_path / "65B"), str(tmp_path / "65B"), "no such folder")


@pytest.mark.parametrize("missing", [0, 1, 3])
def test_a_missing_part_is_named(tmp_path, missing):
    folder = checkpoints.write(tmp_path / "cut", checkpoints.cut(checkpoints.weights(), 4))
    path = folder / f"consolidated.0{missing}.pth"
    path.unlink()
    checkpoints.refused(lambda: meta.read(folder), str(path), "missing")


def test_a_part_too_many_is_named(folder):
    shutil.copy(part_00(folder), folder / "consolidated.01.pth")
    checkpoints.refused(lambda: meta.read(folder), str(folder / "consolidated.01.pth"), "too many")


def test_a_part_of_another_cut_is_named(tmp_path):
    state = checkpoints.weights()
    folder = checkpoints.write(tmp_path / "cut", checkpoints.cut(state, 2))
    torch.save(checkpoints.cut(state, 4)[1], folder / "consolidated.01.pth")
    checkpoints.refused(lambda: meta.read(folder), str(folder / "consolidated.01.pth"))


@pytest.mark.parametrize(
    "params",
    [
        "<html>",
        "[1, 2]",
        "{}",
        '{"dim": 64}',
        json.dumps(checkpoints.PARAMS | {"dim": 0}),
        json.dumps(checkpoints.PARAMS | {"dim": "wide"}),
        json.dumps(checkpoints.PARAMS | {"dim": None}),
        json.dumps(checkpoints.PARAMS | {"n_heads": 5}),
        json.dumps(checkpoints.PARAMS | {"n_heads": 0}),
        json.dumps(checkpoints.PARAMS | {"n_layers": -1}),
        json.dumps(checkpoints.PARAMS | {"n_layers": 10**12}),
        json.dumps(checkpoints.PARAMS | {"multiple_of": 0}),
        json.dumps(checkpoints.PARAMS | {"vocab_size": 32000}),
        "[" * 100_000,
    ],
)
def test_params_that_cant_be_true_are_refused_with_their_name(folder, params):
    (folder / "params.json").write_text(params)
    checkpoints.refused(lambda: meta.read(folder), str(folder / "params.json"))


def test_tensors_that_dont_divide_into_the_parts_are_refused(tmp_path):
    config = replace(checkpoints.CONFIG, vocab_size=401)
    parts = checkpoints.cut(checkpoints.weights(config), 2)
    for part in parts:
        part["output.weight"] = part["output.weight"][:200].clone()
    folder = checkpoints.write(tmp_path / "cut", parts)
    checkpoints.refused(lambda: meta.read(folder), "output.weight [401, 64] doesn't divide into 2 parts")


# --- cutting --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_split_cuts_as_meta_did(tmp_path, dtype):
    state = checkpoints.weights(dtype=dtype)
    folder = checkpoints.write(tmp_path / "whole", [state])
    paths = meta.split(folder, tmp_path / "cut", 2)
    assert [path.name for path in paths] == ["consolidated.00.pth", "consolidated.01.pth"]
    for path, expected in zip(paths, checkpoints.cut(state, 2), strict=True):
        written = torch.load(path, weights_only=True)
        for name, tensor in written.items():
            assert tensor.dtype == dtype
            assert torch.equal(tensor, expected[name])
        assert len(written) == len(expected) - 1  # without freqs


def test_a_split_checkpoint_is_complete_and_the_same(folder, tmp_path):
    meta.split(folder, tmp_path / "cut", 4)
    whole, cut = meta.read(folder), meta.read(tmp_path / "cut")
    assert cut.config == whole.config
    for name, tensor in whole.tensors.items():
        assert np.array_equal(cut.tensors[name].dequantize(), tensor.dequantize())
        assert np.array_equal(cut.tensors[name].dequantize(3, 50), tensor.dequantize(3, 50))


def test_split_refuses_what_doesnt_divide_and_writes_nothing(folder, tmp_path):
    checkpoints.refused(lambda: meta.split(folder, tmp_path / "cut", 3), str(folder), "3 parts")
    checkpoints.refused(lambda: meta.split(folder, tmp_path / "cut", 0), str(folder))
    assert not (tmp_path / "cut").exists()


def test_split_never_replaces_the_checkpoint_itself(folder):
    before = part_00(folder).read_bytes()
    checkpoints.refused(lambda: meta.split(folder, folder, 2), str(folder))
    assert part_00(folder).read_bytes() == before


def test_a_split_that_fails_leaves_no_half_part(folder, tmp_path, monkeypatch):
    def fill_the_disk(state, file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", fill_the_disk)
    first = tmp_path / "cut" / "consolidated.00.pth"
    checkpoints.refused(lambda: meta.split(folder, tmp_path / "cut", 2), f"{first}: No space left on device")
    assert not list((tmp_path / "cut").iterdir())


def test_split_without_torch_says_so(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    checkpoints.refused(lambda: meta.split(folder, tmp_path / "cut", 2), "torch")
