import pytest

from tinyllama.formats import open_checkpoint
from tinyllama.lab.widgets.models import choices
from tinyllama.machine import places
from tinyllama.machine.download import MODELS, models_folder
from tinyllama.machine.places import find


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A folder as the README describes it, with every kind of model file, on a computer without others."""
    for variable in ("HF_HUB_CACHE", "OLLAMA_MODELS", "XDG_CACHE_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    models = tmp_path / "models"
    (models / "13B").mkdir(parents=True)
    for name in ("13B/consolidated.00.pth", "13B/params.json", "a.gguf"):
        (models / name).write_bytes(b"0" * 1500)
    for name in ("13B/ggml-model-q4_0.bin", "13B/ggml-model-q4_0.bin.1"):
        (models / name).write_bytes(b"lmgg".ljust(1500))
    for part in ("b-00001-of-00002.gguf", "b-00002-of-00002.gguf"):
        (models / part).write_bytes(b"0" * 1000)
    (models / "tokenizer.model").write_bytes(b"0")
    (models / "gone.gguf").symlink_to("nowhere")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_kind_of_model_file_beside_the_notebook_is_found_once():
    found = {model: label for label, model in choices() if model not in MODELS}
    assert found.pop("small").startswith("small (")
    assert found == {
        "models/a.gguf": "a.gguf (1.5 kB)",
        "models/b-00001-of-00002.gguf": "b-00001-of-00002.gguf (2.0 kB)",
        "models/13B": "models/13B (1.5 kB)",
        "models/13B/ggml-model-q4_0.bin": "13B/ggml-model-q4_0.bin (3.0 kB)",
    }


def test_models_of_other_programs_are_there_by_their_names(place):
    snapshot = place / "HF_HUB_CACHE/models--org--name/snapshots/1"
    snapshot.mkdir(parents=True)
    (snapshot / "c-Q4_0.gguf").write_bytes(b"0" * 3000)
    manifest = place / "OLLAMA_MODELS/manifests/registry.ollama.ai/library/d/1b"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("{}")
    of_hub = ("hf:org/name:Q4_0 (3.0 kB)", "hf:org/name:Q4_0")
    assert choices()[-2:] == [of_hub, ("ollama:d:1b", "ollama:d:1b")]


def test_models_by_name_are_there_even_before_they_are_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "models_folder", lambda: tmp_path / "data" / "models")
    assert choices()[1] == ("smollm2 (not downloaded yet)", "smollm2")


def test_a_downloaded_model_is_not_listed_twice():
    downloaded = models_folder() / MODELS["smollm2"].filename
    if not downloaded.exists():
        pytest.skip("SmolLM2 is not here")
    assert str(downloaded) not in [model for _, model in choices()]


def test_what_is_offered_first_can_be_opened():
    assert open_checkpoint(find(choices()[0][1])).config.n_layers > 0
