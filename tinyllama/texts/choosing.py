"""How the next tokens of a text are chosen from logits, wherever those are: a Choice can be sent there."""

import time
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ..sampling import Stage, sample
from ..settings import Settings


def probability(logits: np.ndarray, token: int) -> float:
    """How likely logits [vocab_size] make a token."""
    highest = logits.max()
    return float(np.exp(logits[token] - highest) / np.exp(logits - highest).sum())


class Picked(NamedTuple):
    """A token that was chosen, and how likely the model thought it."""

    id: int
    prob: float
    stages: tuple[Stage, ...] = ()  # if the settings ask for them


@dataclass
class Chosen:
    """What a Choice made of logits."""

    tokens: list[Picked]
    rng: np.random.Generator  # behind the numbers that were drawn
    seconds: float  # that it took


@dataclass
class Choice:
    """How the tokens of a step are chosen. Called with logits, [n_logits, vocab_size], it chooses them."""

    settings: Settings
    ids: list[int]  # the text without the guesses, as far back as a penalty looks
    guesses: list[int]  # of the next tokens, each of which has logits behind it
    rng: np.random.Generator
    never: list[int]  # ids that can't be chosen
    stop_ids: frozenset[int]  # that end a text
    bias: dict[int, float] = field(
        default_factory=dict
    )  # what is added to the logits of tokens, by their ids

    def __call__(self, logits: np.ndarray) -> Chosen:
        """Choose a token, and behind each guess that is right another."""
        started, picked, ids = time.perf_counter(), [], [*self.ids]
        for row, guess in zip(self._biased(logits), [*self.guesses, None], strict=False):
            stages: list[Stage] | None = [] if self.settings.stages else None
            token = sample(row, self.settings, ids, self.rng, stages, self.never)
            picked.append(Picked(token, probability(row, token), tuple(stages or ())))
            ids.append(token)
            if token != guess or token in self.stop_ids:
                break
        return Chosen(picked, self.rng, time.perf_counter() - started)

    def _biased(self, logits: np.ndarray) -> np.ndarray:
        if self.bias:
            logits = logits.copy()
            logits[:, [*self.bias]] += np.array([*self.bias.values()], np.float32)
        return logits
