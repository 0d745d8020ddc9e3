"""Threads: what they yield, and what becomes of them when one fails or nobody wants the rest."""

import threading
from contextlib import closing

import pytest

from tinyllama.machine.threads import results_of


def until(given_up: threading.Event):
    given_up.wait(60)
    yield "given up"


def test_all_that_jobs_yield_comes_and_nobody_gives_up():
    given_up = []
    results = list(results_of([range(100), iter(()), range(100, 200)], lambda: given_up.append(True)))
    assert sorted(results) == list(range(200)) and not given_up
    assert list(results_of([], given_up.clear)) == []


def test_jobs_run_at_once():
    met = threading.Barrier(3, timeout=60)
    assert len(list(results_of([map(met.wait, [60]) for _ in range(3)], int))) == 3


def test_a_failure_is_raised_as_it_is_and_the_others_end_before():
    given_up, ended = threading.Event(), []

    def other():
        yield from until(given_up)
        ended.append(True)

    with pytest.raises(ZeroDivisionError):
        list(results_of([other(), (1 // x for x in [0])], given_up.set))
    assert ended == [True]


def test_who_wants_no_more_makes_the_others_end():
    given_up, ended = threading.Event(), []

    def other():
        yield "first"
        yield from until(given_up)
        ended.append(True)

    with closing(results_of([other()], given_up.set)) as results:
        assert next(results) == "first"
    assert ended == [True]
