"""Several files as one input: before each stands a line with its name, "=== params.json ===".

A fuzzer may change, drop and repeat these lines like anything else; what stands before the first is ignored.
"""

import re

_LINE = re.compile(rb"=== (\w[\w.]{0,40}) ===\n")


def bundle(files: dict[str, bytes]) -> bytes:
    """One input of several files."""
    return b"".join(b"=== %s ===\n%s" % (name.encode(), data) for name, data in files.items())


def unbundle(data: bytes) -> dict[str, bytes]:
    """The files in an input; of two with one name the last."""
    _, *rest = _LINE.split(data)
    return {name.decode(): content for name, content in zip(rest[::2], rest[1::2], strict=True)}
