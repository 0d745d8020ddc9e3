"""Requests in OpenAI's form: what becomes a setting, and what is refused."""

import pytest

from tinyllama.errors import TinyllamaError
from tinyllama.settings import Settings
from tinyllama.texts.openai import CHAT, COMPLETIONS, Refused, parse, read_object


def as_ids(messages: list[dict]) -> list[int]:
    """Stands for a template."""
    if messages[-1]["content"] == "refuse":
        raise TinyllamaError("no")
    return [len(message["content"]) for message in messages]


def asked(url: str = COMPLETIONS, **body):
    return parse(url, ({"prompt": "Tom"} if url == COMPLETIONS else {"messages": HI}) | body, as_ids)


HI = [{"role": "user", "content": "Hi"}]


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
        ("n", 0),
        ("n", 129),
        ("n", True),
        ("best_of", 0),
        ("echo", 1),
        ("stream", "yes"),
        ("stream_options", True),
        ("stream_options", {"include_usage": 1}),
        ("presence_penalty", 0.5),
        ("frequency_penalty", -1),
        ("logit_bias", {"the": 1}),
        ("logit_bias", {"3": 101}),
        ("logit_bias", {"3": None}),
        ("logit_bias", {"9" * 5000: 1}),
        ("logit_bias", [3]),
        ("response_format", {"type": "json_schema", "json_schema": {}}),
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
        ("stop", ["a"] * 17),
        ("stop", "a" * 257),
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


def test_several_choices_are_texts_of_seeds_that_follow_each_other():
    request = asked(prompt=["Tom", "Tim"], n=2, best_of=3, seed=5)
    assert [(prompt, settings.seed) for prompt, settings in request.texts()] == [
        (prompt, seed) for prompt in ("Tom", "Tim") for seed in (5, 6, 7)
    ]
    assert {settings.seed for _, settings in asked(n=2).texts()} == {-1}
    with pytest.raises(Refused, match="best_of must be at least n"):
        asked(n=3, best_of=2)


def test_chats_have_no_echo_and_no_best_of():
    for key, value in (("echo", True), ("best_of", 2)):
        with pytest.raises(Refused, match=f"{key} can only be"):
            asked(CHAT, **{key: value})


def test_what_needs_the_whole_text_is_not_streamed():
    assert asked(stream=True, echo=True).stream and asked(stream=True, n=2).n == 2
    assert asked(stream=True, stream_options={"include_usage": True}).usage
    for more in ({"best_of": 2}, {"echo": True, "logprobs": 0}):
        with pytest.raises(Refused, match="can't be streamed"):
            asked(stream=True, **more)


def test_a_bias_is_told_by_ids():
    assert asked(logit_bias={"3": -100, "007": 0.5}).bias == {3: -100.0, 7: 0.5}


@pytest.mark.parametrize(
    "data, wrong",
    [
        (b"{", "isn't JSON"),
        (b'{"a": NaN}', "NaN is no number of JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"\xff", "isn't JSON"),
        (b"[]", "isn't an object"),
        (b'{"a": ' + b"9" * 5000 + b"}", "isn't JSON"),
    ],
)
def test_what_is_no_object_of_json_is_refused(data, wrong):
    with pytest.raises(Refused, match=wrong):
        read_object(data)
