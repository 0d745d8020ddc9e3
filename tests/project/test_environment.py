"""pyproject.toml, environment.yml and requirements/ have to name the same packages."""

import re
import tomllib
from itertools import chain
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
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
*CONDA_LINES, WITH_PIP = CONDA["dependencies"]
CONDA_RANGES = ranges([*CONDA_LINES, *WITH_PIP["pip"][1:]])

#: {name: the lines of requirements/name.txt}, each with its continuation lines
LOCKS = {
    path.stem: re.findall(r"^[^#\n].*(?:\n    .*)*", path.read_text(), flags=re.MULTILINE)
    for path in (ROOT / "requirements").glob("*.txt")
}


def test_conda_installs_the_packages_and_ranges_of_pyproject():
    conda = dict(CONDA_RANGES)
    assert conda.pop("python") == SpecifierSet(PROJECT["requires-python"])
    assert conda.pop("pip") == SpecifierSet()
    assert conda == PYPROJECT_RANGES


def test_conda_uses_conda_forge_and_installs_with_pip_the_checkout_and_what_it_has_not():
    assert CONDA["channels"] == ["conda-forge"]
    assert all(isinstance(line, str) for line in CONDA_LINES)
    assert WITH_PIP["pip"][0] == "-e ."
    assert ranges(WITH_PIP["pip"][1:]).keys() == {"libgguf", "mlx"}


def pins(goal):
    """{package: version} of requirements/goal.txt and of the files that it builds on."""
    pinned = {}
    for line in LOCKS[goal]:
        if line.startswith("-r "):
            pinned |= pins(line.removeprefix("-r ").removesuffix(".txt"))
        elif not line.startswith("-"):
            name, version = re.match(r"([a-z0-9._-]+)==([^\s;+]+)", line).groups()
            assert pinned.get(name, version) == version
            pinned[name] = version
    return pinned


def test_every_goal_that_the_makefile_sets_up_has_its_requirements():
    goals = re.findall(r"\.venv/([a-z]+)\.installed", (ROOT / "Makefile").read_text())
    assert LOCKS.keys() >= {*goals, "torch", "arm"}


@pytest.mark.parametrize("goal", sorted(LOCKS))
def test_every_pinned_package_has_hashes(goal):
    for line in LOCKS[goal]:
        if not line.startswith("-"):
            requirement, *hashes = line.split(" \\\n    ")
            assert "==" in requirement
            assert hashes and all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", digest) for digest in hashes)


def test_goals_that_share_an_environment_agree_on_versions():
    versions = {}
    for goal in LOCKS:
        for name, version in pins(goal).items():
            assert versions.setdefault(name, version) == version, name


def test_only_torch_comes_from_elsewhere_than_pypi():
    options = {goal: [line for line in lines if line.startswith("--")] for goal, lines in LOCKS.items()}
    assert options.pop("torch") == ["--extra-index-url https://download.pytorch.org/whl/cpu"]
    assert not any(options.values())


def test_torch_on_linux_needs_no_cuda():
    version = pins("torch")["torch"]
    assert [line.split("==")[1].split(" ")[0] for line in LOCKS["torch"][1:]] == [version, f"{version}+cpu"]
    assert not [
        name for goal in LOCKS for name in pins(goal) if name.startswith(("nvidia", "cuda", "triton"))
    ]


@pytest.mark.parametrize("name", sorted(PYPROJECT_RANGES))
def test_one_version_inside_the_range_is_pinned(name):
    pinned = pins("test") | pins("lint") | pins("torch")
    assert pinned[name] in PYPROJECT_RANGES[name]


def test_the_all_extra_names_every_other_extra():
    (everything,) = EXTRAS["all"]
    assert Requirement(everything).extras == EXTRAS.keys() - {"all"}


@pytest.mark.parametrize("name", ["torch", "jupyterlab", "matplotlib", "ipywidgets", "transformers"])
def test_running_a_model_needs_neither_torch_nor_jupyter(name):
    assert name not in ranges(PROJECT["dependencies"])
