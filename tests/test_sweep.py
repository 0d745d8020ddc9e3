"""Good files cut short and with bytes changed are refused, or read as another reader reads them."""

from dataclasses import replace

import pytest
from sweep import Subject, Sweep, Wrong, positions, subjects, sweep

NAMES = [
    "pth",
    "pth, part 2 of 2",
    "ggml f16",
    "ggml q4_0",
    "ggml, part 2 of 2",
    "GGUF, SentencePiece",
    "GGUF, BPE",
    "tokenizer.model",
]
SAMPLED = 127  # each so-manyth, a prime: the changes of one byte and the next are others


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, Subject]:
    made = subjects(tmp_path_factory.mktemp("sweep"))
    assert list(made) == NAMES
    return made


def check(subject: Subject, every: int) -> None:
    done = sweep(subject, every)
    cuts, flips = done["cuts"].counts, done["flips"].counts
    assert cuts["refused"] >= 0.99 * cuts.total() > 0
    assert cuts["as it says"] == 0
    assert flips["refused"] > 0.3 * flips.total() > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_file_is_refused_or_read_as_it_says(good, name):
    check(good[name], SAMPLED)


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_a_file_damaged_anywhere_is_refused_or_read_as_it_says(good, name):
    check(good[name], 1)


# --- that the sweep would notice ------------------------------------------------------------------


def in_norm(good) -> tuple[Subject, int]:
    """A byte of a weight: whoever changes it gets another tensor."""
    subject = good["GGUF, BPE"]
    return subject, positions(subject)[1][500]


def test_the_sweep_notices_a_wrong_tensor(good):
    subject, at = in_norm(good)
    looked = Sweep(subject)
    looked.flip(at, 1)
    assert looked.counts == {"as it says": 1}
    looked.subject = replace(subject, oracle=lambda path: {**looked.good})
    with pytest.raises(Wrong, match=r"the other reader reads another [\w.]+"):
        looked.flip(at, 1)


@pytest.mark.parametrize("error", [ValueError("bug"), KeyError(3), MemoryError()])
def test_the_sweep_notices_any_other_error(good, error):
    def crash(path):
        raise error

    looked = Sweep(good["GGUF, BPE"])
    looked.subject = replace(looked.subject, read=crash)
    with pytest.raises(Wrong, match=type(error).__name__):
        looked.cut(100)
    assert looked.subject.path.read_bytes() == looked.data
