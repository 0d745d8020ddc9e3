"""A server in a process of its own, with real clients; and slow ones, and the end."""

import concurrent.futures
import json
import signal
import socket
import subprocess
import threading
import time
from contextlib import suppress

import openai
import pytest
import uvicorn

from tinyllama.serve import guard, server
from tinyllama.serve.server import Server, config_of
from tinyllama.texts.openai import COMPLETIONS

LONG = {
    "prompt": "Once upon a time",
    "max_tokens": 2000,
    "temperature": 1.5,
    "logit_bias": {"1": -100, "2": -100},
}


@pytest.fixture
def api(process):
    with openai.OpenAI(base_url=f"{process.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_the_openai_client_gets_completions(api, llama):
    body = api.completions.create(model="small", prompt="Tom", max_tokens=8, seed=1, n=2, logprobs=2)
    for seed, choice in enumerate(body.choices, 1):
        text = llama.generate("Tom", n_predict=8, seed=seed, temp=1.0, top_p=1.0)
        assert choice.text == text and choice.logprobs.tokens == [token.piece for token in text.tokens]
    parts = api.completions.create(model="small", prompt="Tom", max_tokens=8, seed=1, stream=True)
    assert "".join(part.choices[0].text for part in parts) == body.choices[0].text


def test_the_openai_client_gets_chats(api, llama):
    chat = [{"role": "user", "content": "Tell me a story"}]
    asked = {"model": "small", "messages": chat, "max_tokens": 8, "seed": 1}
    body = api.chat.completions.create(logprobs=True, top_logprobs=2, **asked)
    text = llama.chat(chat, chat_template="chatml", n_predict=8, seed=1, temp=1.0, top_p=1.0)
    assert body.choices[0].message.content == text and body.usage.completion_tokens == 8
    assert [one.token for one in body.choices[0].logprobs.content] == [token.piece for token in text.tokens]
    parts = [*api.chat.completions.create(stream=True, stream_options={"include_usage": True}, **asked)]
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == text
    assert parts[-1].usage.total_tokens == body.usage.total_tokens


def test_the_openai_client_gets_models_and_errors(api):
    assert [model.id for model in api.models.list()] == ["small"]
    assert api.models.retrieve("small").id == "small"
    with pytest.raises(openai.NotFoundError):
        api.models.retrieve("gpt-4o")
    with pytest.raises(openai.BadRequestError, match="temperature must be"):
        api.completions.create(model="small", prompt="Tom", temperature=-1)
    with pytest.raises(openai.BadRequestError, match="the context is full") as caught:
        api.completions.create(model="small", prompt="Tom " * 3000)
    assert caught.value.code == "context_length_exceeded"


def test_the_openai_client_needs_the_key(start):
    process = start("--api-key", "sesame")
    wrong = openai.OpenAI(base_url=f"{process.url}/v1", api_key="wrong", max_retries=0)
    with wrong, pytest.raises(openai.AuthenticationError):
        wrong.models.list()
    with openai.OpenAI(base_url=f"{process.url}/v1", api_key="sesame") as right:
        assert right.models.list().data[0].id == "small"
    assert "sesame" not in process.log.read_text()


def curl(process, path: str, *arguments: str) -> str:
    command = ["curl", "--silent", "--no-buffer", "--max-time", "60", *arguments, process.url + path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_curl_gets_what_it_asks_for(process, llama):
    body = json.dumps({"prompt": "Tom", "max_tokens": 8, "seed": 1})
    text = llama.generate("Tom", n_predict=8, seed=1, temp=1.0, top_p=1.0)
    assert json.loads(curl(process, COMPLETIONS, "--data", body))["choices"][0]["text"] == text
    status = ("--output", "/dev/null", "--write-out", "%{http_code}")
    assert curl(process, "/nowhere", *status) == "404"
    assert curl(process, COMPLETIONS, *status, "--data", "{") == "400"
    assert curl(process, COMPLETIONS, *status, "--data", body, "--http1.0") == "200"


def test_eight_clients_at_once_get_what_each_would_get_alone(api, llama):
    def ask(seed: int) -> str:
        if seed % 2:
            body = api.completions.create(model="small", prompt="Once upon a time", max_tokens=40, seed=seed)
            return body.choices[0].text
        parts = api.completions.create(
            model="small", prompt="Once upon a time", max_tokens=40, seed=seed, stream=True
        )
        return "".join(part.choices[0].text for part in parts)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        texts = [*pool.map(ask, range(24))]
    for seed, text in enumerate(texts):
        assert text == llama.generate("Once upon a time", n_predict=40, seed=seed, temp=1.0, top_p=1.0)


# --- who goes away, and who is slow ---------------------------------------------------------------


def sent(port: int, data: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(data)
    return connection


def request(body: dict, path: str = COMPLETIONS) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_makes_room(served, llama, stream):
    port, engine = served
    gone = sent(port, request(LONG | {"stream": stream}))
    wait_for(lambda: engine.n_running == 1)
    (text,) = engine._owners
    if stream:
        assert gone.recv(10)
    gone.close()
    wait_for(lambda: engine.n_texts == 0)
    assert text.stop_reason == "cancelled" and len(text.tokens) < 2000


def test_a_client_that_goes_away_while_it_waits_is_forgotten(served, llama):
    port, engine = served
    first = sent(port, request(LONG))
    wait_for(lambda: engine.n_running == 1)
    waiting = [
        sent(port, request(LONG | {"n": 40})),
        sent(port, request({"prompt": "a", "taps": ["*"]}, "/v1/taps")),
    ]
    wait_for(lambda: engine.n_texts >= 41)
    for connection in (*waiting, first):
        connection.close()
    wait_for(lambda: engine.n_texts == 0)


def wait_for(happened) -> None:
    for _ in range(2000):
        if happened():
            return
        time.sleep(0.01)
    raise AssertionError("it didn't happen")


@pytest.fixture
def served(app, engine, monkeypatch):
    """(port, engine) of a server in a thread, with little patience."""
    monkeypatch.setattr(server, "SECONDS", 0.3)
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.3)
    listener = server._listener("127.0.0.1", 0)
    made = Server(config_of(app.guarded()), engine, 1)
    thread = threading.Thread(target=uvicorn.Server.run, args=(made, [listener]))
    thread.start()
    yield listener.getsockname()[1], engine
    made.should_exit = True
    thread.join()


def received(connection: socket.socket) -> bytes:
    """All that comes until the server hangs up."""
    connection.settimeout(20)
    data = b""
    with suppress(ConnectionResetError):
        while more := connection.recv(1 << 20):
            data += more
    return data


@pytest.mark.parametrize(
    "data", [b"", b"G", b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Le"]
)
def test_who_does_not_send_a_request_is_hung_up_on(served, data):
    assert received(sent(served[0], data)) == b""


def test_nor_a_second_one(served):
    connection = sent(served[0], b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert connection.recv(10) == b"HTTP/1.1 2"
    connection.sendall(b"GET /hea")
    assert received(connection).endswith(b'{"status": "ok"}')


def test_half_a_body_is_answered_when_it_is_late(served):
    connection = sent(served[0], request({"prompt": "Tom"})[:-3])
    answer = received(connection)
    assert answer.startswith(b"HTTP/1.1 408") and b"the body hasn't arrived" in answer


def test_who_takes_nothing_is_hung_up_on(served, app):
    port, engine = served
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", port))
    connection.sendall(request({"prompt": "a " * 200, "taps": ["layers.*.attention.*"]}, "/v1/taps"))
    wait_for(lambda: engine.n_texts == 1)
    wait_for(lambda: engine.n_texts == 0)
    wait_for(lambda: app._tapped == 0)
    assert len(received(connection)) < 10_000_000


# --- the end --------------------------------------------------------------------------------------


def begun(process, **more):
    """The answer to a long request, whose text has begun."""
    answer = sent(process.port, request(LONG | {"stream": True} | more)).makefile("rb")
    while b"data" not in answer.readline():
        pass
    return answer


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_texts_that_have_begun_end_before_the_server_does(start, number):
    process = start("--grace", "60")
    answer = begun(process, max_tokens=300)
    process.popen.send_signal(number)
    wait_for(lambda: "ending" in process.log.read_text())
    assert "503" in curl(process, "/health", "--write-out", "%{http_code}")
    assert "the server is ending" in curl(process, COMPLETIONS, "--data", json.dumps({"prompt": "Tom"}))
    assert b'"finish_reason": "length"' in answer.read()
    assert process.popen.wait() == 128 + number


def test_what_has_not_ended_then_is_told_so(start):
    process = start("--grace", "0", "--texts", "1")
    running, waiting = begun(process), sent(process.port, request(LONG)).makefile("rb")
    wait_for(lambda: "tinyllama_waiting 1.0" in curl(process, "/metrics"))
    assert process.end() == 128 + signal.SIGTERM
    assert b"the server has ended" in running.read()
    assert waiting.read().startswith(b"HTTP/1.1 503")


@pytest.mark.parametrize("port, wrong", [(None, "Address already in use"), (99999, "port must be")])
def test_an_address_that_cannot_be_had_is_one_line(process, start, port, wrong):
    with pytest.raises(AssertionError, match=wrong):
        start("--port", port or process.port)
