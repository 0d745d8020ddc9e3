"""Intermediate values over HTTP, read by the safetensors package."""

import json

import numpy as np
import pytest
from safetensors.numpy import load

from tinyllama.errors import TinyllamaError
from tinyllama.serve import taps


def test_taps_are_those_of_the_library(client, llama):
    patterns = ["layers.*.residual", "layers.1.attention.weights", "logits"]
    response = client.post("/v1/taps", json={"prompt": "Tom and his dog", "taps": patterns})
    assert response.headers["content-type"] == "application/octet-stream"
    found, expected = load(response.content), llama.trace("Tom and his dog", *patterns)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert np.array_equal(found[name], array) and found[name].dtype == np.float32
    size = int.from_bytes(response.content[:8], "little")
    about = json.loads(response.content[8 : 8 + size])["__metadata__"]
    assert json.loads(about["ids"]) == llama.tokens("Tom and his dog") and about["model"] == "small"
    assert len(json.loads(about["pieces"])) == len(llama.tokens("Tom and his dog"))


def test_a_prompt_is_text_or_ids_or_a_chat(client, llama):
    def of(**prompt):
        return load(client.post("/v1/taps", json={"taps": ["embedding"], **prompt}).content)["embedding"]

    assert np.array_equal(of(prompt="Tom"), of(prompt=llama.tokens("Tom")))
    chat = [{"role": "user", "content": "Tom"}]
    assert len(of(messages=chat)) == len(llama.template("chatml").encode(chat))


def test_what_is_computed_is_bounded_before(llama, monkeypatch):
    names, n_bytes = taps.wanted_taps(llama, ["layers.0.residual", "embedd*"], 3)
    assert names == ["embedding", "layers.0.residual"] and n_bytes == 2 * 4 * 3 * llama.config.dim
    monkeypatch.setattr(taps, "LARGEST", n_bytes - 1)
    with pytest.raises(TinyllamaError, match="bytes, and at most"):
        taps.wanted_taps(llama, ["layers.0.residual", "embedd*"], 3)


def test_so_is_what_is_under_way(client, app, monkeypatch):
    monkeypatch.setattr(app, "_tapped", taps.LARGEST)
    assert client.post("/v1/taps", json={"prompt": "Tom", "taps": ["embedding"]}).status_code == 429
    monkeypatch.setattr(app, "_tapped", 0)
    assert client.post("/v1/taps", json={"prompt": "Tom", "taps": ["embedding"]}).status_code == 200
    assert app._tapped == 0


def test_a_file_is_laid_out_as_the_package_reads_it():
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "b.c": np.float32([[7]]),
        "d": np.float32(3),
    }
    found = load(b"".join(taps.safetensors(arrays, {"x": "é"})))
    assert all(np.array_equal(found[name], array) for name, array in arrays.items())
