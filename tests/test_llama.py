import gc
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import tinyllama
from tinyllama.backends import available, get_backend
from tinyllama.backends import numpy as numpy_backend
from tinyllama.commands.convert import convert
from tinyllama.errors import Cancelled, TinyllamaError
from tinyllama.formats import open_checkpoint
from tinyllama.lab.lessons import same
from tinyllama.machine import limits, places
from tinyllama.machine.download import small_folder

STORY = "Once upon a time"


def free_memory(monkeypatch, n_bytes: int) -> None:
    for module in (numpy_backend, limits):
        monkeypatch.setattr(module, "available_memory", lambda: n_bytes)


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(small_folder(), tmp_path / "small")


def test_a_loaded_model_is_returned_again(folder):
    assert tinyllama.load(folder) is tinyllama.load(folder)


def test_a_changed_file_is_loaded_anew(folder):
    before = tinyllama.load(folder)
    weights = folder / "consolidated.00.pth"
    weights.write_bytes(weights.read_bytes())
    assert tinyllama.load(folder) is not before


@pytest.mark.parametrize("name", ["model[1].gguf", "**.gguf", "a?.gguf"])
def test_a_changed_file_whose_name_is_a_pattern_is_loaded_anew(folder, name):
    (path,) = convert(folder, 1, folder / name, "gguf")
    before = tinyllama.load(path)
    assert tinyllama.load(path) is before
    os.utime(path, ns=(0, 0))
    assert tinyllama.load(path) is not before


def test_a_changed_tokenizer_is_loaded_anew(folder):
    before = tinyllama.load(folder)
    model = folder / "tokenizer.model"
    model.write_bytes(model.read_bytes())
    assert tinyllama.load(folder) is not before


def test_another_backend_or_number_of_threads_is_another_model(folder):
    assert tinyllama.load(folder, "numpy", 1) is not tinyllama.load(folder, "numpy", 2)


BACKENDS = [name for name, reason in available().items() if reason is None]


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "mlx"])  # which copies all weights
def test_a_mapped_model_says_what_a_loaded_one_says(folder, backend):
    loaded, mapped = tinyllama.load(folder, backend), tinyllama.load(folder, backend, mmap=True)
    assert mapped is not loaded and mapped.mapped and not loaded.mapped
    np.testing.assert_allclose(mapped.logits(STORY), loaded.logits(STORY), rtol=0, atol=1e-4)
    if backend == "c":
        np.testing.assert_array_equal(mapped.logits(STORY), loaded.logits(STORY))


def test_generate_and_stream_run_from_the_mapped_file_too(folder):
    text = tinyllama.generate(STORY, folder, n_predict=5, seed=1, mmap=True)
    assert "".join(tinyllama.stream(STORY, folder, n_predict=5, seed=1, mmap=True)) == text
    assert tinyllama.load(folder, mmap=True).mapped


def test_mapped_weights_need_no_memory_to_be_loaded_but_a_warning(folder, monkeypatch):
    checkpoint = open_checkpoint(folder)
    needed = get_backend("numpy").memory(checkpoint.config, checkpoint.tensors, 2048, mmap=True)
    assert needed["weights"] == sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    free_memory(monkeypatch, sum(needed.values()) - 1)
    with pytest.warns(UserWarning, match="every token will read the disk"):
        tinyllama.load(folder, "numpy", mmap=True)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists what is mapped")
@pytest.mark.parametrize("mmap", [False, True])
def test_the_file_is_let_go_with_the_model(folder, mmap):
    llama = tinyllama.load(folder, mmap=mmap)
    assert llama.generate(STORY, n_predict=2)
    assert str(folder) in Path("/proc/self/maps").read_text()
    llama.close()
    del llama
    gc.collect()
    assert str(folder) not in Path("/proc/self/maps").read_text()


def test_after_close_a_model_is_gone_and_loaded_anew(folder):
    first = tinyllama.load(folder)
    first.close()
    first.close()
    with pytest.raises(TinyllamaError, match="closed"):
        first.generate(STORY)
    assert tinyllama.load(folder) is not first


def test_leaving_a_with_statement_closes_the_model(folder):
    with tinyllama.load(folder) as llama:
        assert llama.generate(STORY, n_predict=2)
    with pytest.raises(TinyllamaError, match="closed"):
        llama.logits(STORY)


def test_logits_have_a_row_a_token():
    llama = tinyllama.load("small")
    assert llama.logits(STORY).shape == (len(llama.tokens(STORY)), llama.config.vocab_size)


def test_trace_keeps_what_its_patterns_name():
    llama = tinyllama.load("small")
    taps = llama.trace("The first man", "layers.*.attention.weights", "layers.1.residual")
    n_tokens, c = len(llama.tokens("The first man")), llama.config
    names = [f"layers.{i}.attention.weights" for i in range(c.n_layers)]
    assert set(taps) == {*names, "layers.1.residual"}
    assert taps[names[0]].shape == (c.n_heads, n_tokens, n_tokens)
    assert taps["layers.1.residual"].shape == (n_tokens, c.dim)


def test_trace_without_patterns_keeps_everything():
    llama = tinyllama.load("small")
    assert same(llama.trace("The")["logits"], llama.logits("The"), llama)


def test_a_pattern_that_names_nothing_is_an_error():
    with pytest.raises(TinyllamaError, match=r"layers\.99"):
        tinyllama.load("small").trace("The", "layers.99.*")


def test_two_python_threads_get_what_each_gets_alone():
    llama = tinyllama.load("small", threads=2)
    alone = [llama.generate(STORY, seed=seed, n_predict=20) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: llama.generate(STORY, seed=seed, n_predict=20), range(4)))
    assert together == alone


@pytest.mark.parametrize("name", ["no-such-model", "models/70B/none.gguf"])
def test_a_model_that_is_not_there_is_named(name):
    with pytest.raises(TinyllamaError, match=name):
        tinyllama.load(name)


def test_a_model_that_was_not_downloaded_says_how_to(monkeypatch, tmp_path):
    monkeypatch.setattr(places, "models_folder", lambda: tmp_path)
    with pytest.raises(TinyllamaError, match="tinyllama download smollm2"):
        tinyllama.load("smollm2")


def test_a_model_that_needs_more_memory_than_there_is_is_refused_with_the_figures(folder, monkeypatch):
    free_memory(monkeypatch, 10_000_000)
    with pytest.raises(TinyllamaError, match=r"needs .* MB of memory, and 10 MB are free"):
        tinyllama.load(folder)


def test_weights_that_stay_in_their_file_are_warned_of_instead(folder, monkeypatch):
    monkeypatch.setattr("tinyllama.backends.numpy.UNPACK_BELOW", 0)
    checkpoint = open_checkpoint(folder)
    needed = get_backend("numpy").memory(checkpoint.config, checkpoint.tensors, 2048)
    free_memory(monkeypatch, sum(needed.values()) - 1)
    with pytest.warns(UserWarning, match=r"8.0 MB of weights and .* of free memory: every token will read"):
        assert tinyllama.load(folder, "numpy").generate(STORY, n_predict=2)


def test_what_loading_takes_is_told_before_it_begins(folder):
    told = []
    tinyllama.load(folder, announce=lambda *what: told.append(what))
    ((path, needed, mapped),) = told
    assert path == folder and mapped is False
    assert needed["weights"] > 4e6 and needed.keys() == {"weights", "kv_cache", "activations", "tokenizer"}


def test_a_tokenizer_that_is_larger_than_the_model_is_refused(folder, shared_data):
    shutil.copy(shared_data / "llama_tokenizer" / "tokenizer.model", folder)
    with pytest.raises(TinyllamaError, match="32000"):
        tinyllama.load(folder)


@pytest.mark.parametrize("wrong", [None, 3, [None], [1.5], {"a": 1}, ["a", 3]])
def test_a_prompt_that_is_neither_text_nor_token_ids_is_refused(wrong):
    with pytest.raises(TinyllamaError, match="text or a list of token ids"):
        tinyllama.generate(wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"model": model} for model in ("", 3)),
        *({"threads": threads} for threads in ("x", 0)),
        *({"mmap": mmap} for mmap in ("yes", None, 1, np.array([True, False]))),
    ],
)
def test_arguments_of_load_that_make_no_sense_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(TinyllamaError, match=f"^(a )?{name} [^\n]*$"):
        tinyllama.load(**wrong)


def test_a_relative_path_stays_right_when_the_folder_changes(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    llama = tinyllama.load("small/params.json")
    text = llama.generate(STORY, n_predict=3)
    monkeypatch.chdir("/")
    assert llama.name == text.settings["model"] == str(folder / "params.json")
    assert eval(text.call()) == text


def test_the_last_residual_unembedded_is_the_answer_of_the_model():
    llama = tinyllama.load("small")
    taps = llama.trace(STORY, "*residual", "logits")
    last = taps[f"layers.{llama.config.n_layers - 1}.residual"]
    np.testing.assert_allclose(llama.unembed(last), taps["logits"], rtol=0, atol=1e-4)
    assert not np.allclose(llama.unembed(taps["layers.0.residual"]), taps["logits"], atol=1)


def test_loading_tells_its_progress_and_ends_if_that_raises(folder):
    def stop_at_third(names):
        for name in names:
            seen.append(name)
            if len(seen) == 3:
                raise Cancelled("cancelled")
            yield name

    seen = []
    with pytest.raises(Cancelled):
        tinyllama.load(folder, progress=stop_at_third)
    assert len(seen) == 3
    assert tinyllama.load(folder).generate(STORY, n_predict=1)


def test_a_prompt_may_be_an_array_of_ids():
    llama = tinyllama.load("small", "numpy", 1)
    assert llama.tokens(np.array([1, 2])) == [1, 2]
    settings = {
        "n_predict": np.int64(3),
        "seed": np.uint8(1),
        "temp": np.float32(0.5),
        "top_p": np.float64(0.5),
    }
    text = llama.generate(np.array([1, 2]), **settings)
    said = json.loads(json.dumps(text.settings))
    assert said["prompt"] == [1, 2] and said["seed"] == 1 and said["temp"] == 0.5
    assert eval(text.call()) == text and "array" not in text.call() and "np." not in text.call()
    text = llama.generate(np.array(["Once"])[0], **settings)
    assert type(text.settings["prompt"]) is str and eval(text.call()) == text
    for empty in ([], "", b"", np.array([], int)):
        with pytest.raises(TinyllamaError, match="the prompt is empty"):
            llama.tokens(empty)
