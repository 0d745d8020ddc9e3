"""Where models are found by path and by name, and what there is on this computer."""

from pathlib import Path

import pytest

from tinyllama.errors import TinyllamaError
from tinyllama.machine import download, places


@pytest.fixture(autouse=True)
def computer(tmp_path, monkeypatch):
    """One without models: nothing but a folder to work in."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "ollama"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(places, "models_folder", lambda: tmp_path / "data" / "models")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def put(*paths, data=b"GGUF"):
    for path in map(Path, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


@pytest.mark.parametrize("model", [3, "", b"small", "a\0b", "no such", "a" * 5000, "hf:", "ollama:"])
def test_what_is_neither_a_path_nor_a_name_is_refused_in_one_line(model):
    with pytest.raises(TinyllamaError, match=r"a path or a name|no such file|too long|null|hf:org|Ollama"):
        places.find(model)


def test_an_unknown_name_is_refused_with_those_there_are():
    with pytest.raises(TinyllamaError, match=r"^org/name: .*\(small, smollm2, hf:org/name, ollama:name\)$"):
        places.find("org/name")


def test_models_with_a_name_of_their_own_are_found(computer):
    assert places.find("small") == download.small_folder()
    with pytest.raises(TinyllamaError, match="smollm2: isn't here yet; `tinyllama download smollm2`"):
        places.find("smollm2")
    path = computer / "data" / "models" / download.MODELS["smollm2"].filename
    put(path)
    assert places.find("smollm2") == path


@pytest.mark.parametrize("name", ["small", "smollm2", "hf:org/name", "ollama:name"])
def test_a_path_wins_over_a_name(name):
    put(name)
    assert places.find(name) == places.find(Path(name)) == Path(name)


@pytest.mark.parametrize(
    "name, cause", [("hf:org/name:Q4_0", "offline"), ("ollama:name", "ollama pull name")]
)
def test_names_of_stores_lead_there(name, cause):
    for model in (name, Path(name)):
        with pytest.raises(TinyllamaError, match=f"^{name}: .*{cause}"):
            places.find(model)


def test_without_others_there_is_the_model_that_ships():
    assert list(places.everything()) == [("small", download.small_folder())]


def test_everything_that_looks_like_a_model_is_listed_once_with_a_name_that_finds_it(computer):
    put(computer / "data/models" / download.MODELS["smollm2"].filename, computer / "data/models/a.gguf")
    put(computer / "cache/tinyllama/models/c.gguf")
    put("models/b.gguf", "models/org/name/b-00001-of-00002.gguf", "models/org/name/b-00002-of-00002.gguf")
    put("models/7B/ggml-model-q4_0.bin", "models/13B/ggml-model-f16.bin", data=b"lmgg")
    put("models/13B/ggml-model-f16.bin.1", "models/hf/pytorch_model.bin", "models/readme.txt", data=b"PK")
    put("models/7B/params.json", "models/7B/consolidated.00.pth", "models/hf/config.json")
    put("models/hf/model-00001-of-00001.safetensors", "models/.hidden/d.gguf", "models/1/2/3/4/e.gguf")
    Path("models/link.gguf").symlink_to("b.gguf")
    Path("models/gone.gguf").symlink_to("nowhere")
    found = dict(places.everything())
    assert list(found) == [
        "small",
        "smollm2",
        str(computer / "data/models/a.gguf"),
        str(computer / "cache/tinyllama/models/c.gguf"),
        "models/13B/ggml-model-f16.bin",
        "models/7B",
        "models/7B/ggml-model-q4_0.bin",
        "models/b.gguf",
        "models/hf",
        "models/org/name/b-00001-of-00002.gguf",
    ]
    assert all(path.samefile(places.find(name)) for name, path in found.items())


def test_what_may_not_be_looked_into_is_left_out(computer):
    put("models/closed/a.gguf")
    Path("models/closed").chmod(0)
    try:
        assert len(list(places.everything())) in (1, 2)  # root looks into everything
    finally:
        Path("models/closed").chmod(0o700)


def test_stores_of_others_come_last(computer):
    put(computer / "hub/models--org--name/snapshots/1/a-Q4_0.gguf", "models/a.gguf")
    put(computer / "ollama/manifests/registry.ollama.ai/library/a/1b", data=b"{}")
    names = [name for name, _ in places.everything()]
    assert names == ["small", "models/a.gguf", "hf:org/name:Q4_0", "ollama:a:1b"]
