"""Files made to harm their reader: each a function that puts one into a folder, and words of its refusal.

The folder holds a good model in every format: `consolidated.00.pth` with params.json and tokenizer.model,
`f16.bin` (ggml), `spm.gguf` and `bpe.gguf`.
"""

import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

HUGE = 20 << 30  # bytes that a file has without taking any of the disk

CASES: dict[str, tuple] = {}


def case(name: str, file: str, *words: str):
    """Note a function that damages `file` in a folder, and may return what to read instead of it; `words` are
    in the one line that refuses it."""

    def note(damage):
        CASES[f"{file}: {name}"] = (file, damage, words)
        return damage

    return note


def patched(file: str, name: str, change, *words: str) -> None:
    """`change` makes other bytes of the file's."""
    case(name, file, *words)(lambda path: path.write_bytes(change(path.read_bytes())))


def huge(path: Path, head: bytes, tail: bytes = b"") -> None:
    """A file of 20 GB with nothing but holes between its head and its tail."""
    with path.open("wb") as file:
        file.write(head)
        file.truncate(HUGE)
        file.seek(HUGE - len(tail))
        file.write(tail)


# --- what isn't a file ----------------------------------------------------------------------------


def _replace(path: Path, make) -> None:
    path.unlink()
    make(path)


def _renamed(path: Path, name: str) -> Path:
    path.with_name(name).write_bytes(b"")
    return path.with_name(name)


for name in ("spm.gguf", "f16.bin", "consolidated.00.pth", "params.json"):
    case("a pipe", name, "a pipe or a device")(lambda path: _replace(path, os.mkfifo))
    case("a device", name, "a pipe or a device")(
        lambda path: _replace(path, lambda path: path.symlink_to("/dev/zero"))
    )
for name in ("spm.gguf", "f16.bin"):
    case("a link to itself", name, "no such file")(
        lambda path: _replace(path, lambda path: path.symlink_to(path.name))
    )
    case("empty", name, "is empty")(lambda path: path.write_bytes(b""))
    case("20 GB of zeros", name, "nothing but zeros")(lambda path: huge(path, b""))
    case("a name that steers terminals", name, r"\x1b]0;me\x07\nmodel: is empty")(
        lambda path: _renamed(path, "\x1b]0;me\x07\nmodel")
    )
case("a folder", "params.json", "is a folder, not a file")(lambda path: _replace(path, Path.mkdir))
case("a folder", "consolidated.00.pth", "is a folder, not a file")(lambda path: _replace(path, Path.mkdir))
case("a folder", "tokenizer.model", "is missing")(lambda path: _replace(path, Path.mkdir))
case("a pipe", "tokenizer.model", "missing")(lambda path: _replace(path, os.mkfifo))


# --- GGUF -----------------------------------------------------------------------------------------


def put(at: int, code: str, *values):
    """Other numbers at a byte."""
    packed = struct.pack("<" + code, *values)
    return lambda data: data[:at] + packed + data[at + len(packed) :]


def at_key(data: bytes, key: str) -> int:
    """Where the type of a key's value is, or the number of a tensor's axes."""
    return data.index(struct.pack("<Q", len(key)) + key.encode()) + 8 + len(key)


def keyed(key: str, offset: int, code: str, *values):
    """Other numbers so many bytes behind a key or tensor's name."""
    return lambda data: put(at_key(data, key) + offset, code, *values)(data)


def spm(name: str, change, *words: str) -> None:
    patched("spm.gguf", name, change, *words)


def value(key: str, name: str, code: str, number, *words: str, kind: int | None = None) -> None:
    """Another number as a key's value, of another type of the same size if that is given."""
    other = keyed(key, 4, code, number)
    spm(f"{key} {name}", (lambda d: keyed(key, 0, "I", kind)(other(d))) if kind else other, *words)


ATTENTION = "llama.attention"
for key, what in {
    "llama.block_count": "must be a positive whole number",
    "llama.embedding_length": "must be a positive whole number",
    "llama.feed_forward_length": "must be a positive whole number",
    "llama.context_length": "must be a positive whole number",
    f"{ATTENTION}.head_count": "must be a positive whole number",
    f"{ATTENTION}.head_count_kv": "must be a positive whole number",
}.items():
    value(key, "0", "I", 0, key, what)
    value(key, "-1", "i", -1, key, what, kind=5)
    value(key, "1e-45", "I", 1, key, what, kind=6)
value("llama.block_count", "2^32 - 1", "I", 2**32 - 1, "n_layers is 4294967295")
value("llama.embedding_length", "2^31", "I", 2**31, "dim is 2147483648")
value("llama.feed_forward_length", "2^31", "I", 2**31, "hidden_dim is 2147483648")
value(f"{ATTENTION}.head_count", "3", "I", 3, "64 doesn't divide into 3 heads")
value(f"{ATTENTION}.head_count", "64, of width 1", "I", 64, "heads of an even width")
value(f"{ATTENTION}.head_count_kv", "3", "I", 3, "4 heads can't share 3")
for number in (float("nan"), float("inf"), 0.0, -1e-6):
    for key in (f"{ATTENTION}.layer_norm_rms_epsilon", "llama.rope.freq_base"):
        value(key, f"{number}", "f", number, key, "must be a positive number")
value(f"{ATTENTION}.layer_norm_rms_epsilon", "as an integer", "I", 1, "norm_eps is 1", kind=4)
value(f"{ATTENTION}.layer_norm_rms_epsilon", "30", "f", 30.0, "norm_eps is 30")


def with_key(key: str, kind: int, packed: bytes):
    """One key more, before all others."""
    entry = struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + packed
    return lambda data: (
        data[:16] + struct.pack("<Q", struct.unpack_from("<Q", data, 16)[0] + 1) + entry + data[24:]
    )


def text(string: str) -> bytes:
    return struct.pack("<Q", len(string.encode())) + string.encode()


for number, words in {
    0: "positive whole number",
    3: "power of two",
    2**63: "not a power of two up to 65536",
    2**17: "131072",
}.items():
    spm(f"alignment {number}", with_key("general.alignment", 10, struct.pack("<Q", number)), words)
spm("alignment as text", with_key("general.alignment", 8, text("32")), "positive whole number, not '32'")
spm("add_bos as text", with_key("tokenizer.ggml.add_eos", 9, struct.pack("<IQ", 9, 1)), "type 9")
for key, kind, packed in (
    ("llama.attention.causal", 7, b"\0"),
    ("llama.use_parallel_residual", 7, b"\1"),
    ("llama.logit_scale", 6, struct.pack("<f", 4)),
    ("llama.attention.scale", 6, struct.pack("<f", 0.5)),
    ("llama.rope.scaling.type", 8, text("longrope")),
):
    spm(f"{key}, which changes what is computed", with_key(key, kind, packed), key, "isn't supported")
nested = struct.pack("<IQ", 9, 1) * 100_000
spm("arrays of arrays of arrays", with_key("nested", 9, nested), "the key nested has values of type 9")
spm("a type that isn't any", with_key("odd", 13, b""), "the key odd has values of type 13")
spm("a key that steers terminals", with_key("\x1b[2J\n", 13, b""), r"the key \x1b[2J\n has values")
spm("a long key", with_key("k" * 300, 4, bytes(4)), "takes 308 bytes")
spm(
    "a long string",
    with_key("chat", 8, struct.pack("<Q", 2_000_000) + b"c" * 2_000_000),
    "takes 2000008 bytes",
)
spm(
    "an architecture that steers terminals",
    lambda data: data.replace(text("llama"), text("\x1b[2J\n"), 1),
    r"architecture '\x1b[2J\n'",
)
spm("2^40 tensors", put(8, "Q", 2**40), "can't be in a file of")
spm("2^63 keys", put(16, "Q", 2**63), "can't be in a file of")
spm("20,000 tensors", lambda data: put(8, "Q", 20_000)(data) + bytes(1 << 20), "20000 tensors")
NORM = "output_norm.weight"
spm("2^32 - 1 axes", keyed(NORM, 0, "I", 2**32 - 1), "output_norm.weight has 4294967295 axes")
spm("an axis of 0", keyed(NORM, 4, "Q", 0), "output_norm.weight is [0]")
spm("an axis of 2^63", keyed(NORM, 4, "Q", 2**63), "output_norm.weight is [9223372036854775808]")
spm(
    "axes whose product is 2^64",
    keyed("output.weight", 4, "QQ", 2**32, 2**32),
    "output.weight is [4294967296,",
)
spm("a negative axis", keyed("output.weight", 4, "q", -64), "output.weight is [400, 18446744073709551552]")
spm("an offset near 2^64", keyed(NORM, 16, "Q", 2**64 - 32), "should begin at")
spm(
    "an offset that isn't aligned",
    keyed(NORM, 16, "Q", 1),
    "output_norm.weight at offset 10657 should begin at",
)
spm("two tensors in one place", keyed(NORM, 16, "Q", 0), "should begin at")
spm("a norm of half its bytes", keyed(NORM, 12, "I", 1), "should begin at")
spm("a norm of blocks", keyed(NORM, 12, "I", 2), "can't be of type q4_0")
spm(
    "a name of 2^40 bytes",
    lambda data: put(at_key(data, NORM) - 26, "Q", 2**40)(data),
    "takes 1099511627784 bytes",
)
spm(
    "a tensor that steers terminals",
    lambda data: keyed(NORM, 0, "I", 9)(data).replace(b"output_norm.weight", b"outpu_\x1b[2J\n.weight"),
    r"the tensor outpu_\x1b[2J\n.weight has 9 axes",
)
SCORES, TYPES, TOKENS = (f"tokenizer.ggml.{name}" for name in ("scores", "token_type", "tokens"))
spm("a score of NaN", keyed(SCORES, 16 + 4 * 300, "f", float("nan")), "score")
spm("a score of infinity", keyed(SCORES, 16 + 4 * 300, "f", float("inf")), "score")
spm("a byte that is no byte", keyed(TYPES, 16 + 4 * 300, "i", 6), "byte pieces")
spm("a piece twice", lambda data: data.replace(b"<0x41>", b"<0x42>"), "are the same piece")
spm("a piece that isn't UTF-8", lambda data: data.replace(b"<0x41>", b"<0x4\xff>"), "can't decode byte 0xff")
for key in (SCORES, TYPES, TOKENS):
    spm(f"2^62 {key}", keyed(key, 8, "Q", 2**62), key, "elements")
patched(
    "bpe.gguf",
    "merges of what isn't a piece",
    lambda data: (
        data[: at_key(data, "tokenizer.ggml.merges") + 24]
        + b"\x7f\x7f"
        + data[at_key(data, "tokenizer.ggml.merges") + 26 :]
    ),
    "the merge",
)


def gguf_head(*keys: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, 1, len(keys)) + b"".join(keys)


def array(kind: int, count: int) -> bytes:
    return text("k") + struct.pack("<IIQ", 9, kind, count)


HEADS = {
    "2^33 keys": (b"GGUF" + struct.pack("<IQQ", 3, 1, 2**30), "key-values can't be in"),
    "2^28 tensors": (b"GGUF" + struct.pack("<IQQ", 3, 2**28, 1), "tensors and 1 key-values can't be in"),
    "a key of 10 GB": (gguf_head(struct.pack("<Q", 10**10)), "takes 10000000008 bytes"),
    "a string of 10 GB": (gguf_head(text("k") + struct.pack("<IQ", 8, 10**10)), "takes 10000000008 bytes"),
    "a string of 20 MB": (gguf_head(text("k") + struct.pack("<IQ", 8, 20 << 20)), "takes 20971528 bytes"),
    "an array of 10 GB": (gguf_head(array(0, 10**10)), "10000000000 elements"),
    "an array of 2 G doubles": (gguf_head(array(12, 2**31)), "2147483648 elements"),
    "an array of 10^9 strings": (gguf_head(array(8, 10**9)), "1000000000 elements"),
    "an array of 2 M strings": (gguf_head(array(8, 2 << 20)), "the tensor has 0 axes"),
    "strings as long as can be": (
        gguf_head(array(8, 1_100_000)) + (struct.pack("<Q", 14) + "abcdefghij🦙".encode()) * 1_100_000,
        "the tensor has 0 axes",
    ),
    "16384 empty keys": (b"GGUF" + struct.pack("<IQQ", 3, 1, 1 << 14), "key is there twice"),
    "nothing behind the keys": (b"GGUF" + struct.pack("<IQQ", 3, 1 << 14, 0), "tensor has 0 axes"),
}
for name, (head, words) in HEADS.items():
    case(f"20 GB, {name}", "spm.gguf", words)(lambda path, head=head: huge(path, head))


# --- ggml -----------------------------------------------------------------------------------------


def ggml_head(vocab_size=400, dim=64, multiple_of=32, n_heads=4, n_layers=2, head_dim=16, ftype=1) -> bytes:
    return struct.pack("<8i", 0x67676D6C, vocab_size, dim, multiple_of, n_heads, n_layers, head_dim, ftype)


GGML_HEADS = {
    "2^31 - 1 tokens": (ggml_head(2**31 - 1), "vocab_size is 2147483647"),
    "2^20 empty tokens": (ggml_head(1 << 20), "no tensor begins at byte 4,194,336"),
    "2^31 - 1 layers": (ggml_head(n_layers=2**31 - 1), "n_layers is 2147483647"),
    "dim 2^31 - 2": (ggml_head(dim=2**31 - 2, head_dim=(2**31 - 2) // 4), "dim is 2147483646"),
    "heads 2^31 - 1": (ggml_head(n_heads=2**31 - 1, head_dim=0), "doesn't divide into 2147483647 heads"),
    "multiple_of 2^31 - 1": (ggml_head(multiple_of=2**31 - 1), "hidden_dim is 2147483647"),
    "a token of 2^31 - 1 bytes": (ggml_head() + struct.pack("<i", 2**31 - 1), "string 0 at offset 32 takes"),
    "tokens of 60,000 bytes": (
        ggml_head(2000) + (struct.pack("<i", 60_000) + bytes(60_000)) * 1200,
        "too many, the file is damaged",
    ),
}
for name, (head, words) in GGML_HEADS.items():
    case(f"20 GB, {name}", "f16.bin", words)(lambda path, head=head: huge(path, head))


def tensors_start(data: bytes) -> int:
    at = 32
    for _ in range(400):
        at += 4 + struct.unpack_from("<i", data, at)[0]
    return at


def ggml(name: str, change, *words: str) -> None:
    patched("f16.bin", name, change, *words)


def first_tensor(offset: int, code: str, *values):
    return lambda data: put(tensors_start(data) + offset, code, *values)(data)


ggml("another type in the header", put(28, "i", 0), "isn't of the type that the header names")
ggml("n_rot that isn't dim / n_heads", put(24, "i", 8), "contradict each other")


def norm_in_blocks(number: int, n_bytes: int):
    """The last norm, of 64 numbers of 4 bytes, as blocks of another type, and the file is whole."""
    name = b"norm.weight"
    old = struct.pack("<4i", 1, len(name), 0, 64) + name
    new = struct.pack("<4i", 1, len(name), number, 64) + name + bytes(n_bytes)
    return lambda data: data[: data.index(old)] + new + data[data.index(old) + len(old) + 4 * 64 :]


ggml("a norm in blocks of q4_0", norm_in_blocks(2, 40), "'norm.weight' has the shape [64] and the type q4_0")
ggml("a norm in blocks of q4_1", norm_in_blocks(3, 48), "'norm.weight' has the shape [64] and the type q4_1")
ggml("an axis of 0", first_tensor(12, "i", 0), "has the shape [400, 0]")
ggml("a negative axis", first_tensor(12, "i", -64), "has the shape [400, -64]")
ggml(
    "axes of 2^31 - 1",
    first_tensor(12, "ii", 2**31 - 1, 2**31 - 1),
    "tok_embeddings.weight at offset",
    "but the file ends at",
)
ggml("a tensor that steers terminals", first_tensor(20, "5s", b"\x1b[2J\n"), r"'\x1b[2J\n", "has the shape")
ggml("a name of 2^31 - 1 bytes", first_tensor(4, "i", 2**31 - 1), "a name of 2147483647 bytes")


@case("131,072 parts", "f16.bin", "would be one of 131072 parts")
def many_parts(path: Path) -> None:
    head = ggml_head(1, 2**17, 1, 2**10, 1, 2**7) + struct.pack("<i", 0)
    tensors = [("tok_embeddings.weight", (1, 1)), ("norm.weight", (2**17,)), ("output.weight", (1, 2**17))]
    layer = {"attention_norm": (2**17,), "ffn_norm": (2**17,), "attention.wo": (2**17, 1)}
    layer |= {f"attention.{w}": (1, 2**17) for w in ("wq", "wk", "wv")}
    layer |= {"feed_forward.w1": (2, 2**17), "feed_forward.w3": (2, 2**17), "feed_forward.w2": (2**17, 2)}
    tensors += [(f"layers.0.{name}.weight", shape) for name, shape in layer.items()]
    with path.open("wb") as file:
        file.write(head)
        for name, shape in tensors:
            numbers = (len(shape), len(name), int(len(shape) == 2), *shape[::-1])
            n_bytes = 4 * shape[0] if len(shape) == 1 else 2 * shape[0] * shape[1]
            file.write(struct.pack(f"<{len(numbers)}i", *numbers) + name.encode())
            file.seek(n_bytes, os.SEEK_CUR)
        file.truncate()


# --- .pth -----------------------------------------------------------------------------------------


def rezip(change_pickle=None, change=lambda members: members):
    """Write the archive again with another pickle, or other (name, data) members."""

    def damage(path: Path) -> None:
        with zipfile.ZipFile(path) as archive:
            members = [(name, archive.read(name)) for name in archive.namelist()]
        if change_pickle:
            members = [(n, change_pickle(d) if n.endswith(".pkl") else d) for n, d in members]
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in change(members):
                archive.writestr(name, data)

    return damage


def pth(name: str, damage, *words: str) -> None:
    case(name, "consolidated.00.pth", *words)(damage)


class _Call:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


SMUGGLED = pickle.dumps({"norm.weight": _Call(os.mkdir, ("proof",))}, protocol=2)
PICKLES = {
    "a pickle that runs mkdir": (SMUGGLED, "wants to run posix mkdir"),
    "a memo of 2^31 places": (b"\x80\x02}r\xff\xff\xff\x7f.", "no dict of tensors"),
    "a memo of 2^31 places in a list": (b"\x80\x02]r\xff\xff\xff\x7f.", "no dict of tensors"),
    "a list that holds itself": (b"\x80\x02]q\x00(h\x00h\x00e.", "no dict of tensors"),
    "numbers that hash alike": (b"\x80\x02}\x8a\x08" + struct.pack("<q", 2**61 - 1) + b"Ns.", "aren't names"),
    "a list as a dict": (b"\x80\x02](" + b"N" * 100 + b"e(" + b"K\x00N" * 100 + b"u.", "makes no sense"),
    "a name of a list": (b"\x80\x04]\x8c\x01a\x93.", "it names a function by no string"),
    "a tensor of type tuples": (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v3\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
        b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQK\x00K\x01\x85K\x01\x85NN)"
        + b"q\x00h\x00\x86" * 100
        + b"tR.",
        "makes no sense at byte",
    ),
    "a dict that holds itself": (b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.", "no dict of tensors"),
    "a key that hashes for ever": (
        b"\x80\x02})" + b"q\x00h\x00\x86" * 100 + b"Ns.",
        "it has keys that aren't names",
    ),
    "tuples 200,000 deep": (
        b"\x80\x02}X\x01\x00\x00\x00a)" + b"\x85" * 200_000 + b"s.",
        "no dict of tensors",
    ),
    "a call 100,000 deep": (b"\x80\x02" + b"(" * 100_000 + b".", "makes no sense at byte"),
    "200,000 dicts": (b"\x80\x02" + b"}" * 200_000 + b".", "no dict of tensors"),
    "a string of 2^62 bytes": (b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x.", "makes no sense at byte"),
    "bytes of 2^62 bytes": (b"\x80\x05\x96" + struct.pack("<Q", 2**62) + b"x.", "makes no sense at byte"),
    "a frame of 2^62 bytes": (b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"}.", "no dict of tensors"),
    "an integer of 100,000 digits": (b"I" + b"9" * 100_000 + b"\n.", "makes no sense at byte"),
    "megabytes": (b"\x80\x02" + b"}" * (1 << 20) + b".", "data.pkl has 1,048,579 bytes"),
    "no end": (b"\x80\x02}", "makes no sense at byte"),
    "nothing": (b"", "makes no sense at byte"),
}
for name, (program, words) in PICKLES.items():
    pth(name, rezip(lambda _, program=program: program), words)


def in_pickle(old: bytes, new: bytes):
    """Change the program; the archive's checksums are right again."""

    def change(data: bytes) -> bytes:
        assert old in data
        return data.replace(old, new, 1)

    return rezip(change)


AXES = b"M\x90\x01K@\x86"  # 400, 64
pth("an axis of 0", in_pickle(AXES, b"K\x00K@\x86"), "has the shape [0, 64]")
pth("a negative axis", in_pickle(AXES, b"J\xff\xff\xff\xffK@\x86"), "has the shape [-1, 64]")
pth("axes of 2^31", in_pickle(AXES, b"J\xff\xff\xff\x7fK@\x86"), "isn't inside of")
pth("an axis of 2^63", in_pickle(AXES, b"\x8a\x09" + bytes(7) + b"\x80\x00K@\x86"), "isn't inside of")
pth("one axis", in_pickle(AXES, b"M\x90\x01\x85"), "isn't contiguous")
pth("nine axes", in_pickle(AXES, b"(" + b"K\x01" * 9 + b"t"), "has the shape [1, 1, 1,")
pth("a shape that is a string", in_pickle(AXES, b"X\x01\x00\x00\x00a"), "makes no sense at byte")
pth(
    "a storage that isn't there",
    in_pickle(b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x00z"),
    "its weights are missing",
)
pth(
    "a storage in another folder",
    in_pickle(b"X\x01\x00\x00\x000", b"X\x06\x00\x00\x00../../"),
    "its weights are missing",
)
pth(
    "a storage said to be larger",
    in_pickle(b"M\x00d", b"J\x00d\x00\x7f"),
    "isn't 2,130,732,032 of torch HalfStorage",
)
pth(
    "a tensor twice",
    in_pickle(b"X\x0b\x00\x00\x00norm.weight", b"X\x15\x00\x00\x00tok_embeddings.weight"),
    "twice",
)
pth(
    "a name that steers terminals",
    in_pickle(b"norm.weight", b"\x1b[2J\nweight"),
    "names a tensor that can't be printed",
)


def rewrite(path: Path, change) -> None:
    path.write_bytes(change(bytearray(path.read_bytes())))


def directory(data: bytearray, name: str, offset: int, code: str, number: int) -> bytearray:
    """Another number in the entry of a member in the zip's directory."""
    start = data.index(b"PK\x01\x02")
    entry = data.rindex(b"PK\x01\x02", start, data.rindex(name.encode()))
    struct.pack_into("<" + code, data, entry + offset, number)
    return data


def zipped(name: str, change, *words: str) -> None:
    pth(name, lambda path: rewrite(path, change), *words)


zipped("a compressed pickle", lambda d: directory(d, "/data.pkl", 10, "H", 8), "is compressed")
zipped("an encrypted pickle", lambda d: directory(d, "/data.pkl", 8, "H", 1), "encrypted")
zipped(
    "a checksum that is wrong", lambda d: directory(d, "/data.pkl", 16, "I", 1), "doesn't match its checksum"
)
zipped("a member that begins elsewhere", lambda d: directory(d, "/data/3", 42, "I", 0), "isn't where the zip")
zipped("a member that is longer", lambda d: directory(d, "/data/3", 24, "I", 10**9), "cut short within")
zipped("a member that is shorter", lambda d: directory(d, "/data/3", 24, "I", 10), "doesn't end at byte")
zipped("a comment", lambda d: d[:-2] + struct.pack("<H", 9) + b"a comment", "something appended")


@case("a directory of 2 GB", "consolidated.00.pth", "its zip directory is damaged")
def large_directory(path: Path) -> None:
    rezip()(path)
    rewrite(path, lambda data: data[:-10] + struct.pack("<I", 2**31) + data[-6:])


@case("a member twice", "consolidated.00.pth", "its zip directory is damaged: it names a member twice")
def twice(path: Path) -> None:
    rezip(change=lambda members: [*members, ("consolidated.00/data/z", b"")])(path)
    rewrite(path, lambda data: data.replace(b"data/z", b"data/3"))


@case("a zip bomb", "consolidated.00.pth", "is compressed")
def bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("consolidated/data.pkl", bytes(20 << 20))


@case(
    "20 GB, a directory of 10 GB",
    "consolidated.00.pth",
    "its zip directory is damaged: it would have 10,000,000,000 bytes",
)
def huge_directory(path: Path) -> None:
    size, offset = 10**10, HUGE - 98 - 10**10
    record = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, 1, 1, size, offset)
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, HUGE - 98, 1)
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, 2**32 - 1, 2**32 - 1, 0)
    huge(path, b"PK\x03\x04", record + locator + end)


@case("a directory of 3 MB", "consolidated.00.pth", "its zip directory is damaged: it would have 3,")
def long_names(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(50):
            archive.writestr(f"consolidated/data/{number:060000d}", b"")


# --- what lies around the weights -----------------------------------------------------------------

PARAMS = {"dim": 64, "multiple_of": 32, "n_heads": 4, "n_layers": 2, "norm_eps": 1e-6, "vocab_size": -1}


def params(name: str, text: str, *words: str) -> None:
    case(name, "params.json", *words)(lambda path: path.write_text(text))


def said(**changes) -> str:
    return json.dumps(PARAMS | changes)


params("nothing", "", "isn't JSON")
params("nested 30,000 deep", '{"a":' * 10_000 + "1" + "}" * 10_000, "isn't JSON")
params("a key twice", '{"dim": 64, "dim": 128}', "a key is there twice: dim, dim")
params("an integer of 5,000 digits", said().replace("64", "9" * 5000), "isn't JSON")
params("norm_eps 1e400", said().replace("1e-06", "1e400"), "norm_eps must be a number, not inf")
params("norm_eps of 400 digits", said().replace("1e-06", "9" * 400), "norm_eps must be a number")
params("norm_eps NaN", said(norm_eps=float("nan")), "norm_eps must be a number, not nan")
params("norm_eps 0", said(norm_eps=0), "norm_eps must be a positive number, not 0")
params("norm_eps -1", said(norm_eps=-1), "norm_eps must be a positive number, not -1")
params("norm_eps as text", said(norm_eps="1e-6"), "norm_eps must be a number, not '1e-6'")
params("rope_theta inf", said(rope_theta=float("inf")), "rope_theta must be a number")
params("rope_theta 0", said(rope_theta=0), "rope_theta must be a positive number, not 0")
params("n_heads 4.5", said(n_heads=4.5), "n_heads must be a whole number, not 4.5")
params("n_heads true", said(n_heads=True), "n_heads must be a whole number, not True")
params("n_heads a list", said(n_heads=[[[4]]]), "n_heads must be a whole number, not a list")
params("n_heads 0", said(n_heads=0), "n_heads must be a positive number")
params("n_heads 64, of width 1", said(n_heads=64), "heads of an even width")
params("n_kv_heads 0", said(n_kv_heads=0), "n_kv_heads must be a positive number")
params("n_kv_heads 3", said(n_kv_heads=3), "4 heads can't share 3")
params(
    "n_kv_heads 2",
    said(n_kv_heads=2),
    "consolidated.00.pth",
    "wk.weight has the shape [64, 64], not [32, 64]",
)
params("n_layers 10^18", said(n_layers=10**18), "n_layers is 1000000000000000000")
params("n_layers 3", said(n_layers=3), "the tensor layers.2.attention_norm.weight is missing")
params("dim 10^30", said(dim=10**30), "dim can't be 1000000000")
params("multiple_of 10^30", said(multiple_of=10**30), "multiple_of can't be 1000000000")
params("ffn_dim_multiplier 1e29", said(ffn_dim_multiplier=1e29), "ffn_dim_multiplier can't be 1e+29")
params("ffn_dim_multiplier 0", said(ffn_dim_multiplier=0), "ffn_dim_multiplier can't be 0")
params("a mixture of experts", said(moe={"num_experts": 8}), "moe stands for a mixture of experts")
params("max_seq_len 0", said(max_seq_len=0), "max_seq_len must be a positive number, not 0")
params("head_dim 2^40", said(head_dim=2**40), "head_dim is 1099511627776")
params("hidden_dim -1", said(hidden_dim=-1), "hidden_dim must be a positive number, not -1")
params("RoPE scaled by 0", said(use_scaled_rope=True, rope_scaling_factor=0), "must be a positive number")
params("vocab_size 401", said(vocab_size=401), "vocab_size isn't the 400")
case("20 GB", "params.json", "is too large")(lambda path: huge(path, b'{"dim": '))


def model(name: str, change, *words: str) -> None:
    patched("tokenizer.model", name, change, *words)


def proto(change):
    """Change what a tokenizer.model says, by its protocol buffer."""

    def apply(data: bytes) -> bytes:
        from sentencepiece import sentencepiece_model_pb2

        parsed = sentencepiece_model_pb2.ModelProto.FromString(data)
        change(parsed)
        return parsed.SerializeToString()

    return apply


def sets(path: str, value):
    def change(parsed):
        *steps, last = path.split(".")
        for step in steps:
            parsed = parsed.pieces[int(step)] if step.isdigit() else getattr(parsed, step)
        setattr(parsed, last, value)

    return proto(change)


case("20 GB", "tokenizer.model", "too large")(lambda path: huge(path, b"\x0a"))
case("16 million pieces", "tokenizer.model", "absurdly many pieces")(
    lambda path: path.write_bytes(b"\x0a\x00" * (1 << 24))
)
model("nothing", lambda data: b"", "SentencePiece model")
model("a million groups in each other", lambda data: b"\x0b" * 1_000_000, "no SentencePiece model")
model("no normalizer", proto(lambda parsed: parsed.ClearField("normalizer_spec")), "SentencePiece model")
model("bos 400", sets("trainer_spec.bos_id", 400), "special token is number 400")
model("a score of NaN", sets("300.score", float("nan")), "score")
model("a score of infinity", sets("300.score", float("inf")), "score")
model("a byte that is no byte", sets("300.type", 6), "byte pieces")
model("a piece twice", sets("300.piece", "<0x41>"), "are the same piece")
model("a piece that steers terminals twice", sets("300.piece", "<s>"), "the same piece, '<s>'")
