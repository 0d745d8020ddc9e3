"""What is answered under which path, in this process."""

import json
import math

import pytest

from tinyllama.serve import app as app_module
from tinyllama.serve.app import App
from tinyllama.texts.openai import CHAT, COMPLETIONS

HI = [{"role": "user", "content": "Hi"}]
STORY = {"prompt": "Once upon a time", "max_tokens": 9, "seed": 3}


def story(llama, **settings) -> str:
    return llama.generate(
        "Once upon a time", **{"n_predict": 9, "seed": 3, "temp": 1.0, "top_p": 1.0} | settings
    )


def events(response) -> list[dict]:
    assert response.headers["content-type"].startswith("text/event-stream")
    *lines, last, empty = response.text.split("\n\n")
    assert last == "data: [DONE]" and empty == "" and all(line.startswith("data: ") for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def error(response, status: int) -> dict:
    assert response.status_code == status, response.text
    (key,) = response.json()
    found = response.json()["error"]
    assert key == "error" and found.keys() == {"message", "type", "param", "code"}
    assert found["message"].isprintable() and len(found["message"]) < 1100
    return found


def test_a_completion_is_what_generate_writes(client, llama):
    body = client.post(COMPLETIONS, json=STORY).json()
    assert body["choices"][0]["text"] == story(llama) and body["model"] == "small"
    assert body["usage"] == {"prompt_tokens": 5, "completion_tokens": 9, "total_tokens": 14}


def test_a_stream_makes_up_what_generate_writes(client, llama):
    found = events(client.post(COMPLETIONS, json=STORY | {"stream": True}))
    assert "".join(event["choices"][0]["text"] for event in found) == story(llama)
    assert len(found) > 5 and found[-1]["choices"][0]["finish_reason"] == "length"


def test_a_chat_is_answered_by_the_template(client, llama):
    asked = {"messages": HI, "max_tokens": 6, "seed": 1}
    text = llama.chat(HI, chat_template="chatml", n_predict=6, seed=1, temp=1.0, top_p=1.0)
    assert client.post(CHAT, json=asked).json()["choices"][0]["message"]["content"] == text
    found = events(
        client.post(CHAT, json=asked | {"stream": True, "stream_options": {"include_usage": True}})
    )
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in found if e["choices"]) == text
    assert found[-1]["usage"]["completion_tokens"] == 6


def test_a_model_without_a_template_answers_no_chat(engine, client):
    from starlette.testclient import TestClient

    with TestClient(App(engine, "small").guarded()) as plain:
        assert "no chat template" in error(plain.post(CHAT, json={"messages": HI}), 400)["message"]


def test_echo_tells_how_likely_a_prompt_is(client, llama):
    body = client.post(COMPLETIONS, json=STORY | {"echo": True, "logprobs": 1, "n": 2}).json()
    for seed, choice in enumerate(body["choices"], 3):
        ids = [*llama.tokens("Once upon a time"), *llama.generate(**STORY_OF(seed)).ids]
        probs = [math.log(token.prob) for token in llama.score(ids)[1:]]
        assert choice["logprobs"]["token_logprobs"] == [None, *probs]
        assert choice["text"] == "Once upon a time" + story(llama, seed=seed)


def STORY_OF(seed: int) -> dict:
    return {"prompt": "Once upon a time", "n_predict": 9, "seed": seed, "temp": 1.0, "top_p": 1.0}


def test_score_is_that_of_the_library(client, llama):
    body = client.post("/v1/score", json={"prompt": "Tom and his dog", "top": 2}).json()
    scored = llama.score("Tom and his dog")
    assert [token["id"] for token in body["tokens"]] == llama.tokens("Tom and his dog")
    assert [token["logprob"] for token in body["tokens"][1:]] == [math.log(t.prob) for t in scored[1:]]
    assert body["tokens"][0]["logprob"] is None and body["tokens"][0]["top_logprobs"] == []
    assert all(len(token["top_logprobs"]) == 2 for token in body["tokens"][1:])
    assert body["logprob"] == pytest.approx(sum(math.log(token.prob) for token in scored[1:]))
    of_ids = client.post("/v1/score", json={"prompt": llama.tokens("Tom and his dog")}).json()
    assert [token["logprob"] for token in of_ids["tokens"]] == [token["logprob"] for token in body["tokens"]]
    assert "top_logprobs" not in of_ids["tokens"][1]
    assert client.post("/v1/score", json={"messages": HI}).json()["tokens"]


@pytest.mark.parametrize(
    "path, body, wrong",
    [
        (COMPLETIONS, {}, "prompt is missing"),
        (COMPLETIONS, {"prompt": "a " * 3000}, "the context is full"),
        (COMPLETIONS, {"prompt": "a" * 1_000_000}, "the context is full"),
        (COMPLETIONS, {"prompt": [1536]}, "token id"),
        (COMPLETIONS, {"prompt": ["a"] * 200}, "200 texts are asked for"),
        (
            COMPLETIONS,
            {"prompt": "a", "response_format": {"type": "json_object"}},
            "response_format can only",
        ),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"1536": 1}}, "token id 1536"),
        (COMPLETIONS, {"prompt": "\ud800"}, "half a character"),
        (COMPLETIONS, {"prompt": "a", "n": 100, "max_tokens": 2000, "logprobs": 1}, "400,000 tokens"),
        (CHAT, {"messages": HI, "n": 6, "logprobs": True, "top_logprobs": 20}, "tokens are asked for"),
        (COMPLETIONS, {"prompt": "a", "temperature": "warm"}, "temperature must be"),
        (CHAT, {"messages": [{"role": "user", "content": "a" * 1_000_000}]}, "the context is full"),
        (CHAT, {"messages": [{"role": "god", "content": "a"}]}, "role must be"),
        ("/v1/score", {"prompt": ["a", "b"]}, "must be one"),
        ("/v1/score", {"prompt": "a", "messages": HI}, "exclude each other"),
        ("/v1/score", {"prompt": "a", "top": 21}, "top must be"),
        ("/v1/score", {"prompt": "a", "n": 21}, "'n' isn't supported"),
        ("/v1/taps", {"prompt": "a"}, "taps must be"),
        ("/v1/taps", {"prompt": "a", "taps": ["nothing"]}, "nothing in this model is named 'nothing'"),
        ("/v1/taps", {"prompt": "a", "taps": ["*"] * 65}, "64 patterns"),
        ("/v1/taps", {"prompt": "a", "taps": ["*" * 201]}, "200 characters"),
        ("/v1/taps", {"prompt": "a " * 1500, "taps": ["*"]}, "bytes, and at most"),
        ("/tokenize", {}, "content must be"),
        ("/tokenize", {"content": "a", "add_special": 1}, "add_special must be"),
        ("/detokenize", {"tokens": [1536]}, "there is no token 1536"),
        ("/detokenize", {"tokens": "a"}, "tokens must be"),
        ("/apply-template", {}, "messages is missing"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_line(client, path, body, wrong):
    assert wrong in error(client.post(path, content=json.dumps(body)), 400)["message"]


def test_a_prompt_that_is_too_long_has_openais_code(client):
    found = error(client.post(COMPLETIONS, json={"prompt": "a " * 3000}), 400)
    assert found["param"] == "prompt" and found["code"] == "context_length_exceeded"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff\xfe", b"NaN", b"[" * 100_000])
def test_what_is_no_json_is_refused(client, body):
    error(client.post(COMPLETIONS, content=body), 400)


def test_other_paths_and_methods_are_refused(client):
    error(client.get("/v2/models"), 404)
    error(client.get(COMPLETIONS), 405)
    error(client.post("/health"), 405)
    error(client.get("/v1/models/other"), 404)
    error(client.get("/static/app.py"), 404)
    error(client.get("/static/..%2fapp.py"), 404)


def test_a_prompt_is_echoed_to_the_letter(client):
    body = client.post(
        COMPLETIONS, content=r'{"prompt": "a\udc80\u0000", "echo": true, "max_tokens": 0}'
    ).json()
    assert body["choices"][0]["text"] == "a\udc80\0"


def test_text_becomes_tokens_and_tokens_text(client, llama):
    text = "Tom and his dog <s>"
    plain = client.post("/tokenize", json={"content": text}).json()["tokens"]
    assert plain == llama.tokenizer.encode(text, bos=False, special=True)
    own = client.post("/tokenize", json={"content": text, "add_special": True}).json()["tokens"]
    assert own == llama.tokens(text)
    pieces = client.post("/tokenize", json={"content": text, "with_pieces": True}).json()["tokens"]
    assert pieces == [{"id": token, "piece": llama.tokenizer.piece(token)} for token in plain]
    assert client.post("/detokenize", json={"tokens": plain}).json()["content"] == text
    literal = client.post("/tokenize", json={"content": text, "parse_special": False}).json()["tokens"]
    assert literal == llama.tokenizer.encode(text, bos=False) != plain


def test_tokens_are_also_told_in_the_way_that_lm_eval_asks(client, llama):
    info = client.get("/tokenizer_info").json()
    assert (
        info["eos_token"] == llama.tokenizer.piece(llama.tokenizer.eos_id)
        and "im_start" in info["chat_template"]
    )
    tokens = client.post("/tokenize", json={"prompt": "Tom", "add_special_tokens": False}).json()["tokens"]
    assert tokens == llama.tokenizer.encode("Tom", bos=False)
    assert client.post("/detokenize", json={"tokens": tokens}).json()["prompt"] == "Tom"


def test_a_template_is_applied_as_a_chat_applies_it(client, llama):
    body = client.post("/apply-template", json={"messages": HI}).json()
    assert body["prompt"] == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert body["tokens"] == llama.template("chatml").encode(HI)


def test_the_model_is_listed(client):
    (model,) = client.get("/v1/models").json()["data"]
    assert model["id"] == "small" and model["object"] == "model" and model["meta"]["n_params"] == 4_000_000
    assert client.get("/v1/models/small").json() == model


def test_metrics_count_what_was_done(client):
    client.post(COMPLETIONS, json=STORY)
    client.post(COMPLETIONS, json=STORY | {"stream": True})
    client.get("/somewhere")
    page = client.get("/metrics").text
    assert 'tinyllama_requests_total{path="/v1/completions",status="200"} 2.0' in page
    assert 'tinyllama_requests_total{path="other",status="404"} 1.0' in page
    assert 'tinyllama_tokens_total{kind="written"} 18.0' in page
    assert 'tinyllama_tokens_total{kind="prompt"} 10.0' in page
    assert "tinyllama_running 0.0" in page and "tinyllama_waiting 0.0" in page
    assert 'tinyllama_request_seconds_count{path="/v1/completions"} 2.0' in page


def test_while_the_server_ends_nothing_new_is_begun(client, engine):
    assert client.get("/health").json() == {"status": "ok"}
    engine.ending = True
    error(client.get("/health"), 503)
    assert error(client.post(COMPLETIONS, json=STORY), 503)["type"] == "server_error"


def test_too_many_are_told_when_to_come_back(client, engine, monkeypatch):
    monkeypatch.setattr(engine, "n_texts", engine.most)
    response = client.post(COMPLETIONS, json=STORY)
    assert error(response, 429)["type"] == "rate_limit_error" and response.headers["retry-after"] == "1"


def test_a_mistake_of_ours_is_one_line_and_no_more(app, monkeypatch):
    from starlette.testclient import TestClient

    def broken(*_):
        raise RuntimeError("a secret")

    monkeypatch.setattr(app_module, "answer", broken)
    with TestClient(app.guarded(), raise_server_exceptions=False) as client:
        found = error(client.post(COMPLETIONS, json=STORY), 500)
        assert "secret" not in found["message"] and found["type"] == "server_error"
        assert client.get("/health").status_code == 200


def test_logs_hold_prompts_if_asked_alone(engine, client, capsys):
    from starlette.testclient import TestClient

    client.post(COMPLETIONS, json=STORY)
    client.post(COMPLETIONS, json={"prompt": "Once", "temperature": "Once"})
    logged = capsys.readouterr().err
    assert "POST /v1/completions 200" in logged and "Once" not in logged
    with TestClient(App(engine, "small", log_prompts=True).guarded()) as telling:
        telling.post(COMPLETIONS, json=STORY)
    assert "Once upon a time" in capsys.readouterr().err
