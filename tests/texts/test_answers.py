"""Answers in OpenAI's form: whole, and piece by piece."""

import json
import math

import pytest

import tinyllama
from tinyllama.texts.answers import Chunks, answer, chosen, scored_ids
from tinyllama.texts.jobs import Jobs
from tinyllama.texts.openai import CHAT, COMPLETIONS, Refused, parse
from tinyllama.texts.schedule import Together


@pytest.fixture(scope="module")
def llama():
    return tinyllama.load("small", "numpy", 1)


def as_ids(messages: list[dict]) -> list[int]:
    """Stands for a template."""
    return [len(message["content"]) for message in messages]


def asked(url: str = COMPLETIONS, **body):
    return parse(url, ({"prompt": "Tom"} if url == COMPLETIONS else {"messages": HI}) | body, as_ids)


HI = [{"role": "user", "content": "Hi"}]


def written(llama, request) -> list:
    jobs, ended = Jobs(llama), []
    jobs.add("one", request.texts(), request.bias)
    while jobs:
        ended += jobs.turn()
    ((_, texts),) = ended
    return texts


def answered(llama, request) -> dict:
    texts = written(llama, request)
    scored = [llama.score(scored_ids(text)) for text in chosen(request, texts)] if request.scores else []
    return answer(request, texts, "mine", scored)


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


def test_each_of_several_choices_is_a_text_of_its_own_seed(llama):
    body = answered(llama, asked(prompt=["Tom", "The"], n=2, seed=4, max_tokens=5))
    texts = [
        llama.generate(prompt, n_predict=5, seed=seed, temp=1.0, top_p=1.0)
        for prompt in ("Tom", "The")
        for seed in (4, 5)
    ]
    assert [choice["text"] for choice in body["choices"]] == texts
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert body["usage"]["prompt_tokens"] == len(llama.tokens("Tom")) + len(llama.tokens("The"))


def test_of_the_best_the_likeliest_are_given_first(llama):
    texts = written(llama, asked(seed=1, best_of=4, max_tokens=5))
    means = {str(t.completion()): sum(map(math.log, t.completion().probs)) / len(t.tokens) for t in texts}
    found = answer(asked(seed=1, best_of=4, n=2, max_tokens=5), texts, "mine")
    assert [choice["text"] for choice in found["choices"]] == sorted(means, key=means.get)[:1:-1]
    assert found["usage"]["completion_tokens"] == 20


@pytest.mark.parametrize("prompt", ["Once upon a time", [1, 80, 90]])
@pytest.mark.parametrize("n", [0, 3])
def test_an_echo_has_the_prompt_and_how_likely_it_was(llama, prompt, n):
    (choice,) = answered(llama, asked(prompt=prompt, echo=True, logprobs=n, max_tokens=2, seed=1))["choices"]
    text = llama.generate(prompt, n_predict=2, seed=1, temp=1.0, top_p=1.0)
    begin = prompt if isinstance(prompt, str) else llama.tokenizer.decode(prompt)
    assert choice["text"] == begin + text
    told, ids = choice["logprobs"], [*llama.tokens(prompt), *text.ids]
    assert told["token_ids"] == ids and told["token_logprobs"][0] is None
    scored = [math.log(token.prob) for token in llama.score(ids)[1:]]
    assert told["token_logprobs"][1:] == scored
    for token, at in zip(told["token_ids"], told["text_offset"], strict=True):
        piece = llama.tokenizer.token_bytes(token).decode()
        assert choice["text"].startswith(piece if at else piece.lstrip(), at)
    if n:
        assert told["top_logprobs"][0] is None and len(told["top_logprobs"]) == len(ids)
        for logprob, top in zip(scored, told["top_logprobs"][1:], strict=True):
            assert logprob <= max(top.values())


def test_an_echo_without_new_tokens_is_the_prompt(llama):
    (choice,) = answered(llama, asked(echo=True, logprobs=1, max_tokens=0))["choices"]
    assert choice["text"] == "Tom" and choice["logprobs"]["token_ids"] == llama.tokens("Tom")


def test_an_echo_ends_with_the_token_that_ended_the_text(llama):
    """So that who asks for one token always finds one behind the prompt."""
    end = min(llama.tokenizer.stop_ids)
    request = asked(echo=True, logprobs=1, max_tokens=1, logit_bias={str(end): 100})
    (choice,) = answered(llama, request)["choices"]
    assert choice["finish_reason"] == "stop" and choice["text"] == "Tom"
    assert choice["logprobs"]["token_ids"] == [*llama.tokens("Tom"), end]


def test_a_bias_is_added_to_logits(llama):
    request = asked(max_tokens=5, logit_bias={"80": 100}, temperature=1)
    assert written(llama, request)[0].completion().ids == [80] * 5
    greedy = asked(max_tokens=6, temperature=0)
    likeliest = written(llama, greedy)[0].completion().ids
    other = asked(max_tokens=6, temperature=0, logit_bias={str(likeliest[0]): -100})
    assert likeliest[0] not in written(llama, other)[0].completion().ids
    with pytest.raises(tinyllama.TinyllamaError, match="token id 999999 is not in"):
        written(llama, asked(logit_bias={"999999": 1}))


def streamed(llama, request) -> list[dict]:
    """All events of an answer."""
    together = Together(llama)
    texts = [together.begin(*one) for one in request.texts()]
    chunks, found = Chunks(request, texts, "mine"), []
    found += chunks.first()
    while len(together):
        together.turn()
        while together.pieces:
            text, piece = together.pieces.popleft()
            if piece or text.stop_reason:
                found += chunks.piece(texts.index(text), piece, len(text.tokens), text.stop_reason)
    return [*found, *chunks.last()]


@pytest.mark.parametrize("url", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("stop", [None, "l", "girl"])
def test_the_pieces_of_an_answer_make_up_the_whole(llama, url, stop):
    body = {"max_tokens": 20, "seed": 2, "n": 2, "stop": stop, "temperature": 1.5}
    body |= {"logprobs": True, "top_logprobs": 2} if url == CHAT else {"logprobs": 2}
    whole, events = answered(llama, asked(url, **body)), streamed(llama, asked(url, stream=True, **body))
    assert len({event["id"] for event in events}) == 1
    for choice in whole["choices"]:
        mine = [event["choices"][0] for event in events if event["choices"][0]["index"] == choice["index"]]
        logprobs = [one["logprobs"] for one in mine if one["logprobs"]]
        if url == CHAT:
            assert mine[0]["delta"] == {"role": "assistant", "content": ""}
            assert "".join(one["delta"].get("content", "") for one in mine) == choice["message"]["content"]
            assert [t for some in logprobs for t in some["content"]] == choice["logprobs"]["content"]
        else:
            assert "".join(one["text"] for one in mine) == choice["text"]
            for key, value in choice["logprobs"].items():
                assert [one for some in logprobs for one in some[key]] == value
        assert [one["finish_reason"] for one in mine] == [None] * (len(mine) - 1) + [choice["finish_reason"]]
        assert mine[-1]["seed"] == choice["seed"]


def test_a_stream_says_at_its_end_how_many_tokens_there_were_if_asked(llama):
    request = asked(stream=True, stream_options={"include_usage": True}, max_tokens=3, echo=True)
    *events, last = streamed(llama, request)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 3
    assert all(event["usage"] is None for event in events)
    assert events[0]["choices"][0]["text"] == "Tom"
    assert "usage" not in streamed(llama, asked(stream=True, max_tokens=1))[0]
