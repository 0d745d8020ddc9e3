import json
import math

import pytest

from tinyllama.backends import available
from tinyllama.commands import bench, main
from tinyllama.config import PRESETS, Config
from tinyllama.errors import TinyllamaError
from tinyllama.machine import limits

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
    assert result.read_probe is None and result.level is None and not result.mapped
    assert "random weights" in bench.table([result])


@needs_c
def test_the_c_backend_is_held_against_its_limits():
    results = run(backends=["c"], levels=["ref"], threads=[1, 2])
    assert [(result.level, result.threads) for result in results] == [("ref", 1), ("ref", 2)]
    for result in results:
        assert result.read_probe > 0 and result.multiply_probe > 0
    assert "GB/s" in bench.table(results)


@needs_c
def test_backends_without_levels_are_measured_once_whatever_levels_the_c_backend_has():
    results = run(backends=["numpy", "c"], levels=["ref"], threads=[1])
    assert [(result.backend, result.level) for result in results] == [("numpy", None), ("c", "ref")]


@pytest.mark.parametrize("backend", [name for name, reason in available().items() if not reason])
def test_a_file_is_measured_with_and_without_a_copy_of_its_weights(backend, capsys):
    line = f"bench small --mmap --backend {backend} --threads 1 --prefill 4 --n_predict 1 --json"
    assert main(line.split()) == 0
    copied, mapped = json.loads(capsys.readouterr().out)
    assert (copied["mapped"], mapped["mapped"]) == (False, True)
    for result in (copied, mapped):
        assert 0 < result["load"] < result["first_token"]
        assert (result["read_bandwidth"] is None) == (backend != "c")
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


@pytest.mark.parametrize(
    "option", [{"shape": "8B"}, {"shape": "7B", "type": "q9_9"}, {"n_predict": 0}, {"n_predict": 10**9}]
)
def test_an_unknown_shape_or_type_or_number_of_tokens_is_named(option):
    with pytest.raises(TinyllamaError, match=r"8B|q9_9|n_predict"):
        list(bench.bench(**option))


@pytest.mark.parametrize("backend", ["c", "numpy"])
def test_a_shape_that_does_not_fit_is_refused_before_anything_is_allocated(backend, free_memory):
    if available()[backend]:
        pytest.skip(available()[backend])
    free_memory(3 * 10**9)
    before = limits.peak_memory()
    with pytest.raises(
        TinyllamaError, match=r"13B, random weights needs \d\.\d GB of memory, and 3.0 GB are"
    ):
        list(bench.bench(shape="13B", backends=[backend]))
    assert limits.peak_memory() < before + 10**8


@pytest.mark.parametrize("type", ["q4_0", "q4_0_2023", "q4_1_2023", "f16"])
def test_random_weights_have_the_shapes_of_the_model_and_sane_values(type):
    weights = bench.RandomWeights(TINY, type)
    assert {name: tensor.shape for name, tensor in weights.items()} == TINY.tensor_shapes()
    assert weights["tok_embeddings.weight"].nbytes == weights.get("tok_embeddings.weight").nbytes
    table = weights["tok_embeddings.weight"].dequantize()
    assert table.shape == (96, 64) and 0.05 < table.std() < 0.2
    assert (weights["norm.weight"].dequantize() == 1).all()


def test_the_command_prints_json(capsys):
    line = "bench --shape 7B --backend numpy --threads 1 --prefill 4 --n_predict 1 --json"
    assert main(line.split()) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert result["backend"] == "numpy" and math.isfinite(result["decode"])


def test_the_table_is_aligned_and_says_what_is_a_share_of_what():
    result = bench.Result(
        "small", "f16", "c", "avx2", 2, 50.0, 100.0, 8e9, {32: 400.0}, 4000.0, 0.5, 0.75, 10**7
    )
    other = bench.Result("small", "f16", "numpy", None, 16, 5.25, prefill={32: 99.94}, mapped=True)
    assert bench.table([result, other]).splitlines() == [
        "small, f16: tokens a second, and the share of what memory or arithmetic allow",
        "",
        "      backend  threads       write    read 32    load  first token  memory",
        "       c avx2        2  50.0 (50%)  400 (10%)  0.50 s       0.75 s   10 MB",
        "numpy, mapped       16         5.2       99.9  0.00 s       0.00 s     0 B",
        "",
        "Memory was read at 8.0 GB/s with 2 threads.",
    ]


def test_the_picture_is_refused_before_anything_is_measured(capsys, monkeypatch):
    monkeypatch.setattr("tinyllama.commands.run.find_spec", lambda name: None)
    monkeypatch.setattr(bench, "bench", None)
    assert main(["bench", "--plot", "x.png"]) == 1
    assert "matplotlib" in capsys.readouterr().err


def test_the_picture_shows_speeds_and_limits(tmp_path):
    pytest.importorskip("matplotlib")
    bench.plot(run(threads=[1]), tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").stat().st_size > 10_000
