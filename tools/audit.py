"""audit.py asks PyPI, through pip-audit, which packages of requirements/*.txt have known vulnerabilities.

Its exit code is 0 where none has one, 1 where some have, which it lists, and 2 where PyPI could not be asked.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

LOCKS = Path(__file__).parents[1] / "requirements"


def pins() -> list[str]:
    """["numpy==2.4.6", ...]: every package of every goal, torch without the "+cpu" of its builds."""
    text = "\n".join(path.read_text() for path in LOCKS.glob("*.txt"))
    return sorted(set(re.findall(r"^[a-z0-9._-]+==[^\s;+]+", text, flags=re.MULTILINE)))


def ask(requirements: list[str]) -> list[dict]:
    """pip-audit's answer, a dict a package: its "vulns", or a "skip_reason"; none where it has no answer."""
    with TemporaryDirectory() as folder:
        file = Path(folder, "pins.txt")
        file.write_text("\n".join(requirements))
        options = ["--disable-pip", "--no-deps", "--progress-spinner=off", "--format=json"]
        command = [sys.executable, "-m", "pip_audit", *options, f"--requirement={file}"]
        result = subprocess.run(command, capture_output=True, text=True)
    try:
        return json.loads(result.stdout)["dependencies"]
    except ValueError:
        print((result.stderr.strip().splitlines() or ["pip-audit said nothing"])[-1])
        return []


def report(dependencies: list[dict]) -> int:
    """Prints what was found; the exit code."""
    asked = [package for package in dependencies if "skip_reason" not in package]
    unknown = [package["name"] for package in dependencies if "skip_reason" in package]
    found = [(package, vulnerability) for package in asked for vulnerability in package["vulns"]]
    for package, vulnerability in found:
        names = ", ".join([vulnerability["id"], *vulnerability.get("aliases", [])])
        fixed = ", ".join(vulnerability["fix_versions"]) or "no version yet"
        print(f"{package['name']} {package['version']}: {names}; fixed in {fixed}")
    if not asked:
        print("Nothing was checked: PyPI's lists of known vulnerabilities cannot be read from here")
        return 2
    print(f"Packages checked: {len(asked)}, known vulnerabilities: {len(found)}")
    if unknown:
        print(f"Not checked, as PyPI does not know them: {', '.join(unknown)}")
    return 1 if found else 2 if unknown else 0


if __name__ == "__main__":
    sys.exit(report(ask(pins())))
