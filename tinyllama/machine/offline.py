"""Fetching no model."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def offline(wanted: bool) -> Iterator[None]:
    """If wanted, inside as with HF_HUB_OFFLINE=1."""
    before = os.environ.get("HF_HUB_OFFLINE")
    if wanted:
        os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        yield
    finally:
        os.environ.pop("HF_HUB_OFFLINE", None)
        os.environ |= {} if before is None else {"HF_HUB_OFFLINE": before}
