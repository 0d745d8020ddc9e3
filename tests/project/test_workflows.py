"""GitHub's workflows call goals that the Makefile has, and actions that are pinned."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
GOALS = set(re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split())


def jobs(path: Path) -> list[dict]:
    return list(yaml.safe_load(path.read_text())["jobs"].values())


def steps(path: Path) -> list[dict]:
    return [step for job in jobs(path) for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_calls_goals_of_the_makefile(path):
    calls = [step["run"].split() for step in steps(path) if step.get("run", "").startswith("make ")]
    assert calls
    for _, *words in calls:
        assert {word for word in words if "=" not in word} <= GOALS


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_by_commit_with_the_version_beside_it(path):
    uses = re.findall(r"uses: (.*)", path.read_text())
    assert len(uses) == sum("uses" in step for step in steps(path))
    for action in uses:
        assert re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_may_only_read_the_repository(path):
    assert yaml.safe_load(path.read_text())["permissions"] == {"contents": "read"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_runners_are_named_by_their_version(path):
    for job in jobs(path):
        matrix = job.get("strategy", {}).get("matrix", {})
        systems = [*matrix.get("os", []), *(row["os"] for row in matrix.get("include", []))]
        for system in systems or [job["runs-on"]]:
            assert re.fullmatch(r"(macos-\d+(-intel)?|ubuntu-\d\d\.04(-arm)?)", system)
