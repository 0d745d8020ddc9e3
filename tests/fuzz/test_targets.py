"""The contract of every target: for its corpus, findings of the past included, and a number of new inputs."""

import pytest
from hypothesis import HealthCheck, Verbosity, given, settings

from fuzz import replay, targets

FEW, MANY = 20, 300
UNTIMED = settings(
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    print_blob=False,
    verbosity=Verbosity.quiet,  # the bytes are in a file
)


def load(name: str):
    if name == "native":
        pytest.importorskip("tinyllama._native", reason="the C backend is not built")
    return targets.load(name)


@pytest.mark.parametrize("name", targets.names())
def test_the_corpus_is_read_or_refused_as_it_should(name):
    target = load(name)
    for path in replay.corpus(name):
        try:
            target.check(path.read_bytes())
        except BaseException as error:
            pytest.fail(f"{path}: {type(error).__name__}: {error}")


@pytest.mark.parametrize("name", targets.names())
def test_the_seeds_are_those_that_a_target_makes_and_are_accepted(name):
    target = load(name)
    for seed, data in target.seeds().items():
        assert (replay.CORPUS / name / seed).read_bytes() == data, f"python -m fuzz seeds {name}"
        assert target.check(data), seed


@pytest.mark.parametrize("n_inputs", [FEW, pytest.param(MANY, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", targets.names())
def test_nearly_valid_inputs_are_read_or_refused_as_they_should(name, n_inputs, tmp_path):
    target, broken = load(name), tmp_path / "broken"

    @settings(UNTIMED, max_examples=n_inputs)
    @given(target.inputs())
    def check(data):
        try:
            target.check(data)
        except BaseException:
            broken.write_bytes(data)
            raise

    check()
