"""Which weights of the second model make the difference: the first model runs with a few of the second's.

One kind of tensor in all layers, or all tensors of one layer, come from the second model, all others from the
first, and the divergence that this makes is measured. Divergences are small and nearly add up, so each is
about the part of the whole that goes away where these weights are kept as they are in the first.

Weights are shared with the loaded models: a mixture takes no memory.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from ..config import WHOLE
from ..model import Model, forward
from ..ops import KVCache
from ..texts.perplexity import predictions
from .kl_divergence import score


@dataclass(frozen=True)
class Share:
    """Weights of the second model, and what they do by themselves."""

    name: str  # "attention.wv" of all layers, "layers.3", or "tok_embeddings"
    kld: float  # mean divergence of the first model with these weights from the first model, in nats
    part: float  # of the divergence of the second model


class Mixed:
    """A model that takes some weights from another one; runs as a `Llama` does."""

    def __init__(self, llama, model: Model):
        self._llama, self._model = llama, model

    def forward(self, tokens, cache, last: bool = False) -> np.ndarray:
        """`model.forward` of a mixture."""
        with self._llama.backend.running():
            return forward(self._model, self._llama.backend, tokens, cache, last=last)


def mixtures(a: Model, b: Model, kinds: list[str]) -> Iterator[tuple[str, Model]]:
    """The first model with weights of the second, and the name of those.

    Args:
        kinds: of tensors that differ, "attention.wv" say.
    """
    whole = {row[0] for row in WHOLE}
    for kind in kinds:
        if kind in whole:
            tied = {"output": b.output} if kind == "tok_embeddings" and a.output is a.tok_embeddings else {}
            yield kind, replace(a, **{kind: getattr(b, kind)}, **tied)
        else:
            key = kind.removeprefix("attention.").removeprefix("feed_forward.")
            both = zip(a.layers, b.layers, strict=True)
            yield kind, replace(a, layers=[ours | {key: theirs[key]} for ours, theirs in both])
    for number, other in enumerate(b.layers):
        yield f"layers.{number}", replace(a, layers=[*a.layers[:number], other, *a.layers[number + 1 :]])


def shares(
    a, b, window: np.ndarray, mixed: Iterable[tuple[str, Model]], batch_size: int = 512
) -> Iterator[Share]:
    """Measure what each mixture does, one after the other.

    Args:
        a, b: `Llama`s of the same shape and backend.
        window: tokens, [n_tokens], the second half of which is scored.
        mixed: `mixtures` of the two, wrapped in a bar.
    """
    cache = share_cache(a, len(window))
    expected = [logits for logits, _ in predictions(a, window, batch_size, cache)]

    def kld(llama) -> float:
        ours = predictions(llama, window, batch_size, cache)
        pairs = zip(expected, ours, strict=True)
        return float(np.concatenate([score(base, *some)["kld"] for base, some in pairs]).mean())

    whole = kld(b)
    for name, model in mixed:
        some = kld(Mixed(a, model))
        yield Share(name, some, some / whole if whole else 0.0)


def share_cache(a, n_tokens: int) -> KVCache:
    """What `shares` needs for so many tokens; raises TinyllamaError where there isn't the memory."""
    return a.new_cache(n_tokens, at_once=n_tokens, n_logits=2 * n_tokens)
