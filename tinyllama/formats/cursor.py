"""Numbers and strings of a mapped file, one after the other, and none behind its end, whatever it claims."""

import struct

from ..errors import naming, require

# Types of values, and their format codes in the struct module.
U32, I32, F32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", 10: "Q", 11: "q", 12: "d"}

# Several times what any model has; a file that claims more is damaged, or wants the reader's memory.
LARGEST_HEADER = 3 << 23  # bytes before the data
LONGEST_STRING, LONGEST_NAME = 1 << 20, 1 << 8  # bytes of a value; of a key's or tensor's name
LARGEST_ARRAYS = 160_000_000  # bytes that the elements of all arrays take as Python's objects
NUMBER_BYTES, STRING_BYTES = 40, 72  # such an element with its place in a list; a short string


class Cursor:
    """Takes values from a mapped file (ggml's, too) one after the other.

    Whatever the file claims, nothing is read behind its end or behind `limit`, the largest header.
    """

    def __init__(self, data):
        self.data, self.size, self.offset, self.limit = data, len(data), 0, LARGEST_HEADER
        self._objects = 0  # bytes that Python's objects take

    def skip(self, n_bytes: int, what: str, longest: int = LARGEST_ARRAYS) -> int:
        """Where the next n_bytes start. Raises TinyllamaError where there can't be so many."""
        start = self.offset
        it = f"{what} at offset {start} takes {n_bytes} bytes"
        require(n_bytes <= self.size - start, f"{it}, but the file ends at {self.size}: truncated or damaged")
        require(start + n_bytes <= self.limit and n_bytes <= longest, f"{it}: too many, the file is damaged")
        self.offset += n_bytes
        return start

    def numbers(self, codes: str, what: str) -> tuple:
        """A few values, by their format codes."""
        return struct.unpack_from("<" + codes, self.data, self.skip(struct.calcsize("<" + codes), what))

    def texts(self, count: int, what: str, longest: int = LONGEST_STRING, code: str = "Q") -> list[bytes]:
        """Strings, each behind its length. A vocabulary has 100,000 of them, which is half of opening it."""
        length, data, texts = struct.Struct("<" + code), self.data, []
        read, width, end, start = length.unpack_from, length.size, min(self.size, self.limit), self.offset
        for index in range(count):
            text = start + width
            stop = text + (read(data, start)[0] if text <= end else 0)
            if stop > end or stop - text > longest:
                self.offset = start
                self.skip(stop - start, f"{what}, string {index}", longest)
            texts.append(data[text:stop])
            start = stop
        self.offset = start
        return texts

    def values(self, kind: int, count: int, what: str, longest: int = LONGEST_STRING) -> list:
        """Values of one type. Raises TinyllamaError, beginning with `what`."""
        self._objects += count * (STRING_BYTES if kind == STRING else NUMBER_BYTES)
        few = self._objects <= LARGEST_ARRAYS
        require(few, f"{what} at offset {self.offset} has {count} elements: too many, the file is damaged")
        if kind == STRING:
            with naming(what):
                return [*map(bytes.decode, self.texts(count, what, longest))]
        require(kind in NUMBERS, f"{what} has values of type {kind}, which isn't supported")
        return list(self.numbers(f"{count}{NUMBERS[kind]}", what))

    def name(self, what: str) -> str:
        """A short string."""
        return self.values(STRING, 1, what, LONGEST_NAME)[0]
