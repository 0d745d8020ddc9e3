import json

import numpy as np
import pytest

from tinyllama.commands import bench
from tinyllama.machine import limits as resources
from tinyllama.backends import available
from tinyllama.commands.cli import main
from tinyllama.config import PRESETS, Config
from tinyllama.errors import TinyllamaError

TINY = Config(dim=64, n_layers=1, n_heads=2, vocab_size=96, hidden_dim=96, n_kv_heads=2)
needs_c = pytest.mark.skipif(available()["c"] is not None, reason=f"no C backend: {available()['c']}")


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch):
    monkeypatch.setitem(PRESETS, "7B", TINY)


def run(**options):
    return list(bench.bench(shape="7B", n_predict=2, prefill=(4, 8), **options))


def test_a_shape_alone_is_measured_without_a_file():
    (result,) = run(backends=["numpy"], threads=[1])
    assert result.decode > 0 and set(result.prefill) == {4, 8}
    assert result.read_probe is None and result.level is None
    assert "random weights" in bench.table([result])


@needs_c
def test_the_c_backend_is_held_against_its_limits():
    results = run(backends=["c"], levels=["ref"], threads=[1, 2])
    assert [(result.level, result.threads) for result in results] == [("ref", 1), ("ref", 2)]
    for result in results:
        assert result.read_probe > 0 and result.multiply_probe > 0
    assert "GB/s" in bench.table(results)


@needs_c
def test_a_file_is_measured_with_and_without_a_copy_of_its_weights(capsys):
    line = "bench small --mmap --backend c --threads 1 --prefill 4 --n_predict 1 --json"
    assert main(line.split()) == 0
    copied, mapped = json.loads(capsys.readouterr().out)
    assert (copied["mapped"], mapped["mapped"]) == (False, True)
    for result in (copied, mapped):
        assert 0 < result["load"] < result["first_token"] and result["read_bandwidth"] > 0
    assert mapped["memory"] < copied["memory"]


def test_a_shape_cannot_be_mapped():
    with pytest.raises(TinyllamaError, match="no file"):
        run(mmap=True)


@needs_c
def test_the_level_is_afterwards_what_it_was():
    from tinyllama import _native

    before = _native.level()
    run(backends=["c"], levels=["ref"], threads=[1])
    assert _native.level() == before


@needs_c
def test_an_unknown_level_is_named():
    with pytest.raises(TinyllamaError, match="sse9"):
        run(backends=["c"], levels=["sse9"])


@pytest.mark.parametrize("option", [{"shape": "8B"}, {"shape": "7B", "type": "q9_9"}])
def test_an_unknown_shape_or_type_is_named(option):
    with pytest.raises(TinyllamaError, match=r"8B|q9_9"):
        list(bench.bench(**option))


def test_a_shape_that_does_not_fit_is_refused_before_anything_is_allocated(monkeypatch):
    monkeypatch.setattr(resources, "available_memory", lambda: 1000)
    monkeypatch.setattr(bench, "random_blocks", None)
    with pytest.raises(TinyllamaError, match=r"needs .* of memory"):
        run(backends=["numpy"])


@pytest.mark.parametrize("type", ["q4_0", "q4_0_2023", "f16"])
def test_random_weights_have_the_shapes_of_the_model_and_sane_values(type):
    weights = bench.RandomWeights(TINY, type)
    assert list(weights) == list(TINY.tensor_shapes())
    table = weights["tok_embeddings.weight"].dequantize()
    assert table.shape == (96, 64) and 0.05 < table.std() < 0.2
    assert (weights["norm.weight"].dequantize() == 1).all()


def test_the_command_prints_json(capsys):
    line = "bench --shape 7B --backend numpy --threads 1 --prefill 4 --n_predict 1 --json"
    assert main(line.split()) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert result["backend"] == "numpy" and np.isfinite(result["decode"])


def test_the_picture_is_refused_before_anything_is_measured(capsys, monkeypatch):
    monkeypatch.setattr("tinyllama.commands.find_spec", lambda name: None)
    monkeypatch.setattr(bench, "bench", None)
    assert main(["bench", "--plot", "x.png"]) == 1
    assert "matplotlib" in capsys.readouterr().err


def test_the_picture_shows_speeds_and_limits(tmp_path):
    pytest.importorskip("matplotlib")
    bench.plot(run(threads=[1]), tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").stat().st_size > 10_000
