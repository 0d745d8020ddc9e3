"""Ollama's store: names lead through its manifests to GGUF files."""

import json
import os
from pathlib import Path

import pytest

from tinyllama.errors import TinyllamaError
from tinyllama.formats import open_checkpoint
from tinyllama.machine import ollama

DIGEST = "sha256:" + "0123456789abcdef" * 4
MODEL = {"mediaType": ollama.MODEL, "digest": DIGEST, "size": 4}
OTHERS = [
    {"mediaType": "application/vnd.ollama.image.template", "digest": f"sha256:{'1' * 64}", "size": 1},
    {"mediaType": "application/vnd.ollama.image.params", "digest": f"sha256:{'2' * 64}", "size": 1},
]


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A store that holds one file, and no model's manifest."""
    folder = tmp_path / "ollama"
    (folder / "blobs").mkdir(parents=True)
    (folder / "blobs" / DIGEST.replace(":", "-")).write_bytes(b"GGUF")
    monkeypatch.setenv("OLLAMA_MODELS", str(folder))
    return folder


def put(store, name, layers=(*OTHERS, MODEL)):
    manifest = store / "manifests" / name
    manifest.parent.mkdir(parents=True, exist_ok=True)
    text = layers if isinstance(layers, str) else json.dumps({"schemaVersion": 2, "layers": list(layers)})
    manifest.write_text(text)
    return manifest


@pytest.mark.parametrize(
    "name, manifest",
    [
        ("ollama:llama3.2", "registry.ollama.ai/library/llama3.2/latest"),
        ("ollama:llama3.2:1b-instruct-q4_K_M", "registry.ollama.ai/library/llama3.2/1b-instruct-q4_K_M"),
        ("ollama:someone/model:v1", "registry.ollama.ai/someone/model/v1"),
        ("ollama:hf.co/org/name-GGUF:Q4_K_M", "hf.co/org/name-GGUF/Q4_K_M"),
    ],
)
def test_a_name_leads_to_its_file_and_is_the_one_that_is_listed(store, name, manifest):
    put(store, manifest)
    assert ollama.find(name) == store / "blobs" / DIGEST.replace(":", "-")
    assert list(ollama.models()) == [name]


def test_latest_may_be_written(store):
    put(store, "registry.ollama.ai/library/a/latest")
    assert ollama.find("ollama:a:latest") == ollama.find("ollama:a")


def test_without_a_variable_the_store_is_the_users_or_the_services(monkeypatch):
    monkeypatch.delenv("OLLAMA_MODELS", raising=False)
    assert ollama.folders() == [Path.home() / ".ollama/models", Path("/usr/share/ollama/.ollama/models")]


def test_a_model_that_is_not_there_says_how_it_gets_there(store):
    with pytest.raises(TinyllamaError) as refusal:
        ollama.find("ollama:mistral:7b")
    assert str(refusal.value) == (
        f"ollama:mistral:7b: isn't in Ollama's store, {store}; `ollama pull mistral:7b` fetches it"
    )


@pytest.mark.parametrize("model", ["ollama:", "ollama:a:", "ollama:../a", "ollama:a/b/c/d", "ollama:a b"])
def test_what_is_no_name_gets_one_line(store, model):
    with pytest.raises(TinyllamaError, match=r"Ollama"):
        ollama.find(model)


@pytest.mark.parametrize(
    "layers, cause",
    [
        ("", "is damaged: pull the model again"),
        ("[" * 100_000, "is damaged"),
        ("[]", "is damaged"),
        ('{"layers": 3}', "is damaged"),
        ('{"layers": [3]}', "is damaged"),
        ('{"layers": [{"mediaType": []}]}', "is damaged"),
        ("{" + " " * ollama.LARGEST_MANIFEST, "is too large"),
        (OTHERS, "names no model"),
        ([MODEL | {"digest": 3}], "is damaged: it names the model '3'"),
        ([MODEL | {"digest": "sha256:../../../etc/passwd"}], "is damaged: it names the model"),
        ([MODEL | {"digest": f"sha256:{'f' * 64}"}], "pull the model again"),
        (
            [MODEL, {"mediaType": ollama.ADAPTER, "digest": DIGEST}],
            r"has an adapter \(LoRA\) beside the model",
        ),
    ],
)
def test_a_damaged_store_gets_one_line_that_names_the_manifest(store, layers, cause):
    manifest = put(store, "registry.ollama.ai/library/a/latest", layers)
    with pytest.raises(TinyllamaError, match=f"^{manifest}: .*{cause}"):
        ollama.find("ollama:a")


def test_the_file_is_opened_by_what_is_in_it(store, smollm2_file):
    put(store, "registry.ollama.ai/library/smollm2/135m")
    blob = store / "blobs" / DIGEST.replace(":", "-")
    blob.unlink()
    os.link(smollm2_file, blob)
    assert open_checkpoint("ollama:smollm2:135m").path == blob
