"""Weights of a shape alone: random, as fast as real ones, and made in no time; or a file of them.

A matrix is a few rows of random blocks over and over. All matrices of a shape and a type share them.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np

from ..config import Config
from ..errors import check_cancelled, require
from ..formats.headers import gguf_header
from ..quant import TYPES, quantize
from ..tensor import Piece, Tensor
from ..tokenizer import BYTE, BYTE_PIECES, CONTROL, NORMAL, UNKNOWN, Vocabulary
from .mixes import MIXES, Choice, find_mix, fitting

ROWS = 32  # that are random; those below repeat them
PORTION = 1 << 25  # bytes that are written at a time


class RandomWeights(dict):
    """Weights of a shape by Meta's names. `values()` know their sizes alone; `[name]` has numbers.

    Args:
        type: a key of TYPES for all matrices, "q4_k" say, or else one of mixes.MIXES, "Q4_K_M" say.
    Raises TinyllamaError for any other type.
    """

    def __init__(self, config: Config, type: str):
        self.config = config
        self.file_type = TYPES[type].file_type if type in TYPES else MIXES[find_mix(type)].number
        self._data = cache(_data)
        mix = None if type in TYPES else Choice(find_mix(type), config, tied=False)
        for name, shape in config.tensor_shapes().items():
            own = "f32"
            if len(shape) == 2:
                own = mix.type_of(name, shape[1]) if mix else fitting(type, shape[1])
            self[name] = Tensor(name, shape, (Piece(b"", 0, own, shape),))

    def __getitem__(self, name: str) -> Tensor:
        tensor = super().__getitem__(name)
        data = self._data(tensor.shape, tensor.type)
        return Tensor(name, tensor.shape, (Piece(data, 0, tensor.type, tensor.shape),))

    def write_gguf(self, path: Path, name: str, progress: Callable[[str], None]) -> None:
        """As a file, with a vocabulary of made-up words.

        Raises TinyllamaError where GGUF hasn't the type, OSError where there is no room.
        """
        lacking = next((t.type for t in self.values() if TYPES[t.type].gguf_id is None), "")
        require(not lacking, f"a GGUF file can't hold {lacking}")
        infos = [(tensor.name, tensor.type, tensor.shape) for tensor in self.values()]
        vocabulary = _vocabulary(self.config.vocab_size)
        head, offsets, size = gguf_header(self.config, vocabulary, infos, self.file_type, name)
        with path.open("wb") as file:
            file.write(head)
            for tensor, offset in zip(self.values(), offsets, strict=True):
                file.seek(offset)
                data = memoryview(self._data(tensor.shape, tensor.type))
                for start in range(0, len(data), PORTION):
                    check_cancelled()
                    progress(f"write {(offset + start) / size:.0%} of {path}")
                    file.write(data[start : start + PORTION])
            file.truncate(size)


def _rows(n_rows: int, n_cols: int, type: str) -> np.ndarray:
    """Blocks of random rows whose products are about as large as their inputs."""
    kind, random, deviation = TYPES[type], np.random.default_rng(0), n_cols**-0.5
    if kind.block == 1:
        noise = random.standard_normal((n_rows, n_cols), np.float32)
        return quantize(noise * np.float32(deviation), type)
    shape = (n_rows, n_cols)
    blocks = kind.view(bytearray(random.bytes(kind.nbytes(shape))), shape)
    scale, minimum = "d", next((name for name in ("m", "dmin") if name in blocks.dtype.names), None)
    wanted = {scale: 1.0}
    if minimum:  # so that the mean is 0
        means = [_with(blocks, kind, {scale: d, minimum: 1.0 - d}).mean() for d in (1.0, 0.0)]
        wanted[minimum] = -means[0] / means[1]
    factor = deviation / _with(blocks, kind, wanted).std()
    _with(blocks, kind, {name: value * factor for name, value in wanted.items()})
    return blocks


def _with(blocks: np.ndarray, kind, scales: dict[str, float]) -> np.ndarray:
    """The numbers that blocks stand for once they all have these scales."""
    for name, value in scales.items():
        blocks[name] = value
    return kind.dequantize(blocks)


def _data(shape: tuple[int, ...], type: str) -> np.ndarray:
    """The bytes of a tensor."""
    if len(shape) == 1:
        return np.ones(shape, np.float32).view(np.uint8)
    rows = _rows(min(shape[0], ROWS), shape[1], type)
    blocks = np.resize(rows, (shape[0], *rows.shape[1:]))
    return blocks.reshape(-1).view(np.uint8)


def _vocabulary(n: int) -> Vocabulary:
    """So many pieces, no two of which are alike."""
    known = [
        ("<unk>", UNKNOWN),
        ("<s>", CONTROL),
        ("</s>", CONTROL),
        *((piece, BYTE) for piece in BYTE_PIECES),
    ]
    known += [(f"▁{number}", NORMAL) for number in range(len(known), n)]
    pieces, types = zip(*known[:n], strict=True)
    scores = tuple(float(-number) for number in range(n))
    return Vocabulary("sentencepiece", pieces, scores, types)
