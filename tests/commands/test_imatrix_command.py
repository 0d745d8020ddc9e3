"""`imatrix` against sums that are written out from `Llama.trace`, and against what llama-imatrix collects."""

import json
import os
import signal
import threading
from pathlib import Path

import gguf
import numpy as np
import pytest

import tinyllama
from tinyllama.commands import imatrix as command
from tinyllama.commands import main
from tinyllama.commands.convert import convert
from tinyllama.errors import TinyllamaError, cancellable
from tinyllama.formats import imatrix as files
from tinyllama.llama import Llama

HELD_OUT = Path(__file__).parents[2] / "data" / "held_out.txt"
TEXT = HELD_OUT.read_text(encoding="utf-8")[:2000]
INPUTS = {
    "attn_q": "attention.norm",
    "attn_k": "attention.norm",
    "attn_v": "attention.norm",
    "attn_output": "attention.heads",
    "ffn_gate": "feed_forward.norm",
    "ffn_up": "feed_forward.norm",
    "ffn_down": "feed_forward.hidden",
}
QUIET = {"progress": False}


@pytest.fixture(scope="module")
def llama() -> Llama:
    return tinyllama.load("small", "numpy", 1)


@pytest.fixture
def run(capsys):
    """Run `imatrix` in this process: (exit status, stdout, stderr)."""

    def run(*argv: str):
        return main(["imatrix", "-t", "1", "--backend", "numpy", *argv]), *capsys.readouterr()

    return run


def expected(llama, chunk_size: int, n_chunks: int) -> dict[str, np.ndarray]:
    """The mean squares, the slow way: every value of every chunk is kept."""
    tokens, found = llama.tokenizer.encode(TEXT), {}
    for start in range(0, n_chunks * chunk_size, chunk_size):
        chunk = [llama.tokenizer.bos_id, *tokens[start + 1 : start + chunk_size]]
        taps = llama.trace(chunk)
        for layer in range(llama.config.n_layers):
            for matrix, tap in INPUTS.items():
                found.setdefault(f"blk.{layer}.{matrix}.weight", []).append(taps[f"layers.{layer}.{tap}"])
        found.setdefault("output.weight", []).append(taps["norm"])
    return {name: np.mean(np.concatenate(arrays) ** 2, axis=0) for name, arrays in found.items()}


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [64, 512, 10])
def test_every_mean_equals_the_definition(llama, batch_size):
    wanted = expected(llama, 64, 3)
    found = command.imatrix(llama, TEXT, 64, batch_size, chunks=3, process_output=True, **QUIET)
    assert (found.n_chunks, found.chunk_size) == (3, 64)
    assert set(found.counts.values()) == {3 * 64}
    assert found.means().keys() == wanted.keys()
    for name, means in found.means().items():
        np.testing.assert_allclose(means, wanted[name], rtol=1e-4, atol=1e-9, err_msg=name)


def test_the_output_matrix_counts_where_that_is_asked_for(llama):
    found = command.imatrix(llama, TEXT, 64, chunks=1, **QUIET)
    assert "output.weight" not in found.sums and len(found.sums) == 7 * llama.config.n_layers


def test_without_perplexity_the_sums_are_the_same(llama):
    found, other = (command.imatrix(llama, TEXT, 64, chunks=2, ppl=ppl, **QUIET) for ppl in (True, False))
    assert all(np.array_equal(sums, other.sums[name]) for name, sums in found.sums.items())


@pytest.mark.parametrize("backend", ["numpy", "c"])
def test_llama_imatrix_collects_the_same(backend):
    recorded = json.loads((Path(__file__).parents[1] / "golden" / "llama_imatrix.json").read_text())
    llama = tinyllama.load("small", backend, 2)
    text, size = HELD_OUT.read_text(encoding="utf-8"), recorded["chunk_size"]
    found = command.imatrix(llama, text, size, chunks=recorded["chunks"], process_output=True, **QUIET)
    assert found.means().keys() == recorded["means"].keys()
    for name, (mean, *first) in recorded["means"].items():
        ours = found.means()[name]
        # llama.cpp's cache holds 16-bit floats; backend c multiplies 8-bit integers
        np.testing.assert_allclose(ours.mean(), mean, rtol=1e-2, err_msg=name)
        np.testing.assert_allclose(ours[: len(first)], first, rtol=5e-2, err_msg=name)


def test_special_tokens_of_the_text_are_such_where_that_is_asked_for(smollm2_file):
    llama = tinyllama.load(str(smollm2_file))
    text = "<|im_start|>user\nHello there, how are you?<|im_end|>\n" * 3
    plain, special = (
        command.imatrix(llama, text, 16, parse_special=wanted, **QUIET) for wanted in (False, True)
    )
    assert plain.n_chunks > special.n_chunks


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def text_file(tmp_path) -> str:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return str(tmp_path / "text.txt")


def test_the_command_writes_a_file_and_says_what_it_is_for(run, text_file, tmp_path, llama):
    target = tmp_path / "out.gguf"
    argv = "-c", "64", "--chunks", "3", "-b", "16", "--process-output", "-o", str(target)
    status, out, err = run("-f", text_file, *argv)
    assert status == 0 and out.split() == [str(target), *out.split()[1:]] and out.count("\n") == 1
    assert "imatrix: 100%" in err and "perplexity" in err
    assert f"--imatrix {target}" in err.splitlines()[-1]
    found = files.read(target)
    assert found.datasets == (text_file,) and (found.n_chunks, found.chunk_size) == (3, 64)
    for name, means in expected(llama, 64, 3).items():
        np.testing.assert_allclose(found.means()[name], means, rtol=1e-4, atol=1e-9)
    assert len(gguf.GGUFReader(target).tensors) == 2 * len(found.sums)


def test_it_needs_a_chunk_of_text_and_a_place_for_its_file(run, text_file, tmp_path):
    for argv, wrong in (
        (["-c", "5000"], "the text has"),
        (["-o", str(tmp_path / "none" / "x.gguf")], "there is no folder"),
    ):
        status, out, err = run("-f", text_file, *argv)
        assert (status, out) == (1, "") and wrong in err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_it_replaces_neither_the_model_nor_the_text(run, text_file, tmp_path):
    model = tmp_path / "f16.gguf"
    convert("small", "f16", model, "gguf")
    before = model.read_bytes()
    for target in (str(model), text_file):
        status, out, err = run("-m", str(model), "-f", text_file, "-o", target)
        (line,) = err.splitlines()[-1:]
        wanted = f"tinyllama: {target}: would replace what it is made from: name another file to write"
        assert (status, out, line) == (1, "", wanted)
    assert model.read_bytes() == before
    with pytest.raises(TinyllamaError, match="would replace"):
        command.imatrix(model, TEXT, path=model)


def test_an_output_matrix_that_is_the_embedding_is_left_out_with_a_warning(smollm2_file):
    llama = tinyllama.load(str(smollm2_file))
    with pytest.warns(UserWarning, match="process_output is ignored"):
        found = command.imatrix(llama, TEXT, 8, chunks=1, process_output=True, **QUIET)
    assert "output.weight" not in found.sums


@pytest.mark.parametrize("often", [0.0, 1e9])
def test_an_interrupted_run_leaves_what_all_chunks_until_then_gave(
    llama, tmp_path, monkeypatch, capsys, often
):
    monkeypatch.setattr(command, "OFTEN", often)
    path, add = tmp_path / "x.gguf", command.Sums.add

    def add_three(self, chunk):
        if self.n_chunks == 3:
            os.kill(os.getpid(), signal.SIGINT)
        add(self, chunk)

    monkeypatch.setattr(command.Sums, "add", add_three)
    with pytest.raises(KeyboardInterrupt):
        command.imatrix(llama, TEXT, 64, path=path, **QUIET)
    found = files.read(path)
    assert found.n_chunks == 3 and set(found.counts.values()) == {3 * 64}
    assert f"{path}: has what the first 3 of" in capsys.readouterr().err
    for name, means in expected(llama, 64, 3).items():
        if name != "output.weight":
            np.testing.assert_allclose(found.means()[name], means, rtol=1e-4, atol=1e-9)


def test_a_run_that_is_stopped_before_anything_was_written_leaves_nothing(llama, tmp_path):
    stopped = threading.Event()
    stopped.set()
    with pytest.raises(TinyllamaError, match="cancelled"), cancellable(stopped):
        command.imatrix(llama, TEXT, 64, path=tmp_path / "x.gguf", **QUIET)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("text", [None, ["a", "b"], "", 3])
def test_what_is_no_text_is_refused(llama, text):
    with pytest.raises(TinyllamaError, match="there is no text to run"):
        command.imatrix(llama, text, **QUIET)


def test_a_model_is_loaded_as_load_does(llama):
    found = command.imatrix("small", TEXT, 64, chunks=1, backend="numpy", threads=1, **QUIET)
    other = command.imatrix(llama, TEXT, 64, chunks=1, **QUIET)
    assert all(np.array_equal(sums, other.sums[name]) for name, sums in found.sums.items())
    with pytest.raises(TinyllamaError, match="nowhere"):
        command.imatrix("small", TEXT, 64, backend="nowhere", **QUIET)


@pytest.mark.parametrize("wrong", [{"ctx_size": 4}, {"batch_size": 0}, {"chunks": 0}, {"chunks": 1.5}])
def test_sizes_that_make_no_sense_are_refused(llama, wrong):
    with pytest.raises(TinyllamaError, match=f"{next(iter(wrong))} must be at least"):
        command.imatrix(llama, TEXT, **wrong, **QUIET)
