"""A checkpoint cut into parts: Meta cut LLaMA for several GPUs, 13B in two, 30B in four, 65B in eight.

Every part names every tensor and holds its share of it:

| Cut                | Tensors                                | Share of one part           |
|--------------------|----------------------------------------|-----------------------------|
| by rows            | wq wk wv w1 w3 output                  | `[n_out / n_parts, n_in]`   |
| by columns         | tok_embeddings wo w2                   | `[n_out, n_in / n_parts]`   |
| not at all         | attention_norm ffn_norm norm           | `[dim]`, the same in each   |

Llama 3 cuts tok_embeddings by rows, `[vocab_size / n_parts, dim]`; their shape tells.

A GPU that holds some rows of w1 and w3 and the same columns of w2 computes its share of the whole
feed-forward layer alone; only then are the shares added up. So it is with wq, wk, wv and wo.

The ggml files of March 2023 keep the cut. A part is a dict, Meta's name -> Piece, in the file's order; here
the shares of a tensor become one Tensor again.
"""

from collections.abc import Sequence

from ..config import EMBEDDING, OUTPUT, Config
from ..errors import naming, require
from ..tensor import Piece, Tensor

Part = dict[str, Piece]

MOST_PARTS = 100  # consolidated.00.pth to .99; Meta cut into 8
QUERIES = "layers.0.attention.wq.weight"
CUT_BY_COLUMNS = (EMBEDDING, "attention.wo.weight", "feed_forward.w2.weight")


def axis_of(name: str, like_llama_3: bool = False) -> int:
    """The axis of [n_out, n_in] along which the parts of a tensor follow each other."""
    return 1 if name.endswith(CUT_BY_COLUMNS) and not (like_llama_3 and name == EMBEDDING) else 0


def share(name: str, shape: tuple[int, ...], n_parts: int, like_llama_3: bool = False) -> tuple[int, ...]:
    """The shape of one part of a tensor. Raises TinyllamaError where it doesn't divide."""
    if len(shape) == 1:
        return shape
    axis = axis_of(name, like_llama_3)
    require(shape[axis] % n_parts == 0, f"{name} {list(shape)} doesn't divide into {n_parts} parts")
    return tuple(n // n_parts if i == axis else n for i, n in enumerate(shape))


def check_shape(shape: Sequence[int]) -> None:
    """Raises TinyllamaError where a tensor's axes aren't those of a weight or vector."""
    good = len(shape) in (1, 2) and min(shape) > 0
    require(good, f"has the shape {list(shape)}; one or two positive axes can be read")


def count_parts(part: Part, config: Config) -> int:
    """How many parts make a whole: tok_embeddings is cut by columns, and `dim` of them are needed.

    Where all are there, that is Llama 3's cut, or none: then `q_dim` rows of wq are needed.
    """
    require(EMBEDDING in part, f"the tensor {EMBEDDING} is missing: this is no LLaMA")
    shape = part[EMBEDDING].shape
    fits = len(shape) == 2 and config.dim % shape[1] == 0
    require(fits, f"{EMBEDDING} is {list(shape)}, no share of dim {config.dim}")
    n_parts = config.dim // shape[1]
    if n_parts == 1 and QUERIES in part:
        n_parts = max(config.q_dim // part[QUERIES].shape[0], 1)
    require(n_parts <= MOST_PARTS, f"would be one of {n_parts} parts: it is damaged")
    return n_parts


def merge(parts: list[Part], config: Config) -> dict[str, Tensor]:
    """The shares of all parts as whole tensors, in the order of the first part; nothing is copied.

    Raises TinyllamaError, naming a part's file, where it doesn't hold its share of every tensor, of the
    same type as the first part, and nothing else.
    """
    shapes, n_parts = config.tensor_shapes(), len(parts)
    if OUTPUT not in parts[0]:  # it is the embedding
        del shapes[OUTPUT]
    like_llama_3 = n_parts > 1 and parts[0][EMBEDDING].shape[1] == config.dim
    for part in parts:
        with naming(next(iter(part.values())).data.path):
            for name, shape in shapes.items():
                require(name in part, f"the tensor {name} is missing")
                found, expected = part[name].shape, share(name, shape, n_parts, like_llama_3)
                require(found == expected, f"{name} has the shape {list(found)}, not {list(expected)}")
                type, first = part[name].type, parts[0][name].type
                require(type == first, f"{name} is {type} here and {first} in the first part")
            for name in part:
                require(name in shapes, f"no LLaMA of this size has the tensor {name}")
    merged = {}
    for name in parts[0]:
        pieces = tuple(part[name] for part in (parts[:1] if len(shapes[name]) == 1 else parts))
        merged[name] = Tensor(name, shapes[name], pieces, axis_of(name, like_llama_3))
    return merged
