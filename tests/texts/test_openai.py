"""Requests in OpenAI's form: what becomes a setting, what is refused, and what answers look like."""

import json
import math

import pytest

import tinyllama
from tinyllama.errors import TinyllamaError
from tinyllama.settings import Settings
from tinyllama.texts.jobs import Jobs
from tinyllama.texts.openai import CHAT, COMPLETIONS, Refused, answer, parse


@pytest.fixture(scope="module")
def llama():
    return tinyllama.load("small", "numpy", 1)


def as_ids(messages: list[dict]) -> list[int]:
    """Stands for a template."""
    if messages[-1]["content"] == "refuse":
        raise TinyllamaError("no")
    return [len(message["content"]) for message in messages]


def asked(url: str = COMPLETIONS, **body):
    return parse(url, ({"prompt": "Tom"} if url == COMPLETIONS else {"messages": HI}) | body, as_ids)


HI = [{"role": "user", "content": "Hi"}]


def answered(llama, request) -> dict:
    jobs, ended = Jobs(llama), []
    jobs.add("one", request.prompts, request.settings)
    while jobs:
        ended += jobs.turn()
    ((_, texts),) = ended
    return answer(request, texts, "mine")


# --- requests -------------------------------------------------------------------------------------


def test_defaults_are_openais_where_it_has_them():
    assert asked().settings == Settings(n_predict=16, temp=1.0, top_p=1.0)
    assert asked(CHAT).settings == Settings(n_predict=-1, temp=1.0, top_p=1.0)
    assert parse(COMPLETIONS, {"prompt": "Tom"}, as_ids, ctx_size=9, batch_size=4).settings.ctx_size == 9


@pytest.mark.parametrize(
    "key, value, setting, expected",
    [
        ("max_tokens", 3, "n_predict", 3),
        ("max_completion_tokens", 3, "n_predict", 3),
        ("temperature", 0, "temp", 0.0),
        ("temperature", None, "temp", 1.0),
        ("top_p", 0.5, "top_p", 0.5),
        ("top_k", 7, "top_k", 7),
        ("repeat_penalty", 1.5, "repeat_penalty", 1.5),
        ("seed", 4, "seed", 4),
        ("stop", "a", "stop", ("a",)),
        ("stop", ["a", "b"], "stop", ("a", "b")),
        ("stop", None, "stop", ()),
    ],
)
def test_keys_become_settings(key, value, setting, expected):
    assert getattr(asked(**{key: value}).settings, setting) == expected
    assert (
        getattr(
            asked(CHAT, **{key: 1.0 if value is None and key == "temperature" else value}).settings, setting
        )
        == expected
    )


@pytest.mark.parametrize(
    "key, value",
    [
        ("user", "me"),
        ("metadata", {"a": "b"}),
        ("stream", False),
        ("n", 1),
        ("best_of", 1),
        ("echo", False),
        ("presence_penalty", 0),
        ("frequency_penalty", 0.0),
        ("logit_bias", {}),
        ("tools", []),
        ("tools", None),
        ("tool_choice", "none"),
        ("response_format", {"type": "text"}),
        ("model", "gpt-4o"),
        ("logprobs", None),
        ("suffix", None),
    ],
)
def test_what_changes_no_text_is_accepted(key, value):
    for url in (COMPLETIONS, CHAT):
        assert asked(url, **{key: value}).settings == asked(url).settings


@pytest.mark.parametrize(
    "key, value",
    [
        ("n", 2),
        ("best_of", 3),
        ("echo", True),
        ("stream", True),
        ("presence_penalty", 0.5),
        ("frequency_penalty", -1),
        ("logit_bias", {"50256": -100}),
        ("tools", [{"type": "function"}]),
        ("response_format", {"type": "json_object"}),
        ("temperature", -1),
        ("temperature", "warm"),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 1e400),
        ("top_k", 1.5),
        ("max_tokens", "3"),
        ("max_tokens", -2),
        ("seed", -5),
        ("stop", ""),
        ("stop", 3),
        ("stop", ["a", None]),
        ("model", 3),
        ("logprobs", 21),
        ("logprobs", "2"),
        ("nonsense", 1),
    ],
)
def test_what_would_change_a_text_and_cannot_be_done_is_refused_by_its_name(key, value):
    for url in (COMPLETIONS, CHAT):
        with pytest.raises(Refused, match=key) as caught:
            asked(url, **{key: value})
        error = caught.value.body()["error"]
        assert error["param"] == key and error["type"] == "invalid_request_error" and error["code"]
        assert error["message"] == str(caught.value)


@pytest.mark.parametrize(
    "prompt, expected",
    [
        ("Tom", ["Tom"]),
        ([1, 2], [[1, 2]]),
        (["Tom", "Tim"], ["Tom", "Tim"]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        (["Tom", [1]], ["Tom", [1]]),
    ],
)
def test_a_prompt_is_text_or_ids_or_several_of_these(prompt, expected):
    assert asked(prompt=prompt).prompts == expected


@pytest.mark.parametrize("prompt", ["", [], None, 3, [""], [[]], [1, "a"], [1.5], [True], [[1], 2], {}])
def test_other_prompts_are_refused(prompt):
    with pytest.raises(Refused, match="prompt"):
        asked(prompt=prompt)


def test_messages_may_have_parts_and_names():
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    chat = [{"role": "developer", "content": "a"}, {"role": "user", "content": parts, "name": "Tom"}]
    seen = []
    parse(CHAT, {"messages": chat}, lambda messages: seen.extend(messages) or [1])
    assert seen == [{"role": "system", "content": "a"}, {"role": "user", "content": "Hello"}]


@pytest.mark.parametrize(
    "messages, wrong",
    [
        (None, "messages is missing"),
        ([], "messages must be"),
        ("Hi", "messages must be"),
        (["Hi"], "must be an object"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "isn't text"),
        ([{"role": "assistant", "content": "", "tool_calls": [{}]}], "tool_calls isn't supported"),
        ([{"role": "user", "content": "refuse"}], "^no$"),
    ],
)
def test_other_messages_are_refused(messages, wrong):
    with pytest.raises(Refused, match=wrong) as caught:
        asked(CHAT, messages=messages)
    assert caught.value.param.startswith("messages")


def test_each_url_has_its_own_keys():
    for url, body in [(COMPLETIONS, {"messages": HI}), (CHAT, {"prompt": "Tom"}), ("/v1/embeddings", {})]:
        with pytest.raises(Refused):
            asked(url, **body)
    for body in (None, [], "Tom"):
        with pytest.raises(Refused, match="body must be an object"):
            parse(COMPLETIONS, body, as_ids)


# --- answers --------------------------------------------------------------------------------------


def test_a_completion_has_the_text_that_generate_writes(llama):
    body = answered(llama, asked(prompt=["Once upon a time", "Tom"], max_tokens=7, seed=3, top_k=40))
    assert body["object"] == "text_completion" and body["id"].startswith("cmpl-") and body["model"] == "mine"
    for index, prompt in enumerate(["Once upon a time", "Tom"]):
        text = llama.generate(prompt, n_predict=7, seed=3, temp=1.0, top_p=1.0)
        choice = {"index": index, "text": text, "finish_reason": "length", "logprobs": None, "seed": 3}
        assert body["choices"][index] == choice
    n_prompt = len(llama.tokens("Once upon a time")) + len(llama.tokens("Tom"))
    assert body["usage"] == {
        "prompt_tokens": n_prompt,
        "completion_tokens": 14,
        "total_tokens": n_prompt + 14,
    }


def test_a_chat_has_a_message(llama):
    body = answered(llama, asked(CHAT, max_tokens=4))
    assert body["object"] == "chat.completion" and body["id"].startswith("chatcmpl-")
    (choice,) = body["choices"]
    assert choice["message"]["role"] == "assistant" and choice["message"]["content"]


def test_a_text_ends_for_openais_reasons(llama):
    whole = llama.generate("Once upon a time", n_predict=12, temp=0)
    stopped = answered(llama, asked(prompt="Once upon a time", temperature=0, max_tokens=12, stop=whole[-5:]))
    assert stopped["choices"][0]["finish_reason"] == "stop" and stopped["choices"][0]["text"] == whole[:-5]
    full = parse(COMPLETIONS, {"prompt": "Tom", "max_tokens": 99}, as_ids, ctx_size=8)
    assert answered(llama, full)["choices"][0]["finish_reason"] == "length"


def test_logprobs_of_a_completion_are_in_the_legacy_shape(llama):
    text = llama.generate("Tom", n_predict=6, seed=1, temp=1.0, top_p=1.0, stages=True)
    for n in (0, 3):
        told = answered(llama, asked(max_tokens=6, seed=1, logprobs=n))["choices"][0]["logprobs"]
        assert told["tokens"] == [token.piece for token in text.tokens]
        assert told["token_logprobs"] == [math.log(prob) for prob in text.probs]
        assert [
            text[at:].startswith(piece) for at, piece in zip(told["text_offset"], told["tokens"], strict=True)
        ]
        assert (told["top_logprobs"] is None) == (n == 0)
    for token, top in zip(text.tokens, told["top_logprobs"], strict=True):
        assert [*top] == [llama.tokenizer.piece(int(one)) for one in token.stages[0].kept[:3]]
        assert top.get(token.piece, -math.inf) in (math.log(token.prob), -math.inf) or top[
            token.piece
        ] == pytest.approx(math.log(token.prob), rel=1e-5)


def test_logprobs_end_where_a_stop_string_begins(llama):
    whole = llama.generate("Once upon a time", n_predict=12, temp=0)
    request = asked(prompt="Once upon a time", temperature=0, max_tokens=12, stop=whole[-5:], logprobs=1)
    (choice,) = answered(llama, request)["choices"]
    assert all(at < len(choice["text"]) for at in choice["logprobs"]["text_offset"])


def test_logprobs_of_a_chat_are_in_the_shape_of_chats(llama):
    (choice,) = answered(llama, asked(CHAT, max_tokens=3, logprobs=True, top_logprobs=2))["choices"]
    content = choice["logprobs"]["content"]
    assert len(content) == 3
    text = b"".join(bytes(token["bytes"]) for token in content).decode()
    assert text == choice["message"]["content"]
    assert all(len(token["top_logprobs"]) == 2 and token["logprob"] <= 0 for token in content)
    with pytest.raises(Refused, match="top_logprobs needs logprobs"):
        asked(CHAT, top_logprobs=2)


def test_an_answer_is_json(llama):
    line = json.dumps(answered(llama, asked(max_tokens=2, logprobs=2)), allow_nan=False)
    assert "\n" not in line and line.isascii()
