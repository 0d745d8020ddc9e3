"""What stages and hops take is measured, and what other numbers of machines should give follows from it."""

import json
import math

import pytest

from tinyllama.cluster.loading import load
from tinyllama.commands import bench_pipeline, main
from tinyllama.commands.bench_pipeline import Result, Share, expected

pytest.importorskip("tinyllama._native")

STAGES = [
    Share("tcp://1.2.3.4:5", "mac1", "c", "neon", 8, 0, 15, 10**9),
    Share("tcp://1.2.3.5:5", "mac2", "c", "neon", 1, 16, 31, 2 * 10**9),
]
MEASURED = Result(
    "7B.gguf",
    "Q4_0",
    STAGES,
    12.34,
    seconds={1: 0.102, 512: 0.006},
    computing={1: [0.06, 0.04], 512: [0.006, 0.004]},
    hops={1: 0.001},
    texts={1: 9.5, 2: 19.0},
)
MEASURED.expected = {n: expected(MEASURED, n, n_layers=32, pieces=8) for n in (1, 2, 4, 8)}


@pytest.fixture
def hurried(monkeypatch):
    """One round."""
    monkeypatch.setattr(bench_pipeline, "MOST", 1)


@pytest.fixture
def llama(client):
    with load("small", "c", scheduler=client, split=[1, 3]) as llama:
        yield llama


# --- arithmetic -----------------------------------------------------------------------------------


def test_one_text_takes_all_stages_and_a_hop_to_each():
    assert [found.text for found in MEASURED.expected.values()] == [
        pytest.approx(1 / (0.1 + n * 0.001)) for n in (1, 2, 4, 8)
    ]


def test_as_many_texts_as_machines_are_as_fast_as_the_slowest_one_and_the_hops():
    assert MEASURED.expected[4].texts == pytest.approx(1 / (0.1 / 4 + 0.001))
    # Of 9 layers on 8 machines one has 2, for which the others wait.
    assert expected(MEASURED, 8, n_layers=9, pieces=8).texts == pytest.approx(1 / (0.1 * 2 / 9))


def test_a_prompt_of_one_piece_gains_nothing_and_one_of_many_nearly_all():
    alone = expected(MEASURED, 1, 32, 1).prompt
    assert alone == pytest.approx(512 / (512 * 0.01 + 0.001))
    assert expected(MEASURED, 4, 32, 1).prompt == pytest.approx(alone, rel=0.01)
    assert expected(MEASURED, 4, 32, 1000).prompt == pytest.approx(4 * alone, rel=0.01)


# --- a table --------------------------------------------------------------------------------------


def test_the_table_holds_stages_hops_texts_and_what_is_expected():
    assert bench_pipeline.table(MEASURED).splitlines() == [
        "7B.gguf, Q4_0, loaded in 12.3 s",
        "",
        "Milliseconds a token by how many are computed at once: of 1, a text is written,",
        "of more, a prompt is read, a long one in pieces that follow each other through",
        "the stages. A hop is the way to a stage and back.",
        "",
        "stage                    layers  memory  1 token  512 tokens",
        "mac1, c neon, 8 threads    0-15  1.0 GB    60.00        6.00",
        "mac2, c neon, 1 thread    16-31  2.0 GB    40.00        4.00",
        "a hop                                       1.00",
        "all in all                                102.00        6.00",
        "tokens a second                              9.8         167",
        "",
        "Texts that are written together, with all that generate does, in tokens a second:",
        "",
        "          1 text  2 texts",
        "together     9.5     19.0",
        "gain        1.00     2.00",
        "",
        "What so many machines like these should give, in tokens a second. It isn't",
        "measured, but arithmetic: one text takes all stages and hops; as many texts as",
        "machines wait for the slowest one, or for hops.",
        "",
        "                 1 machine  2 machines  4 machines  8 machines",
        "one text               9.9         9.8         9.6         9.3",
        "as many texts          9.9        19.6        38.5        74.1",
        "a prompt of 512        100         178         290         424",
    ]


def test_workers_of_one_computer_are_told_of():
    assert "on one computer" not in bench_pipeline.table(MEASURED)
    STAGES[1].host, before = "mac1", STAGES[1].host
    assert "on one computer" in bench_pipeline.table(MEASURED)
    STAGES[1].host = before


# --- measuring ------------------------------------------------------------------------------------


def test_stages_hops_and_texts_are_measured(llama, hurried):
    found = bench_pipeline.bench(llama, [16, 128], [3], n_predict=4)
    assert [(share.first, share.last) for share in found.stages] == [(0, 0), (1, 3)]
    assert found.seconds.keys() == found.computing.keys() == {1, 16, 128}
    assert found.hops.keys() == {1, 16}, "128 tokens are computed in two passes"
    assert all(0 < sum(found.computing[n]) < found.seconds[n] for n in (1, 16))
    assert found.texts.keys() == {1, 3} and all(speed > 0 for speed in found.texts.values())
    assert found.expected.keys() == {1, 2, 4}, "there are four layers"
    assert all(math.isfinite(value) for some in found.expected.values() for value in vars(some).values())


def test_the_command_prints_it(client, hurried, capsys):
    line = ["bench", "small", "--backend", "c", "--threads", "1", "--prefill", "8", "--texts", "2", "-n", "2"]
    line += ["--scheduler", client.scheduler.address, "--split", "4"]
    assert main([*line, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["model"], [share["last"] for share in found["stages"]]) == ("small", [3])
    assert found["seconds"].keys() == {"1", "8"} and found["texts"].keys() == {"1", "2"}
    assert main(line) == 0
    assert "\na hop " in capsys.readouterr().out
