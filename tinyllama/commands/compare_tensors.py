"""Which tensors of a quantized model are to blame: how far each is from what it was made from.

Two figures for each matrix, as fractions:

    error          root mean square of the weights' difference, by that of the weights themselves
    output_error   the same of what comes out of it: the matrix times values that the first model gave it

A weight counts for nothing where its input is small. So the second figure may be far from the first, and it
is the one that says which tensor to keep finer.
"""

import math
from dataclasses import dataclass

import numpy as np

from ..config import EMBEDDING, OUTPUT
from ..errors import check_cancelled
from ..formats import Checkpoint
from ..taps.names import INPUTS
from ..tensor import Tensor
from .tables import split_name

CHUNK = 1 << 20  # weights that are dequantized at a time


@dataclass(frozen=True)
class TensorError:
    """A tensor in two models."""

    name: str  # Meta's, "layers.3.feed_forward.w2.weight"
    types: tuple[str, str]  # in the first and the second model
    n_weights: int
    n_bytes: tuple[int, int]  # likewise
    error: float  # of its weights
    output_error: float | None  # of what it makes of its input; None of a vector, or where nothing was run

    @property
    def worst(self) -> float:
        """What tensors are sorted by."""
        return self.error if self.output_error is None else self.output_error


def pairs(a: Checkpoint, b: Checkpoint) -> dict[str, tuple[Tensor, Tensor]]:
    """The tensors that both have, in the order of the forward pass.

    Where only one has an output of its own, the other's embedding stands beside it.
    """
    ours, theirs = a.tensors, b.tensors
    if OUTPUT in ours or OUTPUT in theirs:
        ours, theirs = ({OUTPUT: tensors[EMBEDDING], **tensors} for tensors in (ours, theirs))
    return {name: (ours[name], theirs[name]) for name in a.config.tensor_shapes() if name in ours}


def inputs_of(both: dict[str, tuple[Tensor, Tensor]]) -> dict[str, str]:
    """The value that each tensor is multiplied with, by the tensor's name; of a vector there is none."""
    found = {OUTPUT if OUTPUT in both else EMBEDDING: "norm"}
    for name in both:
        layer, role = split_name(name.removesuffix(".weight"))
        if layer is not None and role in INPUTS:
            found[name] = f"layers.{layer}.{INPUTS[role]}"
    return found


def tensor_error(name: str, ours: Tensor, theirs: Tensor, inputs: np.ndarray | None) -> TensorError:
    """Compare a tensor of the first model, of Meta's name, with the second's.

    Args:
        inputs: what it is multiplied with, [n_inputs, n_in].
    """
    sums, rows = np.zeros(4), max(1, CHUNK // math.prod(ours.shape[1:]))
    for start in range(0, ours.shape[0], rows):
        check_cancelled()
        weights, others = (side.dequantize(start, start + rows) for side in (ours, theirs))
        found = [weights, others - weights]
        found += [] if inputs is None else [inputs @ array.T for array in found]
        sums[: len(found)] += [np.vdot(array, array) for array in found]
    squares, differences, outputs, output_differences = sums
    return TensorError(
        name,
        (ours.type, theirs.type),
        math.prod(ours.shape),
        (ours.nbytes, theirs.nbytes),
        float(differences / (squares or 1)) ** 0.5,
        None if inputs is None else float(output_differences / (outputs or 1)) ** 0.5,
    )
