"""GGUF's strings, numbers and key-values: their bytes, both ways. gguf.py says where in a file they are.

All numbers are little-endian. A string is a u64 length and that many bytes of UTF-8. A key-value is a string
key, a u32 type and the value; the types are 0 u8, 1 i8, 2 u16, 3 i16, 4 u32, 5 i32, 6 f32, 7 bool (a byte),
8 string, 9 array, 10 u64, 11 i64, 12 f64. An array is the u32 type of its elements, their u64 number, and the
elements; like ggml's own reader this one takes no arrays of arrays.
"""

import math
import mmap
import struct

from ..errors import TinyllamaError

U32, I32, F32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9

# Several times what any model has; a file that claims more is damaged, or wants the reader's memory.
LARGEST_HEADER = 3 << 23  # bytes before the data
LONGEST_STRING = 1 << 20  # bytes; a template of a chat has thousands
LONGEST_NAME = 1 << 8  # bytes of a key's or tensor's name; ggml's have at most 64
LARGEST_ARRAYS = 160_000_000  # bytes that the elements of all arrays take as Python's objects
NUMBER_BYTES, STRING_BYTES = 40, 72  # such an element with its place in a list; a short string
MOST_KEYS = MOST_TENSORS = 1 << 14
LARGEST_ALIGNMENT = 1 << 16  # bytes; so many are written between header and data

#: Type -> format code of the struct module.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", 10: "Q", 11: "q", 12: "d"}


class Metadata(dict):
    """Key-values as plain Python values that remember their GGUF types, so that writing them loses nothing.

    `types[key]` is the number of a value's type, or of its elements' type where the value is a list.
    """

    def __init__(self, values=(), types: dict[str, int] | None = None):
        super().__init__(values)
        self.types = dict(types or {})

    def copy(self) -> "Metadata":
        """Another one that can be changed without changing this one."""
        return Metadata(self, self.types)

    def set(self, key: str, value, kind: int) -> None:
        """Give a key a value of a type (a list: of elements of this type)."""
        self[key], self.types[key] = value, kind

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number. Raises TinyllamaError if it isn't one, or is missing and has no default."""
        return self._positive(key, default, float, "number")

    def count(self, key: str, default: int | None = None) -> int:
        """A positive whole number; raises as `number` does."""
        return self._positive(key, default, int, "whole number")

    def _positive(self, key: str, default, kind: type, what: str):
        value = self.get(key, default)
        if value is None:
            raise TinyllamaError(f"the key {key} is missing")
        if type(value) is not kind or not 0 < value < math.inf:
            raise TinyllamaError(f"the key {key} must be a positive {what}, not {shown(value)}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """Yes or no. Raises TinyllamaError if it is something else."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise TinyllamaError(f"the key {key} must be true or false, not {shown(value)}")
        return value

    def text(self, key: str, default: str = "") -> str:
        """A string. Raises TinyllamaError if it is something else."""
        value = self.get(key, default)
        if not isinstance(value, str):
            raise TinyllamaError(f"the key {key} must be a string, not {shown(value)}")
        return value

    def alignment(self) -> int:
        """What the offsets of tensors are multiples of, in bytes."""
        alignment = self.count("general.alignment", 32)
        if alignment & (alignment - 1):
            raise TinyllamaError(f"general.alignment is {alignment}, not a power of two")
        if alignment > LARGEST_ALIGNMENT:
            raise TinyllamaError(
                f"general.alignment is {alignment}: more than {LARGEST_ALIGNMENT} can't be right"
            )
        return alignment


def shown(value: object) -> str:
    """A value for an error message."""
    return f"an array of {len(value)}" if isinstance(value, list) else repr(value)[:40]


# --- reading --------------------------------------------------------------------------------------


class Cursor:
    """Takes values from a mapped file one after the other and never reads past its end."""

    def __init__(self, data: mmap.mmap):
        self.data, self.size, self.offset, self._arrays = data, len(data), 0, 0

    def skip(self, n_bytes: int, what: str) -> int:
        """Where the next n_bytes start. Raises TinyllamaError if the file hasn't that many."""
        start = self.offset
        if n_bytes > self.size - start:
            raise TinyllamaError(
                f"truncated or damaged: {what} at offset {start} takes {n_bytes} bytes, "
                f"but the file ends at {self.size}"
            )
        if start + n_bytes > LARGEST_HEADER:
            raise TinyllamaError(
                f"damaged: with {what} at offset {start} its header takes {start + n_bytes} bytes"
            )
        self.offset = start + n_bytes
        return start

    def numbers(self, codes: str, what: str) -> tuple:
        """A few values, by their format codes."""
        return struct.unpack_from("<" + codes, self.data, self.skip(struct.calcsize("<" + codes), what))

    def array(self, code: str, count: int, what: str) -> list:
        """Many values of one format code."""
        self._require(count * NUMBER_BYTES, count, what)
        start = self.skip(count * struct.calcsize("<" + code), what)
        return list(struct.unpack_from(f"<{count}{code}", self.data, start))

    def string(self, what: str) -> str:
        """One string."""
        return self.strings(1, what)[0]

    def name(self, what: str) -> str:
        """A short string."""
        return self.strings(1, what, LONGEST_NAME)[0]

    def strings(self, count: int, what: str, longest: int = LONGEST_STRING) -> list[str]:
        """Many strings, in one tight loop because vocabularies are long: 100,000 take 0.04 s."""
        self._require(count * STRING_BYTES, count, what)
        start, size = self.skip(8 * count, what), min(self.size, LARGEST_HEADER)
        data, last, unpack, strings = self.data, size - 8, struct.Struct("<Q").unpack_from, []
        try:
            for _ in range(count):
                text = start + 8
                end = text + (unpack(data, start)[0] if start <= last else 8)
                if end > size or end - text > longest:
                    self._refuse_string(start, end, f"string {len(strings)} of {what}", longest)
                strings.append(data[text:end].decode())
                start = end
        except UnicodeDecodeError:
            raise TinyllamaError(f"string {len(strings)} of {what} at offset {start} isn't UTF-8") from None
        self.offset = start
        return strings

    def _require(self, n_bytes: int, count: int, what: str) -> None:
        self._arrays += n_bytes
        if self._arrays > LARGEST_ARRAYS:
            raise TinyllamaError(
                f"truncated or damaged: {what} at offset {self.offset} has {count} elements: too many"
            )

    def _refuse_string(self, start: int, end: int, what: str, longest: int) -> None:
        if end <= self.size and end - start - 8 > longest:
            raise TinyllamaError(f"damaged: {what} at offset {start} has {end - start - 8} bytes")
        self.offset = start
        self.skip(end - start, what)


def read_metadata(cursor: Cursor, n_keys: int) -> Metadata:
    """Read n_keys key-values. Raises TinyllamaError naming the key that is wrong."""
    metadata = Metadata()
    for index in range(n_keys):
        key = cursor.name(f"key {index} of {n_keys}")
        if key in metadata:
            raise TinyllamaError(f"the key {key} is there twice")
        (kind,) = cursor.numbers("I", f"the type of the key {key}")
        metadata.set(key, *_read_value(cursor, key, kind))
    return metadata


def _read_value(cursor: Cursor, key: str, kind: int) -> tuple[object, int]:
    """A value, and its type or that of its elements."""
    what = f"the key {key}"
    if kind == ARRAY:
        kind, count = cursor.numbers("IQ", what)
        if kind == STRING:
            return cursor.strings(count, what), kind
        if kind in NUMBERS:
            return cursor.array(NUMBERS[kind], count, what), kind
    elif kind == STRING:
        return cursor.string(what), kind
    elif kind in NUMBERS:
        return cursor.numbers(NUMBERS[kind], what)[0], kind
    raise TinyllamaError(f"the key {key} has values of type {kind}, which isn't supported")


# --- writing --------------------------------------------------------------------------------------


def pack_metadata(metadata: Metadata) -> bytes:
    """All key-values as a file holds them. A value without a type gets the usual one of its Python type."""
    return b"".join(_pack_key_value(key, value, metadata.types.get(key)) for key, value in metadata.items())


def _pack_key_value(key: str, value, kind: int | None) -> bytes:
    if kind is None:
        kind = {bool: BOOL, int: U32, float: F32, str: STRING}[type(value)]
    if not isinstance(value, list):
        return pack_string(key) + struct.pack("<I", kind) + _pack_values([value], kind)
    return pack_string(key) + struct.pack("<IIQ", ARRAY, kind, len(value)) + _pack_values(value, kind)


def _pack_values(values: list, kind: int) -> bytes:
    if kind == STRING:
        return b"".join(map(pack_string, values))
    return struct.pack(f"<{len(values)}{NUMBERS[kind]}", *values)


def pack_string(text: str) -> bytes:
    """A string as a file holds it."""
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
