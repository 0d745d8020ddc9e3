"""The Hugging Face hub: what is found in its cache, and what comes from a stand-in on this computer."""

import hashlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple

import pytest
import standin_hub

from tinyllama.errors import TinyllamaError
from tinyllama.machine import hub

GGUF = b"GGUF" + bytes(range(256)) * (24 << 10)  # 6 MB
OTHER = b"GGUF other"
REPOSITORY = "org/Some-Model-GGUF"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, and no hub."""
    for name in ("HF_HOME", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path / "hub"


@pytest.fixture
def online(monkeypatch):
    """A stand-in for the hub with one repository of two GGUF files."""
    stand_in, server = standin_hub.serve()
    stand_in.repositories[REPOSITORY] = {"README.md": b"#", "m-Q8_0.gguf": OTHER, "m-Q4_K_M.gguf": GGUF}
    monkeypatch.setenv("HF_ENDPOINT", stand_in.url)
    yield stand_in
    server.shutdown()
    server.server_close()


def put(cache, repository, *names, revision="r1", ref="main"):
    """Files of a revision into the cache as huggingface_hub lays them out: links to blobs."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    for name in names:
        link, blob = folder / "snapshots" / revision / name, hashlib.sha1(name.encode()).hexdigest()
        for path in (link, folder / "blobs" / blob):
            path.parent.mkdir(parents=True, exist_ok=True)
        (folder / "blobs" / blob).write_bytes(b"GGUF")
        link.symlink_to(os.path.relpath(folder / "blobs" / blob, link.parent))
    if ref:
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / ref).write_text(revision)
    return folder / "snapshots" / revision


def refused(model, *words):
    """It raises one line that begins with the model's name and has these words."""
    with pytest.raises(TinyllamaError) as refusal:
        hub.find(model)
    line = str(refusal.value)
    assert line.startswith(f"hf:{hub.parse(model).name}") and "\n" not in line
    assert [word for word in words if word not in line] == [], line


# --- names ----------------------------------------------------------------------------------------


def test_a_name_has_a_repository_perhaps_a_revision_and_perhaps_a_quantization():
    assert hub.parse("hf:org/name") == hub.Repository("org/name", "main", "")
    assert hub.parse("hf:org/na.me-3_2:Q4_K_M") == hub.Repository("org/na.me-3_2", "main", "Q4_K_M")
    assert hub.parse("hf:org/name@refs/pr/1:q8_0") == hub.Repository("org/name", "refs/pr/1", "q8_0")


@pytest.mark.parametrize(
    "model", ["hf:", "hf:name", "hf:a/b/c", "hf:a b/c", "hf:../x", "hf:a/b@../../c", "hf:a/b:", "hf:a/b@"]
)
def test_what_is_no_name_gets_one_line_that_shows_how_one_looks(model):
    with pytest.raises(TinyllamaError, match="a model of the Hugging Face hub is hf:org/name, or"):
        hub.find(model)


@pytest.mark.parametrize(
    "settings, wanted",
    [
        ({}, "HOME/.cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/x", "HF_HOME": "/h"}, "/h/hub"),
        ({"HF_HOME": "/h", "HF_HUB_CACHE": "~/c"}, "HOME/c"),
    ],
)
def test_the_cache_is_where_huggingface_hub_keeps_it(monkeypatch, settings, wanted):
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert str(hub.cache_folder()) == wanted.replace("HOME", os.path.expanduser("~"))
    code = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    theirs = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert theirs.stdout.strip() == str(hub.cache_folder())


# --- which files ----------------------------------------------------------------------------------

SPLIT = [f"Q5_K_M/big-Q5_K_M-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
SHARDS = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
FOLDER = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
MISTRAL = ["params.json", "tekken.json", "tokenizer.model.v3", "consolidated.safetensors"]


@pytest.mark.parametrize(
    "names, quant, chosen",
    [
        (["a-Q8_0.gguf", "a-Q4_K_M.gguf", "a-Q4_0.gguf"], "", ["a-Q4_K_M.gguf"]),
        (["a-Q8_0.gguf", "a-Q2_K.gguf"], "", ["a-Q8_0.gguf"]),
        (["a-IQ2_XS.gguf", "a-Q6_K.gguf"], "", ["a-Q6_K.gguf"]),
        (["a-Q4_K_M.gguf", "a-Q4_K_S.gguf"], "Q4_K", []),
        (["a-IQ4_NL.gguf"], "Q4_NL", []),
        (["a.q4_k_m.gguf", "a.q8_0.gguf"], "Q4_K_M", ["a.q4_k_m.gguf"]),
        (["a-UD-Q4_K_XL.gguf", "a-Q4_K_XL.gguf"], "q4_k_xl", ["a-Q4_K_XL.gguf"]),
        (["a.gguf", "b.gguf"], "b.gguf", ["b.gguf"]),
        (["mmproj-a-Q4_K_M.gguf", "a-Q8_0.gguf"], "", ["a-Q8_0.gguf"]),
        (["a-imatrix.gguf"], "", []),
        ([*SPLIT, "a-Q8_0.gguf"], "q5_k_m", SPLIT),
        (SPLIT[:1], "", SPLIT),
        (SPLIT[1:], "", []),
        ([*FOLDER, "model.safetensors"], "", sorted([*FOLDER, "model.safetensors"])),
        (
            [
                *FOLDER,
                *SHARDS,
                "model.safetensors.index.json",
                *MISTRAL,
                "pytorch_model.bin",
                "onnx/model.onnx",
            ],
            "",
            sorted([*FOLDER, *SHARDS, "model.safetensors.index.json", "tokenizer.model.v3"]),
        ),
        (MISTRAL, "", sorted(set(MISTRAL) - {"tekken.json"})),
        ([*FOLDER, "model.safetensors"], "Q4_K_M", []),
        ([*FOLDER, "pytorch_model.bin"], "", []),
        (["config.json", "model.safetensors"], "", []),
        (["adapter_config.json", "adapter_model.safetensors", *FOLDER], "", []),
    ],
)
def test_the_files_of_a_model_are_chosen(names, quant, chosen):
    assert hub.choose(names, quant) == chosen


# --- what is here ---------------------------------------------------------------------------------


def test_a_model_in_the_cache_is_found_by_its_files_name(cache):
    snapshot = put(cache, "org/name", "a-Q4_K_M.gguf", "a-Q8_0.gguf")
    assert hub.find("hf:org/name") == snapshot / "a-Q4_K_M.gguf"
    assert hub.find("hf:org/name:q8_0") == snapshot / "a-Q8_0.gguf"
    assert hub.find("hf:org/name@main:Q8_0") == hub.find("hf:org/name@r1:Q8_0") == snapshot / "a-Q8_0.gguf"


def test_a_folder_in_the_cache_is_found(cache):
    snapshot = put(cache, "org/name", *FOLDER, "model.safetensors")
    assert hub.find("hf:org/name") == snapshot


def test_what_an_older_revision_has_is_found(cache, monkeypatch):
    older = put(cache, "org/name", "a-Q4_K_M.gguf", revision="r0", ref=None)
    put(cache, "org/name", "README.md")
    assert hub.find("hf:org/name") == older / "a-Q4_K_M.gguf"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused("hf:org/name@r1", "isn't in")


@pytest.mark.parametrize("names", [[*FOLDER, *SHARDS], SPLIT])
def test_half_a_model_is_none(cache, monkeypatch, names):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    snapshot = put(cache, "org/name", *names)
    assert hub.find("hf:org/name").is_relative_to(snapshot)
    (snapshot / names[-1]).resolve().unlink()
    refused("hf:org/name", f"isn't in {cache}, or not whole; offline (--offline, HF_HUB_OFFLINE)")


def test_what_is_in_the_cache_is_listed_with_names_that_find_it(cache):
    put(cache, "a/Two-GGUF", "m-Q4_K_M.gguf", "m-Q8_0.gguf", "mmproj-m.gguf")
    put(cache, "b/split", *SPLIT, "other-Q5_K_M.gguf")
    put(cache, "c/folder", *FOLDER, *SHARDS)
    put(cache, "d/not-a-model", "vocab.txt")
    put(cache, "e/older", "m-Q8_0.gguf", revision="r0", ref=None)
    newer = put(cache, "e/older", "m.gguf")
    os.utime(newer.parent / "r0", (0, 0))
    found = dict(hub.models())
    names = ["hf:a/Two-GGUF:Q8_0", "hf:a/Two-GGUF:Q4_K_M", "hf:b/split:other-Q5_K_M.gguf"]
    names += [f"hf:b/split:{SPLIT[0]}", "hf:c/folder", "hf:e/older:m.gguf", "hf:e/older:Q8_0"]
    assert sorted(found) == sorted(names)
    assert {name: hub.find(name) for name in found} == found


# --- fetching -------------------------------------------------------------------------------------


def test_a_file_arrives_where_everybody_finds_it(online, cache, capsys):
    path = hub.find(f"hf:{REPOSITORY}")
    assert path.read_bytes() == GGUF and path.name == "m-Q4_K_M.gguf"
    assert path == hub.cached(hub.parse(f"hf:{REPOSITORY}"))
    assert (cache / "models--org--Some-Model-GGUF" / "refs" / "main").read_text() == standin_hub.REVISION
    code = "import sys, huggingface_hub as h; print(h.try_to_load_from_cache(*sys.argv[1:]))"
    argv = [sys.executable, "-c", code, REPOSITORY, "m-Q4_K_M.gguf"]
    assert subprocess.run(argv, capture_output=True, text=True).stdout.strip() == str(path)
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first == f"hf:{REPOSITORY}: fetching m-Q4_K_M.gguf, 6.3 MB, from {online.url}, licence mit"
    assert last.endswith(f"Wrote {path} (6.3 MB).")
    n_asked = len(online.asked)
    assert hub.download(f"hf:{REPOSITORY}") == path and len(online.asked) == n_asked
    assert capsys.readouterr().err == f"{path} is here already.\n"


def test_of_a_folder_only_what_is_read_is_fetched(online):
    files = dict.fromkeys([*FOLDER, "tokenizer.model", "pytorch_model.bin", "onnx/model.onnx"], b"{}")
    online.repositories["org/folder"] = files | dict.fromkeys(SHARDS, GGUF)
    folder = hub.find("hf:org/folder")
    assert {path.name for path in folder.rglob("*")} == {*FOLDER, "tokenizer.model", *SHARDS}
    assert (folder / SHARDS[1]).read_bytes() == GGUF


def start(model):
    """`find` in a process of its own."""
    code = f"from tinyllama.machine import hub; hub.find({model!r})"
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("end", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.long)])
def test_an_interrupted_download_goes_on_from_there(online, cache, end, capsys):
    online.hold = threading.Event()
    process = start(f"hf:{REPOSITORY}")
    blobs = cache / "models--org--Some-Model-GGUF" / "blobs"
    while not any(path.stat().st_size >= 3 << 20 for path in blobs.glob("*.incomplete")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(end)
    said = process.communicate(timeout=60)[1]
    if end == signal.SIGINT:
        assert f"hf:{REPOSITORY}: interrupted; the next time it goes on from here\n" in said
        assert "KeyboardInterrupt" in said
    online.hold.set()
    online.hold, online.asked[:] = None, []
    assert hub.find(f"hf:{REPOSITORY}").read_bytes() == GGUF
    got = [bytes for method, path, bytes in online.asked if method == "GET" and path.endswith(".gguf")]
    assert got == [f"bytes={3 << 20}-"]
    assert "; 3.1 MB of it are here already\n" in capsys.readouterr().err
    assert [path.name for path in blobs.iterdir()] == [hashlib.sha256(GGUF).hexdigest()]


def test_a_connection_that_breaks_is_taken_up_again(online):
    online.cut = 4 << 20
    assert hub.find(f"hf:{REPOSITORY}").read_bytes() == GGUF
    assert online.sent == len(GGUF)


def test_what_is_no_beginning_of_the_file_is_fetched_anew(online, cache):
    blobs = cache / "models--org--Some-Model-GGUF" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{hashlib.sha256(GGUF).hexdigest()}.incomplete").write_bytes(bytes(len(GGUF)))
    assert hub.find(f"hf:{REPOSITORY}").read_bytes() == GGUF


def test_a_gated_model_wants_a_token(online, monkeypatch):
    online.gated.add(REPOSITORY)
    page = f"accept its licence at {online.url}/{REPOSITORY}, then set HF_TOKEN to a token of yours"
    refused(f"hf:{REPOSITORY}", "is gated", page)
    monkeypatch.setenv("HF_TOKEN", online.token)
    assert hub.find(f"hf:{REPOSITORY}:Q8_0").read_bytes() == OTHER


def test_what_the_hub_does_not_have_is_named(online):
    online.repositories["org/pytorch"] = {"config.json": b"{}", "pytorch_model.bin": b""}
    refused("hf:org/none", f"{online.url} has no such repository; if it is private, set HF_TOKEN")
    refused(f"hf:{REPOSITORY}@v2", "there is no revision v2 of it")
    refused(f"hf:{REPOSITORY}:Q5_K_M", "there is no Q5_K_M in it: its GGUF files are Q8_0, Q4_K_M")
    refused("hf:org/pytorch", "neither GGUF files nor config.json, tokenizer and safetensors")
    refused("hf:org/pytorch:Q4_0", "there is no Q4_0 in it: it has no GGUF files")


def test_a_hub_that_would_write_elsewhere_is_refused(online, cache):
    online.etag = '"../../../elsewhere"'
    refused(f"hf:{REPOSITORY}", "the hub calls a file or a revision '../../../elsewhere'")
    assert {path.name for path in cache.parent.iterdir()} <= {"hub", "token"}


def test_a_hub_that_is_out_of_order_is_named(online):
    online.status = 404
    refused(f"hf:{REPOSITORY}", f"{online.url} answers 404")
    online.status = 403
    refused(f"hf:{REPOSITORY}", f"{online.url} refuses this (403): set HF_TOKEN")


def test_without_a_network_it_asks_whether_there_is_one():
    refused("hf:org/name", "http://127.0.0.1:9 doesn't answer (is this machine online?)")


@pytest.mark.parametrize("value", ["1", "true", "ON"])
def test_offline_nothing_is_asked(online, monkeypatch, value):
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    refused(f"hf:{REPOSITORY}", "offline (--offline, HF_HUB_OFFLINE) it can't be fetched")
    assert online.asked == []


def test_without_the_package_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused("hf:org/name", "pip install huggingface_hub")


def test_a_full_disk_is_refused_with_the_figures(online, cache, monkeypatch):
    usage = namedtuple("Usage", "total used free")(10**12, 10**12, 1_400_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused(f"hf:{REPOSITORY}", f"needs 6.3 MB of disk in {cache}, and 1.4 MB are free")
    assert online.sent == 0


def test_a_cache_that_cannot_be_written_is_named(online, cache):
    cache.write_text("a file")
    with pytest.raises(TinyllamaError, match=f"^{cache}: File exists$"):
        hub.find(f"hf:{REPOSITORY}")
