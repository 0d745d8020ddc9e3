"""What running a model takes of memory; it is reckoned, and refused where it isn't there, before it is taken.

The figures are upper bounds beside the 50 MB of Python and NumPy: docs/robustness.md holds them against what
is really used.
"""

import math
import warnings
from pathlib import Path

from .machine import limits as resources
from .blocks import TYPES
from .config import Config
from .formats import Checkpoint
from .model import tap_shapes
from .machine.limits import human, require_memory

#: The NumPy backends dequantize a model once, when it is loaded, if its float32 weights take fewer bytes.
UNPACK_BELOW = 2 * 2**30
PIECE = 700  # bytes that a tokenizer keeps for each of its pieces
SCORED = 3000  # bytes of a `generation.Token` with what was likely in its place


def default_ctx_size(config: Config) -> int:
    """Tokens that a run has room for if nobody says: 2048, or what the model was trained on if less."""
    return min(config.max_seq_len, 2048)


def stays_in_file(checkpoint: Checkpoint, backend: str, mmap: bool = False) -> bool:
    """Whether a backend runs from the mapped file, whose pages the system can drop and read again."""
    return mmap or (backend != "c" and _float32_bytes(checkpoint) >= UNPACK_BELOW)


def _float32_bytes(checkpoint: Checkpoint) -> int:
    return 4 * sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())


def memory_needed(
    checkpoint: Checkpoint, backend: str, ctx_size: int, batch_size: int = 512, mmap: bool = False
) -> dict[str, int]:
    """Bytes that running a model takes: {"weights", "kv_cache", "activations", "tokenizer"}.

    Weights that stay in their file count too: without as much page cache every token reads the disk.
    """
    config = checkpoint.config
    return {
        "weights": _weights_bytes(checkpoint, backend, mmap),
        "kv_cache": cache_bytes(config, backend, ctx_size),
        "activations": activation_bytes(config, backend, min(batch_size, ctx_size), ctx_size),
        "tokenizer": PIECE * config.vocab_size,
    }


def _weights_bytes(checkpoint: Checkpoint, backend: str, mmap: bool) -> int:
    if stays_in_file(checkpoint, backend, mmap):
        return sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    if backend != "c":
        return _float32_bytes(checkpoint)
    from .backends.native import PREPARED

    tensors = checkpoint.tensors.values()
    return sum(TYPES[PREPARED.get(tensor.type, tensor.type)].nbytes(tensor.shape) for tensor in tensors)


def cache_bytes(config: Config, backend: str, n_ctx: int) -> int:
    """Bytes of a KV cache; the C backend keeps it in half precision."""
    return (2 if backend == "c" else 4) * 2 * config.n_layers * config.kv_dim * n_ctx


def activation_bytes(
    config: Config, backend: str, n_tokens: int, n_past: int, n_logits: int = 1, tapped: bool = False
) -> int:
    """Bytes of what `model.forward` computes on the way when n_tokens run at once, the last at n_past.

    In C the attention's scores are never all there, unless a tap looks at them.
    """
    wide = 3 * config.hidden_dim + 6 * config.dim
    scores = 0 if backend == "c" and not tapped else (3 * config.n_heads + 4) * n_past
    return 4 * (n_tokens * (wide + scores) + n_logits * config.vocab_size)


def check_load(path: Path, needed: dict[str, int], in_file: bool) -> None:
    """Refuse to load a model whose `memory_needed` isn't there; of weights that stay in their file, warn."""
    total, free = sum(needed.values()), resources.available_memory()
    require_memory(total - in_file * needed["weights"], str(path))
    if total > free:
        weights, free = human(needed["weights"]), human(free)
        message = f"{path}: {weights} of weights and {free} of free memory: every token will read the disk"
        warnings.warn(message, stacklevel=3)


def check_run(
    config: Config, backend: str, n_ctx: int, at_once: int, n_logits: int = 1, n_scored: int = 0
) -> None:
    """Refuse a run whose KV cache, or that and what is computed of `at_once` tokens, doesn't fit.

    Args:
        n_logits: of how many tokens the logits are there together.
        n_scored: of how many tokens what was likely is kept.
    Raises:
        TinyllamaError: names the context and the memory that is needed and that is free.
    """
    cache = cache_bytes(config, backend, n_ctx)
    computed = activation_bytes(config, backend, at_once, n_ctx, n_logits) + SCORED * n_scored
    if cache + computed > resources.available_memory():  # which is slow to find out: once where all is well
        require_memory(cache, f"a context of {n_ctx} tokens")
        require_memory(cache + computed, f"a context of {n_ctx} tokens, {at_once} of them computed at once,")


def check_trace(config: Config, backend: str, n_tokens: int, names: list[str]) -> None:
    """Refuse to keep the values of these names of `model.tap_shapes` where they don't fit."""
    check_run(config, backend, n_tokens, n_tokens, n_tokens)
    kept = 4 * sum(math.prod(shape) for name, shape in tap_shapes(config, n_tokens).items() if name in names)
    needed = cache_bytes(config, backend, n_tokens) + kept
    needed += activation_bytes(config, backend, n_tokens, n_tokens, n_tokens, tapped=True)
    require_memory(needed, f"keeping {len(names)} kinds of values of {n_tokens} tokens")


def announcement(path: Path, needed: dict[str, int]) -> str:
    """What loading a model will take, in a line."""
    total, weights, cache = (human(n) for n in (sum(needed.values()), needed["weights"], needed["kv_cache"]))
    seconds = max(1, round(needed["weights"] / 2e9))  # dequantizing, or reading a fast disk
    return f"loading {path}: up to {total} of memory ({weights} weights, {cache} KV cache), about {seconds} s"


def announcement_of_mapping(path: Path, needed: dict[str, int]) -> str:
    """The same where the weights stay in their file."""
    weights, rest = human(needed["weights"]), human(sum(needed.values()) - needed["weights"])
    return (
        f"loading {path}: {weights} of weights stay in the file, up to {rest} of memory beside them; "
        "it starts at once, and a token takes about twice as long as without --mmap"
    )
