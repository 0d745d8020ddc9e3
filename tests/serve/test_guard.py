"""Who may ask, and how much."""

import pytest
from starlette.testclient import TestClient

from tinyllama.serve import guard
from tinyllama.serve.guard import LOOPBACK
from tinyllama.texts.openai import COMPLETIONS


@pytest.fixture
def keyed(app):
    with TestClient(app.guarded("sésame")) as made:
        yield made


@pytest.fixture
def local(app):
    with TestClient(app.guarded(hosts=LOOPBACK), base_url="http://localhost:8080") as made:
        yield made


@pytest.mark.parametrize(
    "given", [None, "Bearer ", "Bearer sesame", "sésame", "Basic sésame", "Bearer sésame "]
)
def test_without_the_key_nothing_is_answered(keyed, given):
    headers = {} if given is None else {"Authorization": given.encode()}
    for path in ("/v1/models", "/metrics", "/nowhere"):
        response = keyed.get(path, headers=headers)
        assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
    assert keyed.post(COMPLETIONS, headers=headers, json={"prompt": "a"}).status_code == 401


def test_with_the_key_all_is(keyed):
    headers = {"Authorization": "Bearer sésame".encode()}
    assert keyed.get("/v1/models", headers=headers).status_code == 200
    assert keyed.get("/health").status_code == 200


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8080", "127.0.0.1:1", "[::1]:8080", "[::1]"])
def test_on_the_loopback_its_names_are_taken(local, host):
    assert local.get("/health", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8080", "localhost.evil.example", "", "::1"])
def test_and_no_others(local, host):
    response = local.get("/health", headers={"Host": host})
    assert response.status_code == 403 and "Host" in response.json()["error"]["message"]


def test_pages_of_others_may_not_ask(local):
    for origin, status in (("http://localhost:8080", 200), ("http://evil.example", 403), ("null", 403)):
        response = local.get("/health", headers={"Origin": origin})
        assert response.status_code == status
        assert not [name for name in response.headers if name.startswith("access-control")]
    assert local.options(COMPLETIONS, headers={"Origin": "http://evil.example"}).status_code == 403


def test_a_body_that_is_too_large_is_refused(client, monkeypatch):
    monkeypatch.setattr(guard, "LARGEST_BODY", 100)
    assert client.post(COMPLETIONS, content=b" " * 101).status_code == 413
    response = client.post(COMPLETIONS, content=iter([b" " * 60, b" " * 60]))  # without a length
    assert response.status_code == 413 and response.headers["connection"] == "close"
    assert client.post(COMPLETIONS, content=b'{"prompt": "Tom", "max_tokens": 1}').status_code == 200


def test_so_are_many_that_are_large_together(client, app, monkeypatch):
    monkeypatch.setattr(guard, "BODIES", 10)
    assert client.post(COMPLETIONS, json={"prompt": "Tom"}).status_code == 429
    monkeypatch.setattr(guard, "BODIES", 1000)
    for body in (b'{"prompt": "Tom", "max_tokens": 1}', b"{}", b"{"):
        client.post(COMPLETIONS, content=body)
    assert client.post(COMPLETIONS, json={"prompt": "Tom", "max_tokens": 1}).status_code == 200
    assert app._bodies._held == 0
