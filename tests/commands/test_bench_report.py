from dataclasses import replace

import pytest

from tinyllama.commands import bench_report
from tinyllama.commands.bench import Result

NAMES = ("c avx2", "llama.cpp")
SPEEDS = {1: 4.61, 2: 8.1, 3: 3.3, 16: 10.0, 512: 150.0}
SHARES = {1: 0.9, 2: 0.79, 3: 0.22, 16: 0.125, 512: 0.3}
OURS = Result("7B, random weights", "q4_0", "c", "avx2", 2, False, 2.1, 2.9, 4_100_000_000, SPEEDS, SHARES)
OURS = replace(OURS, read_bandwidth=26e9, read_probe=5.12, multiply_probe=500.0)
THEIRS = Result("7B, random weights", "q4_0", "llama.cpp", None, 2, False, 5.0, 5.8, 8_200_000_000)
THEIRS = replace(
    THEIRS, speeds={n: speed / 2 for n, speed in SPEEDS.items()}, ratios=dict.fromkeys(SPEEDS, 2.0)
)
MAPPED = replace(OURS, mapped=True, memory=10**7)
NUMPY = replace(
    OURS, backend="numpy", level=None, threads=16, shares={}, read_probe=None, multiply_probe=None
)


def test_the_table_holds_speeds_against_limits_and_another_program():
    assert bench_report.table([OURS, THEIRS]).splitlines() == [
        "7B, random weights, q4_0",
        "",
        "Tokens a second by how many are computed at once: of 1, a text is written, of",
        "more, a prompt is read. The share is that of what memory or arithmetic allow.",
        "The ratio says how many times better tinyllama is.",
        "",
        "                      c avx2         llama.cpp",
        "                   2 threads  share  2 threads  ratio",
        "load                  2.10 s            5.00 s",
        "first token           2.90 s            5.80 s   2.00",
        "memory                4.1 GB            8.2 GB   2.00",
        "1 token                  4.6    90%        2.3   2.00",
        "2 tokens                 8.1    79%        4.0   2.00",
        "3 tokens                 3.3    22%        1.6   2.00",
        "16 tokens               10.0    12%        5.0   2.00",
        "512 tokens               150    30%       75.0   2.00",
        "memory is read at  26.0 GB/s",
        "and allows           n x 5.1",
        "arithmetic allows        500",
        "",
        "Several at once reach at least, of the lesser of n x 1 token and 512 tokens:",
        "  c avx2, 2 threads: 14% (16 tokens)",
        "  llama.cpp, 2 threads: 14% (16 tokens)",
    ]


@pytest.mark.parametrize(
    "results",
    [
        [OURS],
        [OURS, MAPPED, replace(OURS, level="ref", threads=1024)],
        [OURS, THEIRS, MAPPED, THEIRS, replace(OURS, level="amx"), THEIRS],
        [NUMPY, replace(NUMPY, backend="numexpr"), *[OURS] * 5],
        [replace(OURS, model=f"/a/{'long' * 10}/path/{'of' * 30}/folders.gguf")],
    ],
)
def test_however_much_was_measured_80_columns_are_enough(results):
    text = bench_report.table(results)
    assert max(map(len, text.splitlines())) <= 80
    for result in results:
        assert text.count(result.name.split()[-1]) >= 1
    assert text.count("4.6") == sum(result.speeds[1] == 4.61 for result in results), "of each its speed"


def test_a_program_stands_beside_what_it_is_held_against():
    lines = bench_report.table([OURS, THEIRS, MAPPED, THEIRS]).splitlines()
    heads = [line.split() for line in lines if "llama.cpp" in line and "c avx2" in line]
    assert heads == [["c", "avx2", "llama.cpp"]] * 2


def test_nothing_is_said_about_several_at_once_where_only_long_prompts_were_read():
    result = replace(OURS, speeds={1: 4.6, 32: 9.0, 512: 15.0}, shares={1: 0.9, 32: 0.3, 512: 0.3})
    assert "Several at once" not in bench_report.table([result])


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """A function: the axes of the picture of some results, which is also saved."""
    figure = pytest.importorskip("matplotlib.figure", reason="matplotlib isn't installed")

    def draw(results: list[Result]):
        figures, save = [], figure.Figure.savefig
        monkeypatch.setattr(
            figure.Figure, "savefig", lambda self, path: figures.append(self) or save(self, path)
        )
        bench_report.plot(results, tmp_path / "roofline.png")
        assert (tmp_path / "roofline.png").stat().st_size > 10_000
        (axes,) = figures[0].axes
        return axes

    return draw


def test_the_picture_shows_what_was_measured_below_both_limits(drawn):
    axes = drawn([OURS, THEIRS])
    lines = [list(zip(*line.get_data(), strict=True)) for line in axes.lines]
    crossing = 500 / 5.12
    memory, arithmetic = [(1, 5.12), (crossing, 500.0)], [(crossing, 500.0), (512, 500.0)]
    assert [sorted(line) for line in lines if len(line) == 2] == [memory, arithmetic]
    assert sorted(SPEEDS.items()) in lines and sorted(THEIRS.speeds.items()) in lines
    texts = " ".join(text.get_text() for text in [*axes.texts, *axes.get_legend().get_texts()])
    for text in (
        "memory allows 5.1 x n",
        "arithmetic allows 500",
        "c avx2, 2 threads",
        "llama.cpp, 2 threads",
    ):
        assert text in texts
    assert [label.get_text() for label in axes.get_xticklabels()] == [*map(str, SPEEDS)]


def test_the_limit_of_arithmetic_is_drawn_even_where_memory_alone_limits(drawn):
    axes = drawn([replace(OURS, speeds={1: 4.6, 8: 30.0})])
    assert [1, 8] in [list(line.get_xdata()) for line in axes.lines if set(line.get_ydata()) == {500.0}]
