"""A batch on a cluster: every line is answered once, as by one machine, whatever becomes of workers."""

import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from distributed import LocalCluster

from tinyllama.cluster import found, spread
from tinyllama.commands import main

PROMPTS = ("Once upon a time", "Tom", "The old king had three daughters, and", "In the forest")


def requests(path: Path, number: int, n_tokens: int = 24) -> Path:
    """A file of requests without seeds, of which one is wrong."""
    lines = []
    for n in range(number):
        body = {"prompt": PROMPTS[n % 4], "max_tokens": n_tokens + n % 7, "n": 1 + (n % 10 == 0)}
        body |= {"temperature": "hot"} if n == 7 else {}
        lines.append({"custom_id": f"r{n}", "method": "POST", "url": "/v1/completions", "body": body})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def answers(path: Path) -> list[tuple]:
    """What can't differ between two runs, in the order of the file; each line is whole."""
    data = path.read_bytes()
    assert data.endswith(b"\n")
    found = [json.loads(line) for line in data.splitlines()]
    assert len({answer["id"] for answer in found}) == len(found)
    bodies = [answer["response"]["body"] for answer in found]
    return [
        (answer["custom_id"], body.get("choices"), body.get("usage"), body.get("error"))
        for answer, body in zip(found, bodies, strict=True)
    ]


def batch(source: Path, target: Path, *more: object) -> int:
    return main(["batch", str(source), "-o", str(target), "--seed", "3", *map(str, more)])


@pytest.fixture
def alone(tmp_path):
    """The requests and what this process alone answers."""

    def alone(number: int, n_tokens: int = 24) -> tuple[Path, list[tuple]]:
        source = requests(tmp_path / "in.jsonl", number, n_tokens)
        assert batch(source, tmp_path / "alone.jsonl", "-t", 1) == 0
        return source, answers(tmp_path / "alone.jsonl")

    return alone


def fed(source: Path, pipe: Path, n_kills: int, kill: Callable[[random.Random], None]) -> threading.Thread:
    """Has the lines of a file come through a pipe, some before each kill, which are at random moments."""
    os.mkfifo(pipe)

    def write():
        lines, chance = source.read_bytes().splitlines(keepends=True), random.Random(1)
        some = -(-len(lines) // (n_kills + 1))
        with pipe.open("wb", buffering=0) as file:
            for start in range(0, len(lines), some):
                file.write(b"".join(lines[start : start + some]))
                if start + some < len(lines):
                    time.sleep(chance.uniform(0.3, 4))
                    kill(chance)

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    return writer


@pytest.fixture
def workers():
    """The address of a scheduler, and two workers as somebody starts them by hand, anew after each kill."""
    with LocalCluster(n_workers=0, dashboard_address="127.0.0.1:0", silence_logs=logging.CRITICAL) as cluster:
        command = [sys.executable, "-m", "dask", "worker", cluster.scheduler_address, "--nthreads", "1"]

        def start() -> subprocess.Popen:
            return subprocess.Popen([*command, "--no-nanny", "--no-dashboard"], stderr=subprocess.DEVNULL)

        def kill(chance: random.Random) -> None:
            place = chance.randrange(2)
            processes[place].kill()
            processes[place].wait()
            processes[place] = start()

        processes = [start(), start()]
        yield cluster.scheduler_address, kill
        for process in processes:
            process.kill()
            process.wait()


def test_the_answers_are_those_of_one_machine(client, alone, tmp_path, capsys):
    source, expected = alone(90)
    target = tmp_path / "out.jsonl"
    assert batch(source, target, "--scheduler", client.scheduler.address) == 0
    assert answers(target) == expected
    assert (
        "89 of 90 requests answered, 1 refused; the first is line 8: temperature" in capsys.readouterr().err
    )
    choices = [choice["seed"] for _, chosen, *_ in expected[:7] for choice in chosen]
    assert choices == [3, 4, 4, 5, 6, 7, 8, 9]  # line 1 has two choices


def test_the_same_answers_come_from_processes_of_a_command(alone, tmp_path):
    source, expected = alone(20)
    target = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "tinyllama", "batch", source, "-o", target, "--seed", "3"]
    subprocess.run([*command, "--processes", "2"], check=True, capture_output=True)
    assert answers(target) == expected


def killed_lose_nothing(workers, alone, folder: Path, n_lines: int, n_kills: int) -> None:
    source, expected = alone(n_lines)
    (address, kill), target, n_killed = workers, folder / "out.jsonl", []
    writer = fed(source, folder / "pipe", n_kills, lambda chance: n_killed.append(kill(chance)))
    assert batch(folder / "pipe", target, "--scheduler", address) == 0
    writer.join()
    assert len(n_killed) == n_kills and answers(target) == expected


def test_workers_that_are_killed_lose_nothing(workers, alone, tmp_path):
    killed_lose_nothing(workers, alone, tmp_path, 60, 3)


@pytest.mark.long
def test_twenty_killed_workers_lose_nothing_of_a_thousand_lines(workers, alone, tmp_path):
    killed_lose_nothing(workers, alone, tmp_path, 1000, 20)


def test_processes_that_dask_gives_up_are_started_anew_and_lose_nothing(alone, tmp_path):
    source, expected = alone(60)
    pipe, target, killed = tmp_path / "pipe", tmp_path / "out.jsonl", set()
    command = [sys.executable, "-m", "tinyllama", "batch", pipe, "-o", target, "--seed", "3"]
    soon = os.environ | {"DASK_DISTRIBUTED__DEPLOY__LOST_WORKER_TIMEOUT": "1s"}  # that it gives one up
    how = {"stderr": subprocess.PIPE, "text": True, "env": soon}
    with subprocess.Popen([*command, "--processes", "2"], **how) as run:

        def kill(_) -> None:
            """All that work, and for longer than Dask waits what is started in their place."""
            while not (target.exists() and target.stat().st_size):
                time.sleep(0.05)
            until = time.monotonic() + 2
            while time.monotonic() < until:
                for child in psutil.Process(run.pid).children():
                    if "spawn_main" in " ".join(child.cmdline()):
                        child.kill()
                        killed.add(child.pid)
                time.sleep(0.1)

        writer = fed(source, pipe, 2, kill)
        said = run.communicate()[1]
    writer.join()
    assert run.returncode == 0 and "Traceback" not in said, said
    assert answers(target) == expected and len(killed) > 4


# --- workers that come, won't do, or stand still --------------------------------------------------


def test_a_worker_that_comes_late_gets_work(client, alone, tmp_path, monkeypatch):
    source, expected = alone(60)
    target, pipe, asked = tmp_path / "out.jsonl", tmp_path / "pipe", set()
    os.mkfifo(pipe)
    submit = spread.Spread._submit

    def noted(self, key, address, *more):
        asked.update([address] if key.startswith("answers") else [])
        submit(self, key, address, *more)

    def write():
        lines = source.read_bytes().splitlines(keepends=True)
        with pipe.open("wb", buffering=0) as file:
            file.write(b"".join(lines[:4]))
            client.cluster.scale(3)
            client.wait_for_workers(3)
            time.sleep(spread.OFTEN)  # until it is seen
            file.write(b"".join(lines[4:]))

    monkeypatch.setattr(spread.Spread, "_submit", noted)
    writer = threading.Thread(target=write)
    writer.start()
    assert batch(pipe, target, "--scheduler", client.scheduler.address) == 0
    writer.join()
    client.cluster.scale(2)
    assert answers(target) == expected and len(asked) == 3


def test_a_worker_that_stands_still_holds_nothing_up(client, alone, tmp_path, monkeypatch):
    source, expected = alone(40, 60)
    target = tmp_path / "out.jsonl"
    (pid, *_), take = client.run(os.getpid).values(), spread.Spread._take

    def stopped(self, *arguments):
        os.kill(pid, signal.SIGSTOP)  # in the middle of the run
        return take(self, *arguments)

    monkeypatch.setattr(spread.Spread, "_take", stopped)
    try:
        assert batch(source, target, "--scheduler", client.scheduler.address) == 0
    finally:
        os.kill(pid, signal.SIGCONT)
    assert answers(target) == expected


def test_a_worker_that_will_not_do_is_named_and_the_others_go_on(
    client, alone, tmp_path, monkeypatch, capsys
):
    source, expected = alone(20)
    target, look = tmp_path / "out.jsonl", spread.Spread._trouble
    refused = []

    def trouble(self, found):
        refused.append(found)
        return "it is too slow" if len(refused) == 1 else look(self, found)

    monkeypatch.setattr(spread.Spread, "_trouble", trouble)
    assert batch(source, target, "--scheduler", client.scheduler.address) == 0
    assert answers(target) == expected
    said = capsys.readouterr().err
    assert f"{refused[0]}: it is too slow; the others go on without it" in said


def test_a_model_that_no_worker_has_ends_the_run_in_one_line(client, tmp_path, capsys):
    source, target = requests(tmp_path / "in.jsonl", 3), tmp_path / "out.jsonl"
    model = ["-m", tmp_path / "nothing.gguf"]
    assert batch(source, target, "--scheduler", client.scheduler.address, *model) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("tinyllama: worker tcp://127.0.0.1:") and "nothing.gguf: there is no such" in last


def test_workers_with_another_version_are_named_before_they_are_asked(client, tmp_path, capsys, monkeypatch):
    source, target = requests(tmp_path / "in.jsonl", 3), tmp_path / "out.jsonl"
    monkeypatch.setattr(found, "__version__", "99.0")  # here and of the scheduler, which is in this process
    assert batch(source, target, "--scheduler", client.scheduler.address) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert (
        last.startswith("tinyllama: worker tcp://127.0.0.1:") and last.count("hasn't tinyllama 99.0 (") == 2
    )


def test_a_worker_s_memory_limit_holds_for_the_model(client, tmp_path, capsys):
    source, target = requests(tmp_path / "in.jsonl", 3), tmp_path / "out.jsonl"

    def limit(n_bytes, dask_worker):
        dask_worker.memory_manager.memory_limit = n_bytes

    client.run(limit, 10**7)
    try:
        assert batch(source, target, "--scheduler", client.scheduler.address) == 1
    finally:
        client.run(limit, None)
    last = capsys.readouterr().err.splitlines()[-1]
    assert "the model needs 25 MB of memory, and its --memory-limit leaves 7.0 MB" in last


# --- the end --------------------------------------------------------------------------------------


def test_ctrl_c_ends_all_and_the_same_command_goes_on(alone, tmp_path):
    source, expected = alone(100, 60)
    target = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "tinyllama", "batch", source, "-o", target, "--seed", "3"]
    with subprocess.Popen(
        [*command, "--processes", "2"], stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as run:
        while not (target.exists() and target.stat().st_size):
            time.sleep(0.05)
        os.killpg(run.pid, signal.SIGINT)
        assert run.wait() == 130
        assert "Traceback" not in (said := run.stderr.read()) and "the same command goes on from" in said
    n_done = len(answers(target))
    assert 0 < n_done < 100
    with target.open("ab") as file:
        file.write(b'{"id": "batch_req_half')
    subprocess.run([*command, "--processes", "2"], check=True, capture_output=True)
    assert answers(target) == expected
