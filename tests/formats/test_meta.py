import argparse
import json
import os
import pickle
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import checkpoints
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tinyllama.config import PRESETS, Config, RopeScaling
from tinyllama.errors import TinyllamaError
from tinyllama.formats import meta, open_checkpoint, stamp


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
    checkpoint = meta.read(folder)
    (piece,) = checkpoint.tensors["layers.1.feed_forward.w2.weight"].pieces
    assert piece.data is checkpoint.files[0]
    assert np.shares_memory(piece.blocks(), np.frombuffer(checkpoint.files[0], np.uint8))


def test_params_json_of_7b_gives_the_7b_preset():
    params = {
        "dim": 4096,
        "multiple_of": 256,
        "n_heads": 32,
        "n_layers": 32,
        "norm_eps": 1e-06,
        "vocab_size": -1,
    }
    assert meta.config_of(params, vocab_size=32000) == PRESETS["7B"]


def test_params_json_of_llama_2_70b_and_llama_3_8b_are_understood():
    llama2 = {"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8}
    config = meta.config_of(llama2 | {"n_layers": 80, "norm_eps": 1e-05}, 32000)
    assert (config.hidden_dim, config.kv_dim) == (28672, 1024)
    llama3 = {"dim": 4096, "multiple_of": 1024, "ffn_dim_multiplier": 1.3, "n_heads": 32, "n_kv_heads": 8}
    config = meta.config_of(llama3 | {"n_layers": 32, "norm_eps": 1e-05, "rope_theta": 500000.0}, 128256)
    assert (config.hidden_dim, config.rope_theta) == (14336, 500000.0)
    assert config.n_params() == 8_030_261_248


LLAMA1 = {"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 256, "norm_eps": 1e-6, "vocab_size": -1}
LLAMA2 = LLAMA1 | {"norm_eps": 1e-5}
LLAMA3 = LLAMA2 | {"n_kv_heads": 8, "multiple_of": 1024, "ffn_dim_multiplier": 1.3, "rope_theta": 5e5}
LLAMA31 = LLAMA3 | {"use_scaled_rope": True}
LLAMA32 = LLAMA31 | {"dim": 2048, "n_layers": 16, "multiple_of": 256, "ffn_dim_multiplier": 1.5}
MISTRAL = {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "hidden_dim": 14336, "head_dim": 128}
MISTRAL |= {"norm_eps": 1e-5, "sliding_window": 4096, "vocab_size": 32000}
NEMO = MISTRAL | {
    "dim": 5120,
    "n_layers": 40,
    "rope_theta": 1e6,
    "vocab_size": 131072,
    "sliding_window": None,
}


@pytest.mark.parametrize(
    ("params", "context"),
    [
        (LLAMA1, 2048),
        (LLAMA1 | {"dim": 8192, "n_layers": 80, "n_heads": 64, "norm_eps": 1e-5}, 2048),
        (LLAMA2, 4096),
        (LLAMA2 | {"dim": 8192, "n_layers": 80, "n_heads": 64, "n_kv_heads": 8, "multiple_of": 4096}, 4096),
        (LLAMA2 | {"rope_theta": 1e6}, 16384),
        (LLAMA3, 8192),
        (LLAMA31, 131072),
        (MISTRAL, 32768),
        (NEMO, 131072),
        (LLAMA1 | {"max_seq_len": 512}, 512),
        (MISTRAL | {"max_position_embeddings": 8192}, 8192),
    ],
)
def test_the_context_is_what_such_models_were_trained_on_or_what_the_file_says(params, context):
    assert meta.config_of(params, 32000).max_seq_len == context


def test_rope_is_scaled_as_llama_3_1_and_3_2_have_it():
    assert meta.config_of(LLAMA3, 128256).rope_scaling is None
    assert meta.config_of(LLAMA31, 128256).rope_scaling == RopeScaling("llama3", 8.0, 8192)
    assert meta.config_of(LLAMA32, 128256).rope_scaling == RopeScaling("llama3", 32.0, 8192)
    own = {"rope_scaling_factor": 16, "rope_high_freq_factor": 2}
    expected = RopeScaling("llama3", 16.0, 8192, high_freq_factor=2.0)
    assert meta.config_of(LLAMA32 | own, 128256).rope_scaling == expected
    assert (meta.config_of(LLAMA32, 128256).hidden_dim, meta.config_of(LLAMA32, 128256).head_dim) == (
        8192,
        64,
    )


def test_params_json_of_mistral_is_understood():
    config = meta.config_of(MISTRAL, 32000)
    assert (config.hidden_dim, config.head_dim, config.sliding_window, config.rope_theta) == (
        14336,
        128,
        4096,
        1e4,
    )
    config = meta.config_of(NEMO, 131072)
    assert (config.q_dim, config.dim, config.sliding_window) == (4096, 5120, 0)


@pytest.mark.parametrize("key", ["moe", "vision_encoder", "quantization_args", "lora", "yarn"])
def test_what_is_computed_in_another_way_is_refused_by_its_key(folder, key):
    (folder / "params.json").write_text(json.dumps(checkpoints.PARAMS | {key: {"a": 1}}))
    checkpoints.refused(lambda: meta.read(folder), f"{folder / 'params.json'}: {key} stands for")


def wide(tmp_path, params, head_dim=16):
    """A checkpoint with heads of their own width, hidden_dim 100, and 80 more embeddings than tokens."""
    config = Config(64, 2, 4, vocab_size=480, hidden_dim=100, n_kv_heads=2, head_dim=head_dim)
    state = {name: tensor for name, tensor in checkpoints.weights(config).items() if "freqs" not in name}
    return config, state, checkpoints.write(tmp_path / "wide", [state], params)


SHORT = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}


@pytest.mark.parametrize(
    ("params", "head_dim"),
    [
        ({"hidden_dim": 100, "head_dim": 24, "vocab_size": 480}, 24),
        ({"hidden_dim": 100, "head_dim": 24}, 24),
        ({"vocab_size": 480}, 24),  # the shapes say the rest
        ({}, 16),
    ],
)
def test_what_params_json_doesnt_say_is_read_from_the_shapes(tmp_path, params, head_dim):
    config, state, folder = wide(tmp_path, SHORT | params, head_dim)
    found = meta.read(folder)
    assert (found.config.hidden_dim, found.config.head_dim) == (100, head_dim)
    assert found.config.tensor_shapes() == config.tensor_shapes()
    assert len(found.vocabulary.pieces) == 480
    for name, tensor in found.tensors.items():
        assert same(tensor, state[name])


@pytest.mark.parametrize("cut", [False, True])
def test_weights_may_lie_in_safetensors(tmp_path, cut):
    _, state, folder = wide(tmp_path, SHORT)
    part_00(folder).unlink()
    if cut:
        places = {name: f"consolidated-{number % 3}.safetensors" for number, name in enumerate(state)}
        for file in set(places.values()):
            save_file({name: state[name] for name in state if places[name] == file}, folder / file)
        (folder / "consolidated.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    else:
        save_file(state, folder / "consolidated.safetensors")
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.format, len(checkpoint.files)) == ("meta", 3 if cut else 1)
    assert len(stamp(folder)) > len(checkpoint.files)
    for name, tensor in checkpoint.tensors.items():
        assert same(tensor, state[name])
    (folder / f"consolidated{'-1' * cut}.safetensors").unlink()
    words = "consolidated-1.safetensors: is missing" if cut else "consolidated.00.pth: is missing"
    checkpoints.refused(lambda: open_checkpoint(folder), words)


def test_the_output_matrix_may_be_the_embedding(tmp_path):
    state = checkpoints.weights()
    del state["output.weight"]
    assert "output.weight" not in meta.read(checkpoints.write(tmp_path / "tied", [state])).tensors


def test_hyper_parameters_come_from_params_and_the_embedding(folder):
    checkpoint = meta.read(folder)
    assert checkpoint.config == checkpoints.CONFIG
    assert checkpoint.format == "meta"
    assert [file.path for file in checkpoint.files] == [part_00(folder)]


def test_a_checkpoint_opens_by_its_folder_or_one_of_its_files(folder):
    for path in (folder, part_00(folder), folder / "params.json"):
        assert meta.recognizes(path)
        assert open_checkpoint(path).config == checkpoints.CONFIG


def test_other_files_and_folders_are_not_taken_for_a_checkpoint(folder, tmp_path):
    assert not meta.recognizes(folder / "tokenizer.model")
    assert not meta.recognizes(tmp_path)
    checkpoints.refused(lambda: open_checkpoint(tmp_path), str(tmp_path), "consolidated.00.pth")


@pytest.mark.parametrize(
    "name", ["consolidated.00.pth", "params.json", "tokenizer.model", "../tokenizer.model"]
)
def test_the_stamp_changes_with_every_file_that_is_read(folder, name):
    before = stamp(folder)
    assert stamp(folder) == before
    with (folder / name).open("ab") as file:
        file.write(b" ")
    assert stamp(folder) != before


def test_the_tokenizer_may_lie_one_folder_up(folder):
    expected = meta.read(folder).vocabulary
    shutil.move(folder / "tokenizer.model", folder.parent)
    assert meta.read(folder).vocabulary == expected


@pytest.mark.parametrize("beside", ["the link", "its target", "both"])
def test_of_a_linked_folder_the_tokenizer_may_lie_beside_the_link_or_its_target(folder, tmp_path, beside):
    link, target = tmp_path / "models" / "7B", tmp_path / "big" / "7B"
    link.parent.mkdir()
    target.parent.mkdir()
    shutil.move(folder, target)
    link.symlink_to(target)
    places = [
        path.parent
        for path in (link, target)
        if beside in ("both", "the link" if path == link else "its target")
    ]
    for place in places:
        shutil.copy(target / "tokenizer.model", place)
    (target / "tokenizer.model").unlink()
    assert open_checkpoint(link).vocabulary.path == places[0] / "tokenizer.model"
    before = stamp(link)
    with (places[0] / "tokenizer.model").open("ab") as file:
        file.write(b" ")
    assert stamp(link) != before


@pytest.mark.parametrize("n_parts", [2, 4])
def test_parts_become_whole_tensors(tmp_path, n_parts):
    state = checkpoints.weights()
    folder = checkpoints.write(tmp_path / "cut", checkpoints.cut(state, n_parts))
    checkpoint = meta.read(folder)
    assert len(checkpoint.files) == n_parts
    for name, tensor in checkpoint.tensors.items():
        assert same(tensor, state[name])


@pytest.mark.parametrize("n_parts", [2, 4])
@pytest.mark.parametrize("vocab_size", [-1, 400])
def test_parts_cut_as_llama_3s_become_whole_tensors(tmp_path, n_parts, vocab_size):
    state = checkpoints.weights()
    parts = checkpoints.cut(state, n_parts)
    for part, rows in zip(parts, state["tok_embeddings.weight"].chunk(n_parts), strict=True):
        part["tok_embeddings.weight"] = rows.clone()
    params = checkpoints.PARAMS | {"vocab_size": vocab_size}
    folder = checkpoints.write(tmp_path / "cut", parts, params)
    checkpoint = meta.read(folder)
    assert checkpoint.config == checkpoints.CONFIG
    for name, tensor in checkpoint.tensors.items():
        assert same(tensor, state[name])
    (folder / f"consolidated.0{n_parts - 1}.pth").unlink()
    checkpoints.refused(lambda: meta.read(folder), f"consolidated.0{n_parts - 1}.pth: is missing")


def train(state: dict) -> dict:
    """What a training saves, as that of nanoGPT and llama2.c."""
    moments = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(4, 4), "exp_avg_sq": torch.zeros(4, 4)}
    group = {"lr": 5e-4, "betas": (0.9, 0.95), "amsgrad": False, "maximize": None, "params": [0, 1]}
    config = {"out_dir": "out", "lr": 5e-4, "compile": True, "tags": ["a", ("b", None)], "path": Path("x")}
    return {
        "optimizer": {"state": {0: moments, 1: moments}, "param_groups": [group]},
        "model": {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
        "model_args": argparse.Namespace(dim=64, dropout=0.0),
        "iter_num": 1,
        "best_val_loss": torch.tensor(1.5),
        "numbers": {"loss": np.float64(1.5), "random": np.arange(3), "seen": {1, 2}, "dtype": torch.float16},
        "config": config,
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state, "iter_num": 1, "best_val_loss": 1.5},
        lambda state: {"epoch": 3, "state_dict": {f"module.{name}": state[name] for name in state}},
        train,
    ],
)
def test_weights_are_found_in_what_a_training_saves_in_any_protocol(tmp_path, protocol, wrap):
    state, folder = checkpoints.weights(), checkpoints.write(tmp_path / "tiny")
    torch.save(wrap(state), part_00(folder), pickle_protocol=protocol)
    tensors = meta.read(folder).tensors
    assert tensors.keys() == {name for name in state if not name.endswith("freqs")}
    for name, tensor in tensors.items():
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


def test_tied_and_overlapping_views_are_read_as_torch_reads_them(tmp_path):
    state = checkpoints.weights()
    both = torch.cat([state["layers.0.attention.wq.weight"], state["layers.1.attention.wq.weight"]])
    state["output.weight"] = state["tok_embeddings.weight"]
    state["layers.0.attention.wq.weight"], state["layers.1.attention.wq.weight"] = both[:64], both[32:96]
    tensors = meta.read(checkpoints.write(tmp_path / "tiny", [state])).tensors
    for name, tensor in tensors.items():
        assert same(tensor, state[name])


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
    "an optimizer's state": lambda path: torch.save({"state": {0: {"exp_avg": torch.ones(3)}}}, path),
    "a model as an object": lambda path: torch.save(torch.nn.Linear(3, 3), path),
    "shapes alone": change_state(lambda state: state.update({n: state[n].to("meta") for n in state})),
    "float8": change_state(
        lambda state: state.update({"output.weight": torch.ones(400, 64).to(torch.float8_e4m3fn)})
    ),
    "two prefixes": change_state(lambda state: state.update({"module.norm.weight": torch.ones(64)})),
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
        ("shapes alone", "holds no data: its tensors have shapes alone"),
        ("a model as an object", "save the model's state_dict() alone"),
        ("float8", "output.weight: torch float8_e4m3fn can't be read"),
        ("compressed", "compressed"),
        ("transposed", "contiguous"),
        ("lacks a tensor", "layers.1.ffn_norm.weight"),
        ("wrong shape", "norm.weight has the shape [65], not [64]"),
        ("integers", "output.weight: torch LongStorage can't be read"),
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


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("consolidated.00.pth", "is missing"),
        ("params.json", "No such file"),
        ("tokenizer.model", "is missing, and it isn't one folder up either"),
    ],
)
def test_a_missing_file_is_named(folder, name, words):
    (folder / name).unlink()
    checkpoints.refused(lambda: meta.read(folder), f"{folder / name}: {words}")


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


@pytest.mark.parametrize("n_parts", [2, 4])
def test_a_checkpoint_in_parts_is_the_same_model(folder, tmp_path, n_parts):
    whole, cut = meta.read(folder), meta.read(checkpoints.split(folder, tmp_path / "cut", n_parts))
    assert cut.config == whole.config
    for name, tensor in whole.tensors.items():
        assert np.array_equal(cut.tensors[name].dequantize(), tensor.dequantize())
        assert np.array_equal(cut.tensors[name].dequantize(3, 50), tensor.dequantize(3, 50))
