"""The logit lens: what the model would say after any layer and token if it stopped there."""

from collections.abc import Iterator, Sequence

import numpy as np

from ...errors import check_cancelled
from ...llama import Llama
from ...ops import softmax

SAYS = 5  # tokens that the model would say, of a layer
AT_ONCE = 2**22  # logits: 16 MB


class Lens:
    """The residual stream after every layer, through the last norm and the output matrix.

    Attributes:
        ids, probs: the likeliest token and its probability, [n_layers, n_tokens]; ids are -1 where `read`
            hasn't been yet.
    """

    def __init__(self, llama: Llama, residuals: Sequence[np.ndarray]):
        """Args: residuals: of each layer [n_tokens, dim]."""
        self._llama, self._residuals, self._columns = llama, residuals, {}
        self.ids = np.full((len(residuals), len(residuals[0])), -1)
        self.probs = np.zeros(self.ids.shape, np.float32)

    def is_read(self) -> bool:
        """Whether all layers are known."""
        return bool((self.ids >= 0).all())

    def read(self) -> Iterator[int]:
        """Fill in `ids` and `probs`, the last layer first; yields each layer that is done."""
        n_rows = max(1, AT_ONCE // self._llama.config.vocab_size)
        for layer in np.flatnonzero((self.ids < 0).any(axis=1))[::-1].tolist():
            residual = self._residuals[layer]
            for start in range(0, len(residual), n_rows):
                check_cancelled()
                rows = slice(start, start + n_rows)
                probs = softmax(self._llama.unembed(residual[rows]))
                self.ids[layer, rows], self.probs[layer, rows] = probs.argmax(axis=-1), probs.max(axis=-1)
            yield layer

    def column(self, position: int) -> list[list[tuple[str, float]]]:
        """After each layer, of one token: the likeliest five, (piece, probability)."""
        if position not in self._columns:
            self._columns[position] = [
                self._likeliest(softmax(self.logits(layer, position)))
                for layer in range(len(self._residuals))
            ]
        return self._columns[position]

    def logits(self, layer: int, position: int) -> np.ndarray:
        """After a layer and token, computed alone as while a text is written, [vocab_size]."""
        return self._llama.unembed(self._residuals[layer][position : position + 1])[0]

    def _likeliest(self, probs: np.ndarray) -> list[tuple[str, float]]:
        best = np.argsort(-probs, kind="stable")[:SAYS].tolist()
        return [(self._llama.tokenizer.piece(token), float(probs[token])) for token in best]
