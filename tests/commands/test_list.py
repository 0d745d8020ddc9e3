"""tinyllama list: every model on this computer, whether it would run, and whether it fits."""

import json
import shutil
from pathlib import Path

import pytest

import tinyllama
from tinyllama.backends import get_backend
from tinyllama.commands import list as models
from tinyllama.commands import main
from tinyllama.commands.convert import convert, quantize
from tinyllama.formats import open_checkpoint
from tinyllama.machine import places
from tinyllama.machine.download import small_folder


@pytest.fixture(autouse=True)
def computer(tmp_path, monkeypatch):
    """One without models: nothing but a folder to work in."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "ollama"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(places, "models_folder", lambda: tmp_path / "data" / "models")
    (tmp_path / "work" / "models").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


@pytest.fixture(scope="session")
def gguf(tmp_path_factory):
    """The small model as a GGUF file of f32, and as Q4_0."""
    folder = tmp_path_factory.mktemp("gguf")
    list(convert(small_folder(), 0, folder / "f32.gguf", "gguf"))
    list(quantize(folder / "f32.gguf", folder / "q4_0.gguf", "q4_0"))
    return folder


@pytest.fixture
def run(capsys):
    def run(*argv: str):
        return main(["list", *argv]), *capsys.readouterr()

    return run


def test_the_model_that_ships_is_always_there(run):
    status, out, _ = run()
    header, small, _, memory = out.splitlines()
    assert status == 0 and header.split() == ["family", "type", "size", "memory", "fits", "name"]
    assert small.split()[:3] == ["llama", "4.0M", "F16"] and small.split()[-2:] == ["yes", "small"]
    assert memory.startswith("memory: to run it with at most 2048 tokens of context; ")


def test_every_name_is_what_m_takes(run, gguf, computer):
    shutil.copy(gguf / "q4_0.gguf", "models/mine.gguf")
    snapshot = computer / "hub/models--org--Name-GGUF/snapshots/1"
    snapshot.mkdir(parents=True)
    (snapshot / "name-Q4_0.gguf").symlink_to(gguf / "q4_0.gguf")
    found = json.loads(run("--json")[1])
    assert [model["name"] for model in found["models"]] == [
        "small",
        "models/mine.gguf",
        "hf:org/Name-GGUF:Q4_0",
    ]
    for model in found["models"]:
        checkpoint = open_checkpoint(model["name"])
        memory = get_backend().memory(checkpoint.config, checkpoint.tensors, checkpoint.config.max_seq_len)
        assert model["memory"] == sum(memory.values()) and model["weights"] == memory["weights"]
        assert model["n_bytes"] == sum(len(file) for file in checkpoint.files)
        assert tinyllama.generate("Once", model["name"], n_predict=1, seed=1)
    assert [model["type"] for model in found["models"]] == ["F16", "Q4_0", "Q4_0"]


def test_what_cannot_be_run_is_listed_with_its_reason_in_one_line(run, gguf, computer):
    Path("models/cut.gguf").write_bytes((gguf / "q4_0.gguf").read_bytes()[:-100])
    Path("models/page.gguf").write_text("<!doctype html>")
    manifest = computer / "ollama/manifests/registry.ollama.ai/library/a/1b"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("{")
    for _ in range(2):
        status, out, _ = run()
        assert status == 0 and "can't be run (3):" in out.splitlines()
        cut, page, ollama = out.splitlines()[-3:]
        assert cut.startswith("models/cut.gguf: truncated or damaged")
        assert page.startswith("models/page.gguf: no model file") and "a web page" in page
        assert ollama == f"ollama:a:1b: {manifest}: is damaged: pull the model again"


def test_of_many_that_cannot_be_run_some_are_shown(run, monkeypatch):
    for number in range(models.SHOWN + 3):
        Path(f"models/{number:03}.gguf").write_text("no model")
    assert run()[1].endswith(
        ": no model file (ggml or GGUF) but something else\nand 3 more, which --json lists\n"
    )
    assert len(json.loads(run("--json")[1])["unsupported"]) == models.SHOWN + 3


def test_what_does_not_fit_says_so(run, gguf, monkeypatch):
    shutil.copy(gguf / "f32.gguf", "models/f32.gguf")
    (model,) = json.loads(run("--json")[1])["models"][1:]
    for free, fits in {model["memory"]: "yes", model["memory"] - 1: "--mmap", 1000: "no"}.items():
        monkeypatch.setattr(models, "available_memory", lambda free=free: free)
        (shown,) = json.loads(run("--json")[1])["models"][1:]
        assert shown["fits"] == fits
        explained = "--mmap: fits only if its weights stay in their file" in run()[1]
        assert explained == (fits == "--mmap")


def test_a_second_look_reads_only_what_has_changed(run, gguf, monkeypatch):
    shutil.copy(gguf / "f32.gguf", "models/a.gguf")
    shutil.copy(gguf / "f32.gguf", "models/b.gguf")
    first, opened = json.loads(run("--json")[1]), []
    monkeypatch.setattr(
        models, "open_checkpoint", lambda path: opened.append(path.name) or open_checkpoint(path)
    )
    again = json.loads(run("--json")[1])
    assert again["models"] == first["models"] and opened == []
    shutil.copy(gguf / "q4_0.gguf", "models/b.gguf")
    assert [model["type"] for model in json.loads(run("--json")[1])["models"]][1:] == ["F32", "Q4_0"]
    assert opened == ["b.gguf"]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 3}', "[" * 100_000])
def test_a_damaged_or_a_missing_memory_of_the_last_look_is_none(run, computer, text):
    place = computer / "cache" / "tinyllama" / "list.json"
    place.parent.mkdir(parents=True)
    place.write_text(text)
    assert run()[0] == 0
    assert json.loads(place.read_text())
    shutil.rmtree(place.parent)
    place.parent.write_text("no folder")
    assert run()[0] == 0


def test_counts_are_short():
    counts = {950: "950", 15_000: "15k", 4_000_000: "4.0M", 134_515_008: "135M", 8_030_261_248: "8.0B"}
    assert {number: models.human_count(number) for number in counts} == counts
