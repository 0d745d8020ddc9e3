"""llama.cpp's converter and quantizer of 12 March 2023, said again one number at a time: an oracle for files.

Written from a description of their formats and arithmetic (float32 throughout, rounding half away from
zero). Nothing here is shared with the package.
"""

import struct
from pathlib import Path

import numpy as np
import sentencepiece
import torch

F32 = np.float32


def convert(folder: Path, params: dict, ftype: int) -> list[bytes]:
    """The files that became of consolidated.00.pth, consolidated.01.pth, ..."""
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return [
        _header(params, tokenizer, ftype) + b"".join(_tensors(torch.load(path), ftype))
        for path in sorted(folder.glob("consolidated.*.pth"))
    ]


def _header(params: dict, tokenizer, ftype: int) -> bytes:
    file = struct.pack("<i", 0x67676D6C)
    file += struct.pack("<i", tokenizer.vocab_size())
    for name in ("dim", "multiple_of", "n_heads", "n_layers"):
        file += struct.pack("<i", params[name])
    file += struct.pack("<i", params["dim"] // params["n_heads"])
    file += struct.pack("<i", ftype)
    for token in range(tokenizer.vocab_size()):
        text = tokenizer.decode([tokenizer.piece_to_id("."), token]).encode("utf-8")[1:]
        file += struct.pack("<i", len(text)) + text
    return file


def _tensors(state: dict, ftype: int):
    for name, tensor in state.items():
        if name[-5:] == "freqs":
            continue
        data = tensor.float().numpy().squeeze()
        is_f32 = ftype == 0 or data.ndim == 1
        yield struct.pack("<iii", data.ndim, len(name), 0 if is_f32 else 1)
        for axis in reversed(range(data.ndim)):
            yield struct.pack("<i", data.shape[axis])
        yield name.encode()
        yield data.astype("<f4" if is_f32 else "<f2").tobytes()


def quantize(file: bytes, ftype: int) -> bytes:
    """The file that became of an f16 or f32 file: 2 is q4_0, 3 is q4_1."""
    n_vocab, position = struct.unpack_from("<i", file, 4)[0], 32
    for _ in range(n_vocab):
        position += 4 + struct.unpack_from("<i", file, position)[0]
    out = [file[:28], struct.pack("<i", ftype), file[32:position]]
    while position < len(file):
        n_dims, name_length, old = struct.unpack_from("<3i", file, position)
        ne = struct.unpack_from(f"<{n_dims}i", file, position + 12)
        start = position + 12 + 4 * n_dims
        name, data = file[start : start + name_length], start + name_length
        position = data + int(np.prod(ne)) * (4, 2)[old]
        if n_dims == 2 and name.endswith(b"weight"):
            out.append(struct.pack("<5i", 2, name_length, ftype, *ne) + name)
            weights = np.frombuffer(file[data:position], ("<f4", "<f2")[old]).astype(F32)
            out.extend((q4_0, q4_1)[ftype - 2](row) for row in weights.reshape(ne[1], ne[0]))
        else:
            out.append(file[start - 12 - 4 * n_dims : position])
    return b"".join(out)


@np.errstate(over="ignore", invalid="ignore")
def q4_0(row: np.ndarray, planar: bool = False) -> bytes:
    """A row of blocks of 12 March; `planar` gives that of 10 March."""
    scales, nibbles = [], []
    for block in row.reshape(-1, 32):
        amax = F32(0)
        for x in block:
            amax = max(amax, abs(x))
        d = amax / F32(7)
        inverse = F32(1) / d if d else F32(0)
        q = [round_half_away(x * inverse) + 8 for x in block]
        scales.append(struct.pack("<f", d))
        nibbles.append(bytes(q[i] | q[i + 1] << 4 for i in range(0, 32, 2)))
    if planar:
        return b"".join(scales) + b"".join(nibbles)
    return b"".join(d + q for d, q in zip(scales, nibbles, strict=True))


@np.errstate(over="ignore", invalid="ignore")
def q4_1(row: np.ndarray) -> bytes:
    minima, scales, nibbles = [], [], []
    for block in row.reshape(-1, 32):
        low, high = np.finfo(F32).max, np.finfo(F32).tiny
        for x in block:
            low, high = min(low, x), max(high, x)
        d = (high - low) / F32(15)
        inverse = F32(1) / d if d else F32(0)
        q = [round_half_away((x - low) * inverse) for x in block]
        minima.append(struct.pack("<f", low))
        scales.append(struct.pack("<f", d))
        nibbles.append(bytes(q[i] | q[i + 1] << 4 for i in range(0, 32, 2)))
    return b"".join(minima) + b"".join(scales) + b"".join(nibbles)


def round_half_away(x: np.float32) -> int:
    if np.isnan(x):  # 0 times infinity, in a q4_1 block of zeros: as a byte that is 0
        return 0
    whole = int(x)
    if abs(x - F32(whole)) >= 0.5:
        whole += 1 if x > 0 else -1
    return whole
