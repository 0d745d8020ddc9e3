import os

import pytest

from tinyllama.formats import open_checkpoint
from tinyllama.lab.widgets.models import choices, folders
from tinyllama.machine.download import MODELS, models_folder
from tinyllama.machine.places import find


@pytest.fixture
def place(tmp_path):
    """A folder as the README describes it, with every kind of model file."""
    (tmp_path / "13B").mkdir()
    for name in ("13B/ggml-model-q4_0.bin", "13B/ggml-model-q4_0.bin.1", "13B/consolidated.00.pth", "a.gguf"):
        (tmp_path / name).write_bytes(b"0" * 1500)
    (tmp_path / "tokenizer.model").write_bytes(b"0")
    (tmp_path / "gone.gguf").symlink_to("nowhere")
    return tmp_path


def test_every_kind_of_model_file_is_found_once(place):
    found = {model: label for label, model in choices([place, place]) if model not in MODELS}
    assert found.pop("small").startswith("small (")
    assert found == {
        str(place / "a.gguf"): "a.gguf (1.5 kB)",
        str(place / "13B"): f"{place.name}/13B (1.5 kB)",
        str(place / "13B/ggml-model-q4_0.bin"): "13B/ggml-model-q4_0.bin (3.0 kB)",
    }


def test_models_by_name_are_there_even_before_they_are_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr("tinyllama.lab.widgets.models.models_folder", lambda: tmp_path / "data" / "models")
    assert choices([])[1:] == [("smollm2 (not downloaded yet)", "smollm2")]


def test_a_downloaded_model_is_not_listed_twice():
    downloaded = models_folder() / MODELS["smollm2"].filename
    if not downloaded.exists():
        pytest.skip("SmolLM2 is not here")
    assert str(downloaded) not in [model for _, model in choices([models_folder()])]


def test_folders_beside_the_notebook_are_looked_at(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    assert (tmp_path / "models").resolve() in folders()
    assert os.fspath(tmp_path) not in map(os.fspath, folders())


def test_what_is_offered_first_can_be_opened():
    assert open_checkpoint(find(choices([])[0][1])).config.n_layers > 0
