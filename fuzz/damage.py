"""Nearly valid inputs: a file as a list of fields, some of which are damaged.

A field is bytes, or a Number as the struct module packs it. What a builder of a format calls a length or an
offset is a Number here, so that damage hits where a reader believes what it is told.
"""

import struct
from dataclasses import dataclass

from hypothesis import strategies as st


@dataclass(frozen=True)
class Number:
    """An integer (or with the codes f and d, a float) in a file; it wraps around like C's."""

    code: str
    value: int | float

    def pack(self) -> bytes:
        if self.code in "fd":
            return struct.pack(f"<{self.code}", self.value)
        bits = 8 * struct.calcsize(f"<{self.code}")
        return (int(self.value) % (1 << bits)).to_bytes(bits // 8, "little")


Field = bytes | Number


def pack(fields: list[Field]) -> bytes:
    """The file."""
    return b"".join(field if isinstance(field, bytes) else field.pack() for field in fields)


def numbers(code: str, near: int = 0) -> st.SearchStrategy[Number]:
    """Numbers that readers stumble over: limits of types, neighbours, what overflows in a product."""
    if code in "fd":
        odd = [0.0, -0.0, -1.0, 1e-45, 3e38, float("inf"), float("-inf"), float("nan")]
        return st.sampled_from(odd).map(lambda value: Number(code, value))
    top = 1 << 8 * struct.calcsize(f"<{code}")
    odd = [0, 1, 2, 3, near - 1, near + 1, near * 2, near // 2, 255, 65536, top - 1, top - 8, top // 2]
    odd += [top // 2 - 1, top // 32, top // 64 + 1, (1 << 32) // 34, near - 32, near + 32]
    return (st.sampled_from(odd) | st.integers(0, top - 1)).map(lambda value: Number(code, value))


@st.composite
def damaged(draw, fields: list[Field], most: int = 3) -> bytes:
    """The file of these fields with at most so many of them damaged, often none."""
    fields = list(fields)
    for _ in range(draw(st.integers(0, most))):
        if fields:
            draw(st.sampled_from(_DAMAGES))(draw, fields)
    return pack(fields)


@st.composite
def odd_tensors(draw, shapes: dict[str, tuple[int, ...]]) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a model's tensors, one of them lost, there twice, renamed or of another shape."""
    tensors = list(shapes.items())
    place = draw(st.integers(0, len(tensors) - 1))
    name, shape = tensors[place]
    shapes = [shape[::-1], shape[:1], (*shape, 1), (shape[0] * 2, *shape[1:]), (shape[0] + 1, *shape[1:])]
    shapes += [(*shape[:-1], shape[-1] * 2), (0, *shape[1:])]
    one = st.sampled_from(
        [[(name + "x", shape)], [("", shape)], [tensors[0]], *([(name, s)] for s in shapes)]
    )
    tensors[place : place + 1] = draw(st.just([]) | st.just([tensors[place]] * 2) | one)
    return tensors


def _change_number(draw, fields: list[Field]) -> None:
    places = [place for place, field in enumerate(fields) if isinstance(field, Number)]
    if places:
        place = draw(st.sampled_from(places))
        near = fields[place].value if fields[place].code not in "fd" else 0
        fields[place] = draw(numbers(fields[place].code, near))


def _change_bytes(draw, fields: list[Field]) -> None:
    places = [place for place, field in enumerate(fields) if isinstance(field, bytes) and field]
    if places:
        place = draw(st.sampled_from(places))
        start = draw(st.integers(0, len(fields[place]) - 1))
        new = draw(st.binary(max_size=8))
        keep = len(new) if draw(st.booleans()) else draw(st.integers(0, 8))  # the same length, or another
        fields[place] = fields[place][:start] + new + fields[place][start + keep :]


def _drop(draw, fields: list[Field]) -> None:
    start, stop = _run(draw, fields)
    del fields[start:stop]


def _repeat(draw, fields: list[Field]) -> None:
    start, stop = _run(draw, fields)
    fields[stop:stop] = fields[start:stop] * draw(st.integers(1, 3))


def _move(draw, fields: list[Field]) -> None:
    start, stop = _run(draw, fields)
    run = fields[start:stop]
    del fields[start:stop]
    place = draw(st.integers(0, len(fields)))
    fields[place:place] = run


def _cut(draw, fields: list[Field]) -> None:
    del fields[draw(st.integers(0, len(fields))) :]


def _append(draw, fields: list[Field]) -> None:
    fields.append(draw(st.binary(min_size=1, max_size=64)))


def _run(draw, fields: list[Field]) -> tuple[int, int]:
    start = draw(st.integers(0, len(fields) - 1))
    return start, start + draw(st.integers(1, 8))


_DAMAGES = [_change_number, _change_number, _change_bytes, _drop, _repeat, _move, _cut, _append]
