"""Threads that an interrupt can't leave waiting for ever.

Ctrl-C raises KeyboardInterrupt between any two steps of the main thread's Python code, and the insides of
`threading` and `concurrent.futures` are Python code: between taking a lock and giving it back, say, for which
another thread then waits. So the main thread shares with others only what is one step: bare threads, bare
locks and SimpleQueue.
"""

import _thread
from collections.abc import Callable, Iterable, Iterator
from itertools import repeat
from queue import SimpleQueue
from typing import NamedTuple


def shared_out(threads: int, job: Callable, *arguments: Iterable) -> tuple:
    """As `map`, at once and without results, on several threads: this one, and others while it lasts.

    Threads that stay would outlive an interrupt that comes as they are made, be missing in a forked child,
    and refuse work when Python exits. An exception in any of them, an interrupt too, ends the others' jobs.
    """
    jobs, failures = list(zip(*arguments, strict=True)), []
    waiting = iter(jobs)

    def work() -> None:
        try:
            while not failures and (job_arguments := next(waiting, None)) is not None:
                job(*job_arguments)
        except BaseException as error:
            failures.append(error)

    def help(done: _thread.LockType) -> None:
        work()
        done.release()

    helpers = []
    try:
        for _ in range(min(threads, len(jobs)) - 1):
            helpers.append(done := _thread.allocate_lock())
            done.acquire()
            _thread.start_new_thread(help, (done,))
        work()
        for done in helpers:
            done.acquire()
    except BaseException as interrupt:
        failures.append(interrupt)
    if failures:
        raise failures.pop(0)  # a list that still held it would be a cycle
    return ()


class _End(NamedTuple):
    error: BaseException | None = None


def results_of(jobs: list[Iterable], give_up: Callable[[], object]) -> Iterator:
    """Run several iterables, each in a thread of its own; yields what they yield, as it comes.

    What one of them raises is raised here. Then, at an interrupt, and where nobody wants the rest, `give_up`
    is called, which should make them end. No thread is left when this has ended: use it in `closing`.
    """
    results, running, threads = SimpleQueue(), [_thread.allocate_lock() for _ in jobs], []

    def run(job: Iterable, lock: _thread.LockType) -> None:
        try:
            for result in job:
                results.put(result)
        except BaseException as error:
            results.put(_End(error))
        else:
            results.put(_End())
        lock.release()

    try:
        for lock in running:
            lock.acquire()
        threads += map(_thread.start_new_thread, repeat(run), zip(jobs, running, strict=True))  # in one step
        yield from _until_all_end(results, len(jobs))
    except BaseException:
        give_up()
        raise
    finally:
        for lock in running[: len(threads)]:
            lock.acquire()


def _until_all_end(results: SimpleQueue, n_jobs: int) -> Iterator:
    while n_jobs:
        result = results.get()
        if not isinstance(result, _End):
            yield result
        elif result.error is not None:
            raise result.error
        else:
            n_jobs -= 1
