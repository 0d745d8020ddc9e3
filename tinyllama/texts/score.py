"""How likely a model thinks each token of a text, given those before it."""

from collections.abc import Callable, Iterator
from itertools import chain

from ..errors import require
from ..ops import KVCache
from ..sampling import stage
from ..tokenizer import Tokenizer
from .completion import Token, token_of


def score(
    run: Callable, tokenizer: Tokenizer, cache: KVCache, ids: list[int], batch_size: int = 512
) -> list[Token]:
    """How likely a model thinks each token, given those before it: all that `scoring` gives."""
    return [*chain.from_iterable(scoring(run, tokenizer, cache, ids, batch_size))]


def scoring(
    run: Callable, tokenizer: Tokenizer, cache: KVCache, ids: list[int], batch_size: int = 512
) -> Iterator[list[Token]]:
    """How likely a model thinks each token, given those before it, so many at a time.

    Args:
        run: sends tokens through the model, behind those in the cache: logits [n_tokens, vocab_size].
        cache: empty, with room for all ids.
    Yields:
        A Token for each. Its one stage, "logits", says what the model expected there. The first token has
        nothing before it: its probability is None, and it has no stage.
    """
    require(batch_size >= 1, f"batch_size must be at least 1, not {batch_size}")
    yield [Token(ids[0], tokenizer.piece(ids[0]), None)]
    for start in range(0, len(ids) - 1, batch_size):
        found = run(ids[start : min(start + batch_size, len(ids) - 1)], cache)
        behind = ids[start + 1 :]
        yield [
            token_of(tokenizer, token, logits, [stage("logits", logits)])
            for token, logits in zip(behind, found, strict=False)
        ]
