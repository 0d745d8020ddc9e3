"""pyproject.toml, environment.yml and constraints.txt have to name the same packages."""

import tomllib
from itertools import chain
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PYPI_NAMES = {"pytorch": "torch"}  # where conda-forge calls a package something else

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())


def ranges(lines):
    """{PyPI name: version range} of requirement lines, without the project that its own extras name."""
    requirements = [Requirement(line) for line in lines]
    names = [
        PYPI_NAMES.get(requirement.name, canonicalize_name(requirement.name)) for requirement in requirements
    ]
    pairs = zip(names, requirements, strict=True)
    return {name: requirement.specifier for name, requirement in pairs if name != PROJECT["name"]}


EXTRAS = PROJECT["optional-dependencies"]
PYPROJECT_RANGES = ranges(chain(PROJECT["dependencies"], *EXTRAS.values()))
CONDA_RANGES = ranges(line for line in CONDA["dependencies"] if isinstance(line, str))
PINS = ranges(
    line for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:1] not in ("", "#")
)


def test_conda_installs_the_packages_and_ranges_of_pyproject():
    conda = dict(CONDA_RANGES)
    assert conda.pop("python") == SpecifierSet(PROJECT["requires-python"])
    assert conda.pop("pip") == SpecifierSet()
    assert conda == PYPROJECT_RANGES


def test_conda_uses_conda_forge_and_installs_the_checkout_with_pip_alone():
    assert CONDA["channels"] == ["conda-forge"]
    assert [line for line in CONDA["dependencies"] if not isinstance(line, str)] == [{"pip": ["-e ."]}]


@pytest.mark.parametrize("name", sorted(PYPROJECT_RANGES))
def test_constraints_pin_one_version_inside_the_range(name):
    (pin,) = PINS[name]
    assert pin.operator == "=="
    assert pin.version in PYPROJECT_RANGES[name]


def test_the_all_extra_names_every_other_extra():
    (everything,) = EXTRAS["all"]
    assert Requirement(everything).extras == EXTRAS.keys() - {"all"}


@pytest.mark.parametrize("name", ["torch", "jupyterlab", "matplotlib", "ipywidgets", "transformers"])
def test_running_a_model_needs_neither_torch_nor_jupyter(name):
    assert name not in ranges(PROJECT["dependencies"])
