"""Requests as OpenAI's API has them: /v1/completions and /v1/chat/completions; `answers` has what they get.

A request becomes prompts and Settings. What would change a text and can't be done is refused; what changes
none is accepted and ignored.
"""

import codecs
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from ..errors import Cancelled, TinyllamaError
from ..machine.limits import human
from ..settings import Settings

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
#: Keys of a request, and the setting that each is; the last are llama.cpp's.
SETTINGS = {"max_tokens": "n_predict", "max_completion_tokens": "n_predict", "temperature": "temp"}
SETTINGS |= {name: name for name in ("top_p", "seed", "stop", "top_k", "repeat_penalty", "repeat_last_n")}
DEFAULTS = {"temp": 1.0, "top_p": 1.0}  # OpenAI's; the others are those of Settings
SHORT = 16  # tokens of a completion that doesn't say how many
#: Keys that may have these values alone, with which they change nothing.
NEUTRAL = {
    "suffix": ("",),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
#: Keys that change no text, whatever they say.
IGNORED = {"model", "user", "metadata", "store", "service_tier", "parallel_tool_calls"}
IGNORED |= {"safety_identifier", "prompt_cache_key"}
ASKED = {"n", "best_of", "echo", "logprobs", "top_logprobs", "logit_bias", "stream", "stream_options"}
LARGEST = 32_000_000  # bytes
LISTED = 20  # alternatives to a token, at most
MOST = 128  # texts of a prompt
STOPS, STOP = 16, 256  # texts, and characters of one, at most
BIASED, BIAS = 1024, 100  # tokens with a logit_bias, and its size, at most


class Refused(TinyllamaError):
    """A request that isn't answered: `param` is the key that is wrong, `code` says how."""

    def __init__(self, message: object, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.param, self.code = param, code

    def body(self) -> dict:
        """OpenAI's error object."""
        about = {"type": "invalid_request_error", "param": self.param, "code": self.code}
        return {"error": {"message": str(self), **about}}


def read_object(data: bytes, code: str = "invalid_json") -> dict:
    """The object that a request is in JSON. Raises Refused, with a code."""

    def no_constant(name: str):
        raise ValueError(f"{name} is no number of JSON")

    fine = len(data) <= LARGEST
    try:
        found = json.loads(data.removeprefix(codecs.BOM_UTF8), parse_constant=no_constant) if fine else None
    except RecursionError:
        raise Refused("isn't JSON: it is nested too deeply", None, code) from None
    except ValueError as error:
        raise Refused(f"isn't JSON: {error}", None, code) from None
    if not fine:
        raise Refused(f"has more than {human(LARGEST)}", None, code)
    if not isinstance(found, dict):
        raise Refused("isn't an object", None, code)
    return found


@dataclass(frozen=True, eq=False)
class Request:
    """What is asked for."""

    url: str  # COMPLETIONS or CHAT
    prompts: list  # texts or lists of ids
    settings: Settings
    listed: int | None  # so many alternatives to each token are told; None: nor its own probability
    model: str | None  # the model that it names
    n: int = 1  # choices for each prompt
    best_of: int = 1  # so many texts are written of each, and the n likeliest are the choices
    echo: bool = False  # each choice begins with its prompt
    stream: bool = False
    usage: bool = False  # whether a stream says at its end how many tokens there were
    bias: dict[int, float] = field(default_factory=dict)  # what is added to the logits of tokens

    @property
    def scores(self) -> bool:
        """Whether the answer says how likely the tokens of its prompts are."""
        return self.echo and self.listed is not None

    def texts(self) -> list[tuple[str | list[int], Settings]]:
        """What is to be written: of each prompt `best_of` texts, of seeds that follow each other."""
        seed = self.settings.seed
        seeds = [seed + number if seed >= 0 else seed for number in range(self.best_of)]
        return [(prompt, replace(self.settings, seed=seed)) for prompt in self.prompts for seed in seeds]


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
    known = {*NEUTRAL, *SETTINGS, *IGNORED, *ASKED, "messages" if is_chat else "prompt"}
    only_here = {} if not is_chat else {"echo": (False,), "best_of": (1,)}
    for key, value in given.items():
        _require(key in known, f"{key!r:.60} isn't supported", key[:60], "unsupported_parameter")
        possible = (NEUTRAL | only_here).get(key, [value])
        only = " or ".join(repr(some) for some in possible)
        _require(value in possible, f"{key} can only be {only} here", key, "unsupported_value")
    settings = _settings(given, DEFAULTS | defaults | {"n_predict": -1 if is_chat else SHORT}, bool(listed))
    asked = {"echo": _flag(given, "echo"), "stream": _flag(given, "stream"), "bias": _bias(given)}
    asked |= _numbers(given) | {"usage": _usage(given)}
    if asked["stream"]:
        _require(asked["best_of"] == asked["n"], "best_of can't be streamed", "best_of")
        _require(not asked["echo"] or listed is None, "echo with logprobs can't be streamed", "stream")
    prompts = [_chat(given, chat)] if is_chat else _prompts(given)
    return Request(url, prompts, settings, listed, model, **asked)


def _require(ok: object, message: str, param: str, code: str = "invalid_value") -> None:
    if not ok:
        raise Refused(message, param, code)


def _flag(given: dict, key: str) -> bool:
    value = given.get(key, False)
    _require(isinstance(value, bool), f"{key} must be true or false, not {value!r:.60}", key)
    return value


def _numbers(given: dict) -> dict[str, int]:
    """How many texts."""
    n = given.get("n", 1)
    found = {"n": n, "best_of": given.get("best_of", n)}
    for key, value in found.items():
        fine = type(value) is int and 1 <= value <= MOST
        _require(fine, f"{key} must be a whole number from 1 to {MOST}, not {value!r:.60}", key)
    _require(n <= found["best_of"], f"best_of must be at least n, which is {n}", "best_of")
    return found


def _usage(given: dict) -> bool:
    options = given.get("stream_options", {})
    fine = isinstance(options, dict) and isinstance(options.get("include_usage"), bool | None)
    _require(fine, "stream_options can be {'include_usage': true}", "stream_options")
    return bool(options.get("include_usage"))


def _bias(given: dict) -> dict[int, float]:
    """Whether its ids are any, the model says."""
    bias = given.get("logit_bias", {})
    fine = (
        isinstance(bias, dict)
        and len(bias) <= BIASED
        and all(key.isdecimal() and len(key) < 9 for key in bias)
    )
    fine = fine and all(type(value) in (int, float) and abs(value) <= BIAS for value in bias.values())
    what = f"logit_bias must be an object of at most {BIASED} token ids, each with a number"
    _require(fine, f"{what} from -{BIAS} to {BIAS}", "logit_bias")
    return {int(key): float(value) for key, value in bias.items()}


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
                fine = len(one[name]) <= STOPS and all(len(str(text)) <= STOP for text in one[name])
                _require(fine, f"stop can be {STOPS} texts of {STOP} characters", key)
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
