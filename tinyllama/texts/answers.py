"""Answers to requests as OpenAI's API has them: whole, or piece by piece."""

import math
import secrets
import time
from collections.abc import Iterator, Sequence

from ..generation import Generation
from ..tokenizer import TextStream, Tokenizer
from .completion import Token
from .openai import CHAT, Request

FINISHED = {"length": "length", "context": "length", "eos": "stop", "stop": "stop"}
Placed = tuple[Token, int]  # a token, and where in the text it begins


def answer(request: Request, texts: list[Generation], model: str, scored: Sequence[list[Token]] = ()) -> dict:
    """The body of an answer.

    Args:
        texts: those that `request.texts()` asks for, written.
        model: their model's name.
        scored: of each text that is a choice, the tokens of `scored_ids` with their probabilities, if
            `request.scores`.
    """
    choices = []
    for index, text in enumerate(chosen(request, texts)):
        written, prompt = text.completion(), _prompt(request, index, text.tokenizer)
        logprobs, shown = None, _shown(written, text.tokenizer, len(prompt))
        if request.scores:
            shown = _echoed(scored[index], text, shown)
        if request.listed is not None:
            tell = _chat_logprobs if request.url == CHAT else _logprobs
            logprobs = tell(shown, request.listed, text.tokenizer)
        message = {"role": "assistant", "content": str(written)}
        said = {"message": message} if request.url == CHAT else {"text": prompt + written}
        ended = {"finish_reason": FINISHED[written.stop_reason], "logprobs": logprobs, "seed": text.seed}
        choices.append({"index": index, **said, **ended})
    return _about(request, model) | {"choices": choices, "usage": usage(request, texts)}


def chosen(request: Request, texts: list[Generation]) -> list[Generation]:
    """Of the texts of each prompt the n likeliest, the likeliest first; as they are if it has no others."""
    if request.best_of == request.n:
        return texts
    groups = [texts[at : at + request.best_of] for at in range(0, len(texts), request.best_of)]
    return [text for group in groups for text in sorted(group, key=_unlikely)[: request.n]]


def _unlikely(text: Generation) -> float:
    return -sum(_logprob(token.prob) for token in text.tokens) / max(1, len(text.tokens))


def usage(request: Request, texts: list[Generation]) -> dict:
    """How many tokens there were; a prompt counts once."""
    n_prompt = sum(len(text.prompt_ids) for text in texts[:: request.best_of])
    n_written = sum(len(text.tokens) for text in texts)
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_written,
        "total_tokens": n_prompt + n_written,
    }


def _about(request: Request, model: str) -> dict:
    is_chat = request.url == CHAT
    return {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": int(time.time()),
        "model": model,
    }


def _prompt(request: Request, index: int, tokenizer: Tokenizer) -> str:
    """What is repeated before a choice."""
    prompt = request.prompts[index // request.n] if request.echo else ""
    return prompt if isinstance(prompt, str) else tokenizer.decode(prompt)


class Chunks:
    """An answer in pieces, each the body of an event.

    Args:
        texts: those that `request.texts()` asks for, which are being written.
        model: their model's name.
    """

    def __init__(self, request: Request, texts: list[Generation], model: str):
        self._request, self._texts, self._about = request, texts, _about(request, model)
        self._about["object"] += ".chunk" if request.url == CHAT else ""
        prompts = [_prompt(request, index, text.tokenizer) for index, text in enumerate(texts)]
        self._prompts, self._told = prompts, [len(prompt) for prompt in prompts]
        self._tokens = [_Placing(text, at) for text, at in zip(texts, self._told, strict=True)]
        self._kept: list[list[Placed]] = [[] for _ in texts]  # of what isn't shown yet

    def first(self) -> Iterator[dict]:
        """Before any text: who speaks, or the prompts."""
        for index, prompt in enumerate(self._prompts):
            if self._request.url == CHAT:
                yield self._chunk(index, {"delta": {"role": "assistant", "content": ""}})
            elif prompt:
                yield self._chunk(index, {"text": prompt})

    def piece(self, index: int, piece: str, n_tokens: int, stop_reason: str | None) -> Iterator[dict]:
        """What a text has been continued by; n_tokens: how many it has now."""
        request, text, kept = self._request, self._texts[index], self._kept[index]
        self._told[index] += len(piece)
        while request.listed is not None and self._tokens[index].n < n_tokens:
            kept.append(next(self._tokens[index]))
        ready = kept[:]
        if stop_reason in (None, "stop"):  # of what is held back, and of a stop string, nothing is told
            ready = [(token, at) for token, at in kept if at < self._told[index]]
        del kept[: len(ready)]
        if piece or ready:
            tell = _chat_logprobs if request.url == CHAT else _logprobs
            logprobs = None if request.listed is None else tell(ready, request.listed, text.tokenizer)
            said = {"delta": {"content": piece}} if request.url == CHAT else {"text": piece}
            yield self._chunk(index, said, logprobs)
        if stop_reason:
            said = {"delta": {}} if request.url == CHAT else {"text": ""}
            yield self._chunk(index, said | {"seed": text.seed}, None, FINISHED[stop_reason])

    def last(self) -> Iterator[dict]:
        """Behind all texts."""
        if self._request.usage:
            yield self._about | {"choices": [], "usage": usage(self._request, self._texts)}

    def _chunk(self, index: int, said: dict, logprobs=None, reason: str | None = None) -> dict:
        choice = {"index": index, **said, "finish_reason": reason, "logprobs": logprobs}
        return self._about | {"choices": [choice]} | ({"usage": None} if self._request.usage else {})


class _Placing(Iterator):
    """The tokens of a text, as they come, and where in it each begins; n: how many have come."""

    def __init__(self, text: Generation, at: int = 0):
        self._text, self._stream, self._at, self.n = text, TextStream(text.tokenizer), at, 0

    def __next__(self) -> Placed:
        if self.n == len(self._text.tokens):
            raise StopIteration
        token, at = self._text.tokens[self.n], self._at
        self._at, self.n = at + len(self._stream.feed(token.id)), self.n + 1
        return token, at


# --- how likely tokens were -----------------------------------------------------------------------


def scored_ids(text: Generation) -> list[int]:
    """What is scored of a text whose prompt is repeated: all its tokens, and one that ended it."""
    end = [min(text.tokenizer.stop_ids)] if text.stop_reason == "eos" else []
    return [*text.prompt_ids, *(token.id for token in text.tokens), *end]


def _echoed(scored: list[Token], text: Generation, shown: list[Placed]) -> list[Placed]:
    """The tokens of a prompt and of what was written behind it."""
    stream, at, placed = TextStream(text.tokenizer, strip_prefix=True), 0, []
    n_shown = len(shown) + (text.stop_reason == "eos")
    for token in scored[: len(text.prompt_ids) + n_shown]:
        placed.append((token, at))
        at += len(stream.feed(token.id))
    return placed


def _shown(written, tokenizer: Tokenizer, at: int = 0) -> list[Placed]:
    """The tokens of a text that begins at a place; without those of a stop string."""
    stream, end, shown = TextStream(tokenizer), at + len(written), []
    for token in written.tokens:
        shown.append((token, at))
        at += len(stream.feed(token.id))
    return [(token, at) for token, at in shown if written.stop_reason != "stop" or at < end]


def _logprob(prob: float) -> float | None:
    """None of a first token; of 0, as of what is too small for a float, a number that JSON has, OpenAI's."""
    return None if prob is None else math.log(prob) if prob > 0 else -9999.0


def _likeliest(token: Token, n: int) -> list[tuple[int, float]]:
    """Ids and probabilities of the n tokens that the model thought likeliest in a token's place."""
    if not n or not token.stages:
        return []
    first = token.stages[0]
    return [(int(one), float(prob)) for one, prob in zip(first.kept[:n], first.probs[:n], strict=True)]


def _logprobs(tokens: list[Placed], n: int, tokenizer: Tokenizer) -> dict:
    """In the shape of completions, and the ids."""
    top = []
    for token, _ in tokens:
        found = _likeliest(token, n)
        by_piece = {
            tokenizer.piece(one): _logprob(prob) for one, prob in reversed(found)
        }  # the likelier wins
        top.append(dict(reversed(by_piece.items())) if token.stages else None)
    return {
        "tokens": [token.piece for token, _ in tokens],
        "token_logprobs": [_logprob(token.prob) for token, _ in tokens],
        "top_logprobs": top if n else None,
        "text_offset": [at for _, at in tokens],
        "token_ids": [token.id for token, _ in tokens],
        "top_token_ids": [[one for one, _ in _likeliest(token, n)] for token, _ in tokens] if n else None,
    }


def _chat_logprobs(tokens: list[Placed], n: int, tokenizer: Tokenizer) -> dict:
    """In the shape of chats, and the ids."""
    found = [(token, told_likeliest(tokenizer, token, n)) for token, _ in tokens]
    return {"content": [told(tokenizer, t.id, t.prob) | {"top_logprobs": top} for t, top in found]}


def told_likeliest(tokenizer: Tokenizer, token: Token, n: int) -> list[dict]:
    """The n tokens that the model thought likeliest in a token's place, and how likely."""
    return [told(tokenizer, *other) for other in _likeliest(token, n)]


def told(tokenizer: Tokenizer, token_id: int, prob: float) -> dict:
    """A token and how likely it was."""
    data = [*tokenizer.token_bytes(token_id)]
    return {"token": tokenizer.piece(token_id), "logprob": _logprob(prob), "bytes": data, "id": token_id}
