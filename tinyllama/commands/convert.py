"""Meta's checkpoint -> one f16 (or f32) file, and such a file -> a file of 4-bit blocks.

    models/7B/consolidated.00.pth   13.5 GB   as Meta gave it
    models/7B/ggml-model-f16.bin    13.5 GB   convert: the same weights in one file that needs no pickle
    models/7B/ggml-model-q4_0.bin    4.2 GB   quantize

`convert` and `quantize` only plan: which tensors go where, as what. streaming.py then does the work.
The ggml files are byte for byte what llama.cpp's converter and quantizer wrote on 12 March 2023, one for
each part of the checkpoint; a GGUF is always one file, its parts merged.
"""

import hashlib
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from ..blocks import BLOCK, TYPES
from ..errors import TinyllamaError
from ..formats import Checkpoint, ggml, gguf, meta
from ..formats.parts import Part
from ..quant import Tensor
from .streaming import CHUNK, N_THREADS, Output, Rows, Source, write
from ..vocabulary import vocabulary_from_model
from ..machine.files import Unchanged, blamed

FTYPES = {0: "f32", 1: "f16"}

#: llama.cpp's numbers of the types that a file can be quantized to.
QUANTIZED = {number: type for type, number in gguf.FILE_TYPES.items() if TYPES[type].block > 1}
QUANTIZED_2023 = {"q4_0": "q4_0_2023", "q4_1": "q4_1_2023"}


def convert(
    folder: str | Path, ftype: int = 1, outfile: str | Path | None = None, format: str = "ggml"
) -> list[Path]:
    """Write the checkpoint in a folder as ggml (one file a part) or GGUF (one file).

    Args:
        folder: with (or one of) consolidated.NN.pth, params.json, and tokenizer.model there or one folder up.
        ftype: 1 stores matrices as f16, 0 as f32. Norms are f32 either way.
        outfile: by default ggml-model-f16.bin (-f32, .gguf) in the folder. Further parts append .1, .2, ...
        format: "ggml" or "gguf".
    Returns:
        the files written.
    Raises TinyllamaError where the checkpoint isn't whole, differs from its checklist.chk, or has no
    place in this format; then no file is written or changed.
    """
    folder = Path(folder).parent if Path(folder).suffix == ".pth" else Path(folder)
    if ftype not in FTYPES or format not in ("ggml", "gguf"):
        raise TinyllamaError(
            f"convert writes ggml or gguf of type 0 (f32) or 1 (f16), not {format} of {ftype!r}"
        )
    sources = Unchanged([*meta.part_paths(folder), folder / "params.json"])
    checkpoint = meta.read(folder)
    suffix = "bin" if format == "ggml" else "gguf"
    outfile = Path(outfile or folder / f"ggml-model-{FTYPES[ftype]}.{suffix}")
    if format == "ggml":
        outputs = _ggml_files(checkpoint, FTYPES[ftype], outfile)
    else:
        outputs = [_converted_gguf(checkpoint, FTYPES[ftype], outfile)]
    _refuse_to_replace([*checkpoint.files, folder / "params.json", checkpoint.vocabulary.model], outputs)
    return write(outputs, "convert", sources, _checksums(folder, checkpoint.files))


def quantize(source: str | Path, target: str | Path, type: int | str) -> list[Path]:
    """Write a ggml or GGUF file of f16, bf16 or f32 weights again, its matrices in blocks of a type.

    Args:
        source: of a ggml model in several parts, the first means all; a later one means that part alone.
        target: the file to write; of all parts, the first.
        type: "q4_0" (2) or "q4_1" (3), and of GGUF also "q5_0", "q5_1", "q8_0".
    Returns:
        the files written.
    Raises TinyllamaError where the source isn't whole, is quantized already, or has rows that don't
    divide into blocks; then no file is written or changed.
    """
    source, target = Path(source), Path(target)
    type = QUANTIZED.get(int(type), type) if str(type).isdigit() else type
    if type not in QUANTIZED.values():
        raise TinyllamaError(f"quantize to {', '.join(QUANTIZED.values())}, not to {type}")
    if gguf.is_gguf(source):
        unchanged = Unchanged([source])
        return _write_quantized([source], unchanged, [_quantized_gguf(source, target, type)])
    if type not in QUANTIZED_2023:
        raise TinyllamaError(f"{source}: a ggml file can be quantized to q4_0 or q4_1, not to {type}")
    number, paths = ggml.find_parts(source)
    sources = [source] if number else paths
    unchanged = Unchanged(sources)
    outputs = [
        _quantized_ggml(path, ggml.part_path(target, i), QUANTIZED_2023[type])
        for i, path in enumerate(sources)
    ]
    return _write_quantized(sources, unchanged, outputs)


def _write_quantized(sources: list[Path], unchanged: Unchanged, outputs: list[Output]) -> list[Path]:
    _refuse_to_replace(sources, outputs)
    return write(outputs, "quantize", unchanged)


def _refuse_to_replace(sources: list[Path], outputs: list[Output]) -> None:
    for output in outputs:
        if output.path.is_dir():
            raise TinyllamaError(f"{output.path} is a folder: name a file to write")
        if output.path.exists() and not output.path.is_file():
            raise TinyllamaError(f"{output.path} is a device or a pipe: name a file to write")
        if any(output.path.exists() and output.path.samefile(source) for source in sources):
            raise TinyllamaError(
                f"{output.path} would replace what it is made from: name another file to write"
            )


# --- ggml -----------------------------------------------------------------------------------------


def _ggml_files(checkpoint: Checkpoint, type: str, outfile: Path) -> list[Output]:
    """One file a part, each with all of the header and vocabulary."""
    config, model = checkpoint.config, checkpoint.vocabulary.model
    texts = ggml.token_texts(model)
    _check_vocab_size(checkpoint, len(texts))
    try:
        header = ggml.header(config, texts, ggml.FTYPES[type])
    except TinyllamaError as error:
        raise TinyllamaError(f"{checkpoint.path}: {error}") from None
    if config.norm_eps != (implied := ggml.published_norm_eps(config.dim)):
        message = (
            f"{outfile}: a ggml file can't hold norm_eps {config.norm_eps:g}, and {implied:g} will be taken"
        )
        warnings.warn(f"{message} unless params.json lies beside it; a GGUF file holds it", stacklevel=3)
    return [
        _ggml_file(meta.read_part(file), ggml.part_path(outfile, number), header, type)
        for number, file in enumerate(checkpoint.files)
    ]


def _quantized_ggml(file: Path, target: Path, type: str) -> Output:
    header, part = ggml.read_part(file)
    for entry in part.entries.values():
        _check_can_quantize(file, entry.name, entry.type, entry.shape)
    return _ggml_file(part, target, ggml.with_ftype(part.buffer[: header.size], ggml.FTYPES[type]), type)


def _ggml_file(part: Part, path: Path, header: bytes, type: str) -> Output:
    """A part's tensors one after the other, matrices as `type`."""
    headers, rows, offset = [(0, header)], [], len(header)
    for entry in part.entries.values():
        tensor_type = _type_of(entry.shape, type)
        record = ggml.record(entry.name, tensor_type, entry.shape)
        headers.append((offset, record))
        offset += len(record)
        source = Source(part.path, entry.offset, entry.type, entry.shape[-1])
        rows.append(Rows(entry.name, (source,), _n_rows(entry.shape), tensor_type, offset))
        offset += rows[-1].nbytes
    return Output(path, offset, headers, rows)


# --- GGUF -----------------------------------------------------------------------------------------


def _converted_gguf(checkpoint: Checkpoint, type: str, path: Path) -> Output:
    vocabulary = vocabulary_from_model(checkpoint.vocabulary.model)
    _check_vocab_size(checkpoint, len(vocabulary.pieces))
    return _gguf_file(replace(checkpoint, vocabulary=vocabulary), path, type, checkpoint.path.resolve().name)


def _quantized_gguf(file: Path, path: Path, type: str) -> Output:
    checkpoint = gguf.read(file)
    for tensor in checkpoint.tensors.values():
        _check_can_quantize(file, tensor.name, tensor.type, tensor.shape)
    return _gguf_file(checkpoint, path, type, file.stem, checkpoint.metadata)


def _gguf_file(checkpoint: Checkpoint, path: Path, type: str, name: str, metadata=None) -> Output:
    """All tensors, whole, matrices as `type`."""
    tensors = checkpoint.tensors.values()
    infos = [(tensor.name, _type_of(tensor.shape, type), tensor.shape) for tensor in tensors]
    file_type = gguf.FILE_TYPES[type]
    header, offsets, size = gguf.header(
        checkpoint.config, checkpoint.vocabulary, infos, file_type, name, metadata
    )
    rows = []
    for tensor, (_, tensor_type, _), offset in zip(tensors, infos, offsets, strict=True):
        rows += _merged_rows(checkpoint.files, tensor, tensor_type, offset)
    return Output(path, size, [(0, header)], rows)


def _merged_rows(files: list[Path], tensor: Tensor, type: str, offset: int) -> list[Rows]:
    """The parts of a tensor side by side (cut by columns) or one below the other (cut by rows)."""
    sources = [
        Source(file, _file_offset(part), tensor.type, part.shape[-1])
        for file, part in zip(files, tensor.parts, strict=False)  # of a vector there is but the first part
    ]
    if tensor.split == 1:
        return [Rows(tensor.name, tuple(sources), _n_rows(tensor.shape), type, offset)]
    rows = []
    for source, part in zip(sources, tensor.parts, strict=True):
        rows.append(Rows(tensor.name, (source,), _n_rows(part.shape), type, offset))
        offset += rows[-1].nbytes
    return rows


def _file_offset(array: np.ndarray) -> int:
    """Where in its mapped file an array begins."""
    mapped = array.base
    while isinstance(mapped, np.ndarray):
        mapped = mapped.base
    return array.ctypes.data - np.frombuffer(mapped, np.uint8).ctypes.data


# --- both -----------------------------------------------------------------------------------------


def _n_rows(shape: tuple[int, ...]) -> int:
    return shape[0] if len(shape) == 2 else 1


def _type_of(shape: tuple[int, ...], type: str) -> str:
    """Vectors are f32 always: they are small, and everything is multiplied by them."""
    return type if len(shape) == 2 else "f32"


def _check_vocab_size(checkpoint: Checkpoint, n_tokens: int) -> None:
    if n_tokens != checkpoint.config.vocab_size:
        raise TinyllamaError(
            f"{checkpoint.vocabulary.model} has {n_tokens} tokens, "
            f"but {checkpoint.files[0]} embeds {checkpoint.config.vocab_size}: it is another model's"
        )


def _check_can_quantize(file: Path, name: str, type: str, shape: tuple[int, ...]) -> None:
    if TYPES[type].block > 1:
        raise TinyllamaError(f"{file} is quantized already ({name} is {type}): start from an f16 file")
    if len(shape) == 2 and shape[1] % BLOCK:
        raise TinyllamaError(
            f"{file}: rows of {name}, {shape[1]} weights, don't divide into blocks of {BLOCK}"
        )


def _checksums(folder: Path, files: list[Path]) -> Callable[[threading.Event], None] | None:
    """A check of the parts against Meta's checklist.chk, which gives up when an event is set."""
    expected = {file: md5 for file in files if (md5 := meta.read_checklist(folder).get(file.name))}

    def check(give_up: threading.Event) -> None:
        with ThreadPoolExecutor(N_THREADS) as pool:  # a sum is one thread's work, 20 s for 13 GB
            sums = pool.map(partial(_md5, give_up=give_up), expected)
            wrong = [file for file, md5 in zip(expected, sums, strict=True) if md5 != expected[file]]
        if wrong and not give_up.is_set():
            raise TinyllamaError(
                f"{wrong[0]} is damaged: its md5 isn't the one in checklist.chk; download it again"
            )

    return check if expected else None


def _md5(file: Path, give_up: threading.Event) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with blamed(file), file.open("rb", buffering=0) as opened:
        while not give_up.is_set() and (chunk := opened.read(CHUNK)):
            digest.update(chunk)
    return digest.hexdigest()
