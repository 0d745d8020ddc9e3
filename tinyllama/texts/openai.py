"""Requests and answers as OpenAI's API has them: /v1/completions and /v1/chat/completions.

A request becomes prompts and Settings, and the texts an answer. What would change a text and can't be done is
refused; what changes none is accepted and ignored.
"""

import math
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import Cancelled, TinyllamaError
from ..generation import Generation
from ..settings import Settings
from ..tokenizer import TextStream, Tokenizer
from .completion import Token

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
#: Keys of a request, and the setting that each is; the last are llama.cpp's.
SETTINGS = {"max_tokens": "n_predict", "max_completion_tokens": "n_predict", "temperature": "temp"}
SETTINGS |= {name: name for name in ("top_p", "seed", "stop", "top_k", "repeat_penalty", "repeat_last_n")}
DEFAULTS = {"temp": 1.0, "top_p": 1.0}  # OpenAI's; the others are those of Settings
SHORT = 16  # tokens of a completion that doesn't say how many
#: Keys that may have these values alone, with which they change nothing.
NEUTRAL = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "stream": (False,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
#: Keys that change no text, whatever they say.
IGNORED = {"model", "user", "metadata", "store", "service_tier", "stream_options", "parallel_tool_calls"}
IGNORED |= {"safety_identifier", "prompt_cache_key"}
LISTED = 20  # alternatives to a token, at most
FINISHED = {"length": "length", "context": "length", "eos": "stop", "stop": "stop"}


class Refused(TinyllamaError):
    """A request that isn't answered: `param` is the key that is wrong, `code` says how."""

    def __init__(self, message: object, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.param, self.code = param, code

    def body(self) -> dict:
        """OpenAI's error object."""
        about = {"type": "invalid_request_error", "param": self.param, "code": self.code}
        return {"error": {"message": str(self), **about}}


@dataclass(frozen=True, eq=False)
class Request:
    """What is asked for."""

    url: str  # COMPLETIONS or CHAT
    prompts: list  # texts or lists of ids
    settings: Settings
    listed: int | None  # so many alternatives to each token are told; None: nor its own probability
    model: str | None  # the model that it names


def parse(url: str, body: object, chat: Callable[[list], list[int]], **defaults) -> Request:
    """Take a request.

    Args:
        chat: messages -> the ids of a prompt.
        defaults: Settings that no request has a key for: ctx_size, batch_size.
    Raises:
        Refused: a key is missing, has a wrong value, or isn't supported.
    """
    _require(url in (COMPLETIONS, CHAT), f"url must be {COMPLETIONS} or {CHAT}, not {url!r:.60}", "url")
    _require(isinstance(body, dict), "body must be an object", "body")
    given, is_chat = {key: value for key, value in body.items() if value is not None}, url == CHAT
    model = given.get("model")
    _require(isinstance(model, str | None), f"model must be a name, not {model!r:.60}", "model")
    listed = _listed(given, is_chat)
    known = {*NEUTRAL, *SETTINGS, *IGNORED, "logprobs", "top_logprobs", "messages" if is_chat else "prompt"}
    for key, value in given.items():
        _require(key in known, f"{key!r:.60} isn't supported", key[:60], "unsupported_parameter")
        fine = key not in NEUTRAL or value in NEUTRAL[key]
        only = " or ".join(repr(some) for some in NEUTRAL.get(key, ()))
        _require(fine, f"{key} can only be {only} here", key, "unsupported_value")
    settings = _settings(given, DEFAULTS | defaults | {"n_predict": -1 if is_chat else SHORT}, bool(listed))
    prompts = [_chat(given, chat)] if is_chat else _prompts(given)
    return Request(url, prompts, settings, listed, model)


def _require(ok: object, message: str, param: str, code: str = "invalid_value") -> None:
    if not ok:
        raise Refused(message, param, code)


def _listed(given: dict, is_chat: bool) -> int | None:
    """How many alternatives to each token are asked for; None: not even its own probability."""
    wanted, top = given.get("logprobs"), given.get("top_logprobs", 0)
    if is_chat:
        _require(isinstance(wanted, bool | None), "logprobs of a chat must be true or false", "logprobs")
        _require(wanted or not top, "top_logprobs needs logprobs", "top_logprobs")
        wanted = top if wanted else None
    else:
        _require("top_logprobs" not in given, "top_logprobs is of chats; here it is logprobs", "top_logprobs")
    number = wanted is None or (type(wanted) is int and 0 <= wanted <= LISTED)
    name = "top_logprobs" if is_chat else "logprobs"
    _require(number, f"{name} must be a whole number from 0 to {LISTED}, not {wanted!r:.60}", name)
    return wanted


def _settings(given: dict, defaults: dict, stages: bool) -> Settings:
    found = dict(defaults)
    for key, name in SETTINGS.items():
        if key in given:
            value = given[key]
            _require(not isinstance(value, bool), f"{key} must be a number, not {value}", key)
            one = {name: value}
            if name == "stop":
                one = {name: [value] if isinstance(value, str) else value}
                _require(isinstance(one[name], list), "stop must be a text or a list of texts", key)
            try:
                Settings(**one)
            except TinyllamaError as error:
                raise Refused(str(error).replace(name, key, 1), key, "invalid_value") from None
            found |= one
    return Settings(**found, stages=stages)


def _chat(given: dict, chat: Callable[[list], list[int]]) -> list[int]:
    messages = given.get("messages")
    _require(messages is not None, "messages is missing", "messages", "missing_required_parameter")
    _require(isinstance(messages, list) and messages, "messages must be a list that isn't empty", "messages")
    try:
        return chat([_message(message, f"messages[{n}]") for n, message in enumerate(messages)])
    except (Refused, Cancelled):
        raise
    except TinyllamaError as error:
        raise Refused(error, "messages") from None


def _message(message: object, where: str) -> dict[str, str]:
    _require(isinstance(message, dict), f"{where} must be an object with role and content", where)
    more = {key for key, value in message.items() if value} - {"role", "content", "name"}
    found = f"{where}.{min(more, default='')!s:.40}"
    _require(not more, f"{found} isn't supported", where, "unsupported_parameter")
    role, content = message.get("role"), message.get("content")
    if isinstance(content, list):  # of parts
        texts = [part.get("text") if isinstance(part, dict) else None for part in content]
        fine = all(isinstance(text, str) for text in texts)
        _require(fine, f"{where}.content has a part that isn't text", where, "unsupported_value")
        content = "".join(texts)
    return {"role": "system" if role == "developer" else role, "content": content}


def _prompts(given: dict) -> list:
    """One or several, each a text or a list of ids; whether the ids are any, the model says."""
    prompt = given.get("prompt")
    _require(prompt is not None, "prompt is missing", "prompt", "missing_required_parameter")
    several = isinstance(prompt, list) and prompt and all(isinstance(one, str | list) for one in prompt)
    prompts = prompt if several else [prompt]
    for one in prompts:
        is_ids = isinstance(one, list) and one and all(type(token) is int for token in one)
        fine = is_ids or (isinstance(one, str) and one)
        _require(fine, "prompt must be a text or ids, and not empty, or a list of such", "prompt")
    return prompts


# --- answers --------------------------------------------------------------------------------------


def answer(request: Request, texts: list[Generation], model: str) -> dict:
    """The body of an answer, given the texts of the request's prompts, and the name of their model."""
    is_chat, choices = request.url == CHAT, []
    for index, text in enumerate(texts):
        written = text.completion()
        message = {"role": "assistant", "content": str(written)}
        said = {"message": message} if is_chat else {"text": str(written)}
        logprobs = None
        if request.listed is not None:
            tell = _chat_logprobs if is_chat else _logprobs
            logprobs = tell(_shown(written, text.tokenizer), request.listed, text.tokenizer)
        ended = {"finish_reason": FINISHED[written.stop_reason], "logprobs": logprobs, "seed": text.seed}
        choices.append({"index": index, **said, **ended})
    n_prompt, n_written = sum(len(text.prompt_ids) for text in texts), sum(len(text.tokens) for text in texts)
    return {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": choices,
        "usage": {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_written,
            "total_tokens": n_prompt + n_written,
        },
    }


def _shown(written, tokenizer: Tokenizer) -> list[tuple[Token, int]]:
    """The tokens of a text, and where in it each begins; without those of a stop string."""
    stream, at, shown = TextStream(tokenizer), 0, []
    for token in written.tokens:
        shown.append((token, at))
        at += len(stream.feed(token.id))
    return [(token, at) for token, at in shown if written.stop_reason != "stop" or at < len(written)]


def _logprob(prob: float) -> float:
    """Of a probability that is too small for a float, a number that JSON has, as OpenAI gives."""
    return math.log(prob) if prob > 0 else -9999.0


def _likeliest(token: Token, n: int) -> list[tuple[int, float]]:
    """Ids and probabilities of the n tokens that the model thought likeliest in a token's place."""
    if not n:
        return []
    first = token.stages[0]
    return [(int(one), float(prob)) for one, prob in zip(first.kept[:n], first.probs[:n], strict=True)]


def _logprobs(tokens: list[tuple[Token, int]], n: int, tokenizer: Tokenizer) -> dict:
    """In the shape of completions."""
    top = [{tokenizer.piece(one): _logprob(prob) for one, prob in _likeliest(t, n)} for t, _ in tokens]
    return {
        "tokens": [token.piece for token, _ in tokens],
        "token_logprobs": [_logprob(token.prob) for token, _ in tokens],
        "top_logprobs": top if n else None,
        "text_offset": [at for _, at in tokens],
    }


def _chat_logprobs(tokens: list[tuple[Token, int]], n: int, tokenizer: Tokenizer) -> dict:
    """In the shape of chats."""

    def told(token_id: int, prob: float) -> dict:
        data = [*tokenizer.token_bytes(token_id)]
        return {"token": tokenizer.piece(token_id), "logprob": _logprob(prob), "bytes": data}

    content = [told(t.id, t.prob) | {"top_logprobs": [told(*o) for o in _likeliest(t, n)]} for t, _ in tokens]
    return {"content": content}
