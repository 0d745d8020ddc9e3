import json
import tempfile
from pathlib import Path

import pytest

from tinyllama.backends import available
from tinyllama.commands import bench, main, programs
from tinyllama.config import PRESETS, Config
from tinyllama.errors import TinyllamaError
from tinyllama.machine import limits

TINY = Config(dim=64, n_layers=1, n_heads=2, vocab_size=288, hidden_dim=96, n_kv_heads=2)
needs_c = pytest.mark.skipif(available()["c"] is not None, reason=f"no C backend: {available()['c']}")


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch):
    monkeypatch.setitem(PRESETS, "7B", TINY)
    monkeypatch.setattr(bench, "ENOUGH", 0.0)
    monkeypatch.setattr(bench, "FIRST_TOKENS", 1)


@pytest.fixture
def standin(monkeypatch, tmp_path):
    """A function: from then on `llama_cpp` is a module with this in its class."""

    def install(body: str) -> None:
        (tmp_path / "llama_cpp.py").write_text(f"class Llama:\n    n_tokens = 0\n{body}")
        monkeypatch.syspath_prepend(tmp_path)

    return install


WORKS = """
    def __init__(self, path, n_ctx, n_threads, n_threads_batch, n_gpu_layers, verbose):
        assert open(path, "rb").read(4) == b"GGUF" and n_threads == n_threads_batch == 1 and n_gpu_layers == 0
        self.n_ctx = n_ctx

    def n_vocab(self):
        return 288

    def eval(self, tokens):
        assert self.n_tokens + len(tokens) <= self.n_ctx
        self.n_tokens += len(tokens)
"""


def run(**options):
    return list(bench.bench(shape="7B", n_predict=2, prefill=(4, 8), **options))


def test_a_shape_alone_is_measured_without_a_file():
    (result,) = run(backends=["numpy"], threads=[1])
    assert set(result.speeds) == {1, 4, 8} and min(result.speeds.values()) > 0
    assert result.read_probe is None and result.level is None and not result.mapped and not result.shares
    assert result.model == "7B, random weights"


@needs_c
def test_the_c_backend_is_held_against_its_limits():
    results = run(backends=["c"], levels=["ref"], threads=[1, 2], tokens=(2, 8))
    assert [(result.level, result.threads) for result in results] == [("ref", 1), ("ref", 2)]
    for result in results:
        assert list(result.speeds) == list(result.shares) == [1, 2, 4, 8]
        assert result.read_probe > 0 and result.multiply_probe > 0 and result.read_bandwidth > 0


@needs_c
def test_backends_without_levels_are_measured_once_whatever_levels_the_c_backend_has():
    results = run(backends=["numpy", "c"], levels=["ref"], threads=[1])
    assert [(result.backend, result.level) for result in results] == [("numpy", None), ("c", "ref")]


class Scripted:
    """A program that takes the next of some seconds for each number of tokens; so do its probes."""

    name = "scripted"

    def __init__(self, took: dict[int, list[float]], probes: list[tuple[float, float]]):
        self.took, self.probes = {n: iter(seconds) for n, seconds in took.items()}, iter(probes)
        self.past = []

    def seconds(self, n_tokens, n_past):
        self.past.append(n_past)
        return next(self.took[n_tokens])

    def probe(self):
        return next(self.probes)

    def facts(self):
        sizes = {"memory": 3, "peak_memory": 4, "bytes_read": 100}
        return {"load": 1.0, "first_token": 2.0, "mapped": False, **sizes}

    def close(self):
        pass


def test_speeds_are_medians_and_shares_are_medians_of_each_rounds_own(monkeypatch):
    """The computer becomes slower from round to round, and a share must not change by that."""
    program = Scripted(
        {1: [1.0, 2.0, 4.0], 10: [5.0, 10.0, 20.0]},
        # seconds of reading all, of a token's products
        [(0.5, 0.1), (1.0, 0.2), (2.0, 0.4), (0.6, 0.1), (1.2, 0.2), (2.4, 0.4)],
    )
    monkeypatch.setattr(bench, "Tinyllama", lambda task, progress: program)
    (result,) = bench.bench(shape="7B", n_predict=3, prefill=(10,), backends=["numpy"])
    assert program.past == [0, 1, 2, 0, 0, 0], "tokens one by one follow each other"
    assert result.speeds == {1: 1 / 2, 10: 10 / 10}
    assert result.shares == {1: 0.5, 10: 10 * 0.1 / 5}, "of memory, of arithmetic"
    assert (result.read_probe, result.read_bandwidth) == (1 / 1.0, 100 / 1.0), "beside single tokens"
    assert result.multiply_probe == 1 / 0.2


def test_what_takes_very_long_is_done_once(monkeypatch):
    program = Scripted({1: [1.0] * 3, 10: [9.0]}, [(0.5, 0.1)] * 4)
    monkeypatch.setattr(bench, "Tinyllama", lambda task, progress: program)
    monkeypatch.setattr(bench, "LONG", 0.0)
    (result,) = bench.bench(shape="7B", n_predict=3, prefill=(10,), backends=["numpy"])
    assert program.past == [0, 1, 2, 0] and result.speeds[10] == 10 / 9


def test_whoever_waits_hears_what_is_measured():
    said = []
    run(backends=["numpy"], threads=[1], progress=said.append)
    assert said[0] == "numpy, 1 thread: load"
    steps = [line.removeprefix("numpy, 1 thread: ") for line in said]
    assert "load 100%" in steps
    assert "[1/3], tokens one by one, round 2" in steps and "[3/3], 8 tokens at once, round 1" in steps


@pytest.mark.parametrize("backend", [name for name, no in available().items() if not no and name != "mlx"])
def test_a_file_is_measured_with_and_without_a_copy_of_its_weights(backend, capsys):
    line = f"bench small --mmap --backend {backend} --threads 1 --prefill 4 --n_predict 1 --json"
    assert main(line.split()) == 0
    out, err = capsys.readouterr()
    assert err == "", "where stderr is no terminal, nothing is shown"
    copied, mapped = json.loads(out)
    assert (copied["mapped"], mapped["mapped"]) == (False, True)
    for result in (copied, mapped):
        assert result["load"] > 0 and result["first_token"] > 0 and set(result["speeds"]) == {"1", "4"}
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


# --- against another program ----------------------------------------------------------------------


@pytest.mark.parametrize("type", ["q4_0", "Q4_K_M"])
def test_a_shape_is_measured_in_turns_with_another_program_on_the_same_file(standin, type, capsys):
    standin(WORKS)
    line = (
        f"bench --shape 7B --type {type} --against llama.cpp --threads 1 --prefill 4 --tokens 2 -n 2 --json"
    )
    assert main(line.split()) == 0
    out, err = capsys.readouterr()
    ours, theirs = json.loads(out)
    assert [result["backend"] for result in (ours, theirs)][1] == "llama.cpp"
    assert [(result["type"], result["threads"]) for result in (ours, theirs)] == [(type, 1)] * 2
    assert set(ours["speeds"]) == set(theirs["speeds"]) == set(theirs["ratios"]) == {"1", "2", "4"}
    for result in (ours, theirs):
        assert result["memory"] > 10**7 and result["first_token"] > 0
    path = Path(err.partition(": ")[0])
    assert path.suffix == ".gguf" and path.is_relative_to(tempfile.gettempdir()) and not path.exists()


def test_ratios_are_medians_of_each_rounds_own(monkeypatch):
    ours, theirs = Scripted({1: [1.0, 2.0, 4.0]}, [(0.5, 0.1)] * 3), Scripted({1: [3.0, 4.0, 8.0]}, [])
    monkeypatch.setattr(bench, "find_other", lambda name: Scripted)
    monkeypatch.setattr(bench, "Elsewhere", lambda program, task: theirs if program is Scripted else ours)
    result, other = bench.bench(shape="7B", n_predict=3, prefill=(), backends=["numpy"], against="scripted")
    assert (other.ratios, other.speeds) == ({1: 2.0}, {1: 1 / 4})
    assert not result.ratios and not other.shares and result.shares == {1: 0.25}


def test_where_the_other_program_is_missing_a_line_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setattr(programs, "find_spec", lambda name: None)
    assert main(["bench", "--shape", "7B", "--against", "llama.cpp"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "llama.cpp" in line and "pip install" in line


@pytest.mark.parametrize(
    "arguments, cause",
    [
        ("--shape 7B --against other", "other"),
        ("small --against llama.cpp", "GGUF"),
        ("--type q9_9 --shape 7B", "q9_9"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_line(standin, arguments, cause, capsys):
    standin(WORKS)
    assert main(["bench", *arguments.split()]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tinyllama: ") and cause in line


@pytest.mark.parametrize(
    "fault, cause",
    [
        ("raise ValueError('no such architecture')", "llama.cpp: no such architecture"),
        ("__import__('os')._exit(-4 % 256)", "llama.cpp ended with status 252"),
    ],
)
def test_what_goes_wrong_in_the_other_program_is_a_line(standin, fault, cause, capsys):
    standin(f"    def __init__(self, path, **_):\n        {fault}\n")
    assert main(["bench", "--shape", "7B", "--against", "llama.cpp", "--threads", "1"]) == 1
    assert f"tinyllama: {cause}" in capsys.readouterr().err.splitlines()[-1]


@needs_c
def test_two_programs_that_do_not_fit_together_are_refused(standin, free_memory, monkeypatch):
    standin(WORKS)
    monkeypatch.setattr(
        bench, "require_memory", lambda needed, what: bench.require(False, f"{what} {needed}")
    )
    with pytest.raises(TinyllamaError, match=r"in two programs at once \d+"):
        list(bench.bench(shape="7B", against="llama.cpp", threads=[1]))


@pytest.mark.parametrize("backend", ["numpy", pytest.param("c", marks=needs_c)])
def test_texts_that_are_written_together_are_held_against_one(backend):
    (result,) = run(backends=[backend], threads=[1], texts=(2, 40))
    assert [*result.texts] == [*result.gains] == [1, 2, 40]
    assert min(result.texts.values()) > 0 and result.gains[1] == 1


def test_tokens_of_texts_are_counted_whole_and_gains_are_medians_of_each_rounds_own(monkeypatch):
    class Together(Scripted):
        def begin_texts(self, n_texts, n_tokens):
            assert n_tokens >= bench.MOST

        def turn(self, n_texts):
            self.past.append(n_texts)
            return n_texts, next(self.took[-n_texts])

    program = Together(
        {1: [1.0] * 3, 10: [1.0] * 3, -1: [1.0, 2.0, 4.0], -4: [2.0, 4.0, 8.0]}, [(0.5, 0.1)] * 6
    )
    monkeypatch.setattr(bench, "Tinyllama", lambda task, progress: program)
    (result,) = bench.bench(shape="7B", n_predict=3, prefill=(10,), backends=["numpy"], texts=[4])
    assert program.past[6:] == [1, 4, 1, 4, 1, 4], "they take turns"
    assert result.texts == {1: 0.5, 4: 1.0} and result.gains == {1: 1.0, 4: 2.0}


def test_texts_are_part_of_the_table_and_of_json(capsys):
    line = "bench small --backend numpy --threads 1 --prefill 4 --n_predict 1 --texts 2"
    assert main(line.split()) == 0
    out = capsys.readouterr().out
    assert "1 text " in out and "2 texts" in out and "gain" in out and max(map(len, out.splitlines())) <= 80
    assert main([*line.split(), "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert set(result["texts"]) == set(result["gains"]) == {"1", "2"}
