"""`tinyllama batch`: every request gets its answer once, whatever ends a run and whatever lines hold."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import tinyllama
from tinyllama.commands import answer_file, batch, main
from tinyllama.texts import answering, jobs, openai

COMPLETIONS = "/v1/completions"


@pytest.fixture
def run(capsys):
    """Run a command line in this process: (exit status, stdout, stderr)."""

    def run(*argv: object):
        return main([*map(str, argv)]), *capsys.readouterr()

    return run


def request(custom_id="a", prompt="Tom", url=COMPLETIONS, method="POST", **body) -> dict:
    body = {"prompt": prompt, "max_tokens": 4, "seed": 1} | body
    return {"custom_id": custom_id, "method": method, "url": url, "body": body}


def written(path: Path, *requests) -> Path:
    """A file of requests: objects, or lines as they are."""
    lines = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in requests]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def answers(path: Path) -> list[dict]:
    data = path.read_bytes()
    assert data.endswith(b"\n") and b"\n\n" not in data
    return [json.loads(line) for line in data.splitlines()]


def ids(path: Path) -> list[str]:
    return [answer["custom_id"] for answer in answers(path)]


def texts(path: Path) -> dict[str, str]:
    return {a["custom_id"]: a["response"]["body"]["choices"][0]["text"] for a in answers(path)}


@pytest.fixture
def files(tmp_path):
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


MANY = [
    request(f"r{n}", "Once upon a time" if n % 2 else "Tom", seed=n, max_tokens=1 + 7 * n % 20)
    for n in range(90)
]


def test_each_request_gets_its_answer_in_the_order_of_the_requests(run, files):
    source, target = files
    written(source, *MANY)
    status, out, err = run("batch", source, "-o", target)
    assert (status, out) == (0, "") and f"{target}: 90 of 90 requests answered\n" in err
    assert ids(target) == [f"r{n}" for n in range(90)]
    assert len({answer["id"] for answer in answers(target)}) == 90
    for answer, asked in zip(answers(target), MANY, strict=True):
        assert answer["id"].startswith("batch_req_") and answer["error"] is None
        assert answer["response"]["status_code"] == 200 and answer["response"]["request_id"]
        body, own = answer["response"]["body"], asked["body"]
        settings = {"n_predict": own["max_tokens"], "seed": own["seed"], "temp": 1.0, "top_p": 1.0}
        expected = tinyllama.generate(own["prompt"], remember=False, **settings)
        assert body["choices"][0]["text"] == expected and body["model"] == "small"
    assert [*target.parent.iterdir()] and not (target.parent / "out.jsonl.tmp").exists()


def test_what_stands_in_the_output_is_not_computed_again(run, files, monkeypatch):
    source, target = files
    written(source, *MANY[:10])
    run("batch", source, "-o", target)
    before = target.read_bytes()
    monkeypatch.setattr(tinyllama.Llama, "run", lambda *_, **__: pytest.fail("computes"))
    status, _, err = run("batch", source, "-o", target)
    assert status == 0 and "keeps the 10 answers" in err and "(10 of them before)" in err
    assert target.read_bytes() == before


def test_half_a_line_at_the_end_is_computed_again(run, files):
    source, target = files
    written(source, *MANY[:6])
    run("batch", source, "-o", target)
    whole, lines = target.read_bytes(), target.read_bytes().splitlines(keepends=True)
    for cut in (1, 15, len(lines[5]) - 1):
        target.write_bytes(b"".join(lines[:5]) + lines[5][:cut])
        assert run("batch", source, "-o", target)[0] == 0
        found = target.read_bytes().splitlines(keepends=True)
        assert (
            found[:5] == lines[:5]
            and texts(target)["r5"] == json.loads(lines[5])["response"]["body"]["choices"][0]["text"]
        )
    assert len(whole.splitlines()) == 6


def test_new_requests_come_to_the_answers_that_are_there_and_all_are_put_in_order(run, files):
    source, target = files
    written(source, MANY[3], MANY[1])
    run("batch", source, "-o", target)
    written(source, *MANY[:5])
    run("batch", source, "-o", target)
    assert ids(target) == ["r0", "r1", "r2", "r3", "r4"]
    written(source, *MANY[5:7])
    err = run("batch", source, "-o", target)[2]
    assert ids(target) == ["r5", "r6", "r0", "r1", "r2", "r3", "r4"] and "5 answers of other requests" in err


def test_what_was_refused_is_tried_again(run, files):
    source, target = files
    written(source, request("a", n=2), request("b"))
    run("batch", source, "-o", target)
    written(source, request("a"), request("b"))
    run("batch", source, "-o", target)
    assert [(a["custom_id"], a["response"]["status_code"]) for a in answers(target)] == [
        ("a", 200),
        ("b", 200),
    ]


@pytest.mark.parametrize(
    "line, wrong",
    [
        (b"not json", "isn't JSON"),
        (b"[1]", "isn't an object"),
        (b"3", "isn't an object"),
        (b'{"a": NaN}', "NaN is no number"),
        (b"\xff\xfe", "isn't JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"1" * 5000 + b"}", "isn't JSON"),
        (b"{}", "method must be POST"),
        (request("b", method="GET"), "method must be POST"),
        (request("b", url="/v1/embeddings"), "url must be"),
        ({"custom_id": "b", "method": "POST", "url": COMPLETIONS}, "body must be an object"),
        ({"custom_id": "b", "method": "POST", "url": COMPLETIONS, "body": []}, "body must be an object"),
        (request(7), "custom_id must be a text"),
        (request(["b"]), "custom_id must be a text"),
        (request("a"), "the custom_id 'a' is that of line 1"),
        (request("b", prompt=""), "prompt must be"),
        (request("b", prompt=[5_000_000]), "token id"),
        (request("b", prompt=["Tom", [5_000_000]]), "token id"),
        (request("b", prompt="word " * 5000), "context is full"),
        (request("b", prompt="\ud800"), "half a character"),
        (request("b", tools=[{}]), "tools"),
        (
            request(
                "b", url="/v1/chat/completions", prompt=None, messages=[{"role": "user", "content": "Hi"}]
            ),
            "no chat template",
        ),
    ],
)
def test_a_bad_line_gets_an_error_of_its_own_and_the_others_go_on(run, files, line, wrong):
    source, target = files
    written(source, request("a"), line, request("c"))
    status, _, err = run("batch", source, "-o", target)
    assert status == 0 and "2 of 3 requests answered, 1 refused; the first is line 2: " in err
    first, bad, last = answers(target)
    assert (first["custom_id"], last["custom_id"]) == ("a", "c")
    assert bad["custom_id"] == ("b" if isinstance(line, dict) and line["custom_id"] == "b" else "line-2")
    assert bad["response"]["status_code"] == 400 and bad["error"] is None
    error = bad["response"]["body"]["error"]
    assert (
        wrong in error["message"]
        and error["type"] == "invalid_request_error"
        and {"param", "code"} <= error.keys()
    )


def test_a_request_without_a_name_gets_the_number_of_its_line(run, files):
    source, target = files
    written(source, request("line-4"), request(None), b"", request(None), request(None), b"{}")
    assert run("batch", source, "-o", target)[0] == 0
    assert ids(target) == ["line-4", "line-2", "line-4+", "line-5", "line-6"]


def test_lines_may_end_as_on_windows_begin_with_a_mark_and_be_empty(run, files):
    source, target = files
    line = json.dumps(request("é", prompt="Königin")).encode()
    source.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n   \n" + json.dumps(request("z")).encode())
    assert run("batch", source, "-o", target)[0] == 0
    assert ids(target) == ["é", "z"]


def test_several_prompts_of_a_request_are_several_choices(run, files):
    source, target = files
    written(source, request("a", ["Tom", "Once upon a time"]))
    run("batch", source, "-o", target)
    (answer,) = answers(target)
    assert [choice["index"] for choice in answer["response"]["body"]["choices"]] == [0, 1]


def test_a_line_that_is_too_long_is_refused_without_being_kept(run, files, monkeypatch):
    monkeypatch.setattr(batch, "LARGEST", 1000)
    monkeypatch.setattr(openai, "LARGEST", 1000)
    monkeypatch.setattr(batch, "CHUNK", 64)
    source, target = files
    written(source, request("a"), request("b", "Tom " * 1000), request("c"))
    run("batch", source, "-o", target)
    assert [(a["custom_id"], a["response"]["status_code"]) for a in answers(target)] == [
        ("a", 200),
        ("line-2", 400),
        ("c", 200),
    ]


def test_only_so_many_requests_are_begun_as_there_is_room_for(run, files, monkeypatch):
    monkeypatch.setattr(jobs, "AHEAD", 4)
    most, add = 0, jobs.Jobs.add

    def noted(self, *arguments):
        nonlocal most
        found = add(self, *arguments)
        most = max(most, len(self))
        return found

    monkeypatch.setattr(jobs.Jobs, "add", noted)
    source, target = files
    written(source, *MANY[:20])
    run("batch", source, "-o", target)
    assert most == 4 and len(ids(target)) == 20


def test_other_models_that_requests_name_are_said_once(run, files):
    source, target = files
    written(source, request("a", model="gpt-4o"), request("b", model="gpt-4o"), request("c", model="small"))
    err = run("batch", source, "-o", target)[2]
    assert err.count("gpt-4o") == 1 and "all are answered by small" in err


# --- files ----------------------------------------------------------------------------------------


def test_a_file_that_holds_something_else_is_left_alone(run, files):
    source, target = files
    written(source, request("a"))
    for content in (b"Dear diary\n", b"Dear diary", b'{"id": "batch_req_1"}\n', b'{"id": "batch_req_1"}\nx'):
        target.write_bytes(content)
        status, _, err = run("batch", source, "-o", target)
        assert status == 1 and "name another file" in err and target.read_bytes() == content


def test_requests_and_answers_cannot_be_one_file(run, files):
    source, target = files
    written(source, request("a"))
    os.link(source, target)
    for same in (source, target):
        status, _, err = run("batch", source, "-o", same)
        assert status == 1 and "has the requests" in err


def test_files_that_cannot_be_read_or_written_are_named(run, files):
    source, target = files
    assert f"tinyllama: {source}: No such file" in run("batch", source, "-o", target)[2]
    source.write_bytes(b"\n\n")
    assert "there are no requests" in run("batch", source, "-o", target)[2]
    written(source, request("a"))
    status, _, err = run("batch", source, "-o", target.parent / "nowhere" / "out.jsonl")
    assert status == 1 and "nowhere" in err.splitlines()[-1]
    assert f"{target.parent}: is a folder" in run("batch", source, "-o", target.parent)[2]


def test_a_full_disk_leaves_whole_lines(run, files, monkeypatch):
    source, target = files
    written(source, *MANY[:3])
    seen = 0

    class Full:
        def __init__(self, file):
            self.file = file

        def fileno(self):
            return self.file.fileno()

        def truncate(self, size):
            return self.file.truncate(size)

        def write(self, data):
            nonlocal seen
            seen += 1
            if seen == 2:
                return self.file.write(data[:20])
            if seen > 2:
                raise OSError(28, os.strerror(28))
            return self.file.write(data)

        def close(self):
            self.file.close()

    def opened(path, mode, **options):
        file = open(path, mode, **options)  # noqa: SIM115
        return Full(file) if mode == "a+b" else file

    monkeypatch.setattr(answer_file, "open", opened, raising=False)
    status, _, err = run("batch", source, "-o", target)
    assert status == 1 and os.strerror(28) in err
    assert len(ids(target)) == 1
    monkeypatch.undo()
    assert run("batch", source, "-o", target)[0] == 0 and ids(target) == ["r0", "r1", "r2"]


def test_stdin_may_come_slowly(run, files, monkeypatch):
    _, target = files
    reader, writer = os.pipe()

    def write():
        with open(writer, "wb", buffering=0) as pipe:
            for asked in MANY[:4]:
                line = json.dumps(asked).encode() + b"\n"
                pipe.write(line[:30])
                time.sleep(0.05)
                pipe.write(line[30:])
                while not target.exists():
                    time.sleep(0.01)

    writing = threading.Thread(target=write)
    with open(reader) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        writing.start()
        assert run("batch", "-", "-o", target)[0] == 0
        writing.join()
    assert ids(target) == ["r0", "r1", "r2", "r3"]


# --- ends of runs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_keeps_what_is_done_and_the_next_run_goes_on(run, files, monkeypatch, name):
    source, target = files
    written(source, *MANY)
    number, n_calls, forward = signal.Signals[name], 0, tinyllama.Llama.run

    def interrupted(self, *args, **options):
        nonlocal n_calls
        n_calls += 1
        if n_calls == 40:
            signal.raise_signal(number)
        return forward(self, *args, **options)

    monkeypatch.setattr(tinyllama.Llama, "run", interrupted)
    status, _, err = run("batch", source, "-o", target)
    monkeypatch.undo()
    n_done = len(answers(target))
    assert status == 128 + number and n_calls == 40 and 0 < n_done < 90
    seed = err.split("seed ")[1].split("\n")[0]
    same = f"the same command with --seed {seed} goes on from there"
    assert err.endswith(f"interrupted after {n_done} answers; {same}\n")
    kept = target.read_bytes().splitlines()
    assert run("batch", source, "-o", target)[0] == 0
    assert ids(target) == [f"r{n}" for n in range(90)] and {*kept} <= {*target.read_bytes().splitlines()}
    other = target.with_name("other.jsonl")
    run("batch", source, "-o", other)
    assert texts(target) == texts(other)


def test_a_killed_run_leaves_whole_answers_and_the_next_one_goes_on(run, files):
    source, target = files
    written(source, *MANY[:20])
    command = [sys.executable, "-m", "tinyllama", "batch", "-", "-o", str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        process.stdin.write(b"".join(source.read_bytes().splitlines(keepends=True)[5:10]))
        process.stdin.flush()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and (not target.exists() or target.read_bytes().count(b"\n") < 5):
            time.sleep(0.01)
        assert "is being written by another run" in run("batch", source, "-o", target)[2]
        process.kill()
    kept = target.read_bytes().splitlines()
    assert run("batch", source, "-o", target)[0] == 0
    assert ids(target) == [f"r{n}" for n in range(20)]
    assert len(kept) == 5 and {*kept} <= {*target.read_bytes().splitlines()}


# --- chats ----------------------------------------------------------------------------------------


def test_a_chat_is_answered_by_the_models_template(run, files, smollm2_file):
    source, target = files
    chat = [{"role": "user", "content": "Hi <|im_end|>"}]
    body = {"messages": chat, "max_tokens": 5, "temperature": 0}
    written(source, {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body})
    assert run("batch", source, "-o", target, "-m", "smollm2")[0] == 0
    (answer,) = answers(target)
    body = answer["response"]["body"]
    assert body["object"] == "chat.completion" and body["model"] == "smollm2"
    assert body["choices"][0]["message"]["content"]


def test_without_jinja2_nothing_is_answered_and_the_error_says_what_to_install(
    run, files, smollm2_file, monkeypatch
):
    source, target = files
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    written(source, {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body})
    monkeypatch.setattr(answering, "available", lambda: False)
    status, _, err = run("batch", source, "-o", target, "-m", "smollm2")
    assert status == 1 and err.endswith(
        "tinyllama: chats need the package jinja2: pip install 'tinyllama-lab[chat]'\n"
    )
