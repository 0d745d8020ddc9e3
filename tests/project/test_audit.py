"""make audit says what pip-audit found, and never that all is well where nothing was asked."""

import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
FINE = {"name": "numpy", "version": "2.4.6", "vulns": []}
KNOWN = {
    "name": "requests",
    "version": "2.0.0",
    "vulns": [{"id": "PYSEC-2014-13", "aliases": ["CVE-2014-1829"], "fix_versions": ["2.3.0"]}],
}
SKIPPED = {"name": "torch", "skip_reason": "Dependency not found on PyPI and could not be audited"}


@pytest.fixture
def audit(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    monkeypatch.delitem(sys.modules, "audit", raising=False)
    import audit

    return audit


@pytest.mark.parametrize(
    ("answer", "code", "line"),
    [
        ([FINE], 0, "Packages checked: 1, known vulnerabilities: 0"),
        ([FINE, KNOWN], 1, "requests 2.0.0: PYSEC-2014-13, CVE-2014-1829; fixed in 2.3.0"),
        ([FINE, SKIPPED], 2, "Not checked, as PyPI does not know them: torch"),
        ([SKIPPED], 2, "Nothing was checked: PyPI's lists of known vulnerabilities cannot be read from here"),
        ([], 2, "Nothing was checked: PyPI's lists of known vulnerabilities cannot be read from here"),
    ],
)
def test_the_report_names_what_was_found_and_what_was_not_asked(audit, capsys, answer, code, line):
    assert audit.report(answer) == code
    assert line in capsys.readouterr().out.splitlines()


def test_every_pinned_package_is_asked_about(audit):
    pins = audit.pins()
    assert {"numpy", "torch", "jupyterlab", "uv"} <= {pin.split("==")[0] for pin in pins}
    assert not [pin for pin in pins if "+" in pin]
