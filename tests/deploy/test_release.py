"""What a release is made of: the formula's blanks are filled, and it runs what launchd runs."""

from __future__ import annotations

import plistlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from quire.deploy.launchd import Launchd
from quire.deploy.service import Account, describe_service

ROOT = Path(__file__).parents[2]
FORMULA = (ROOT / "deploy/homebrew/quire.rb.in").read_text()
WORKFLOW = (ROOT / ".github/workflows/release.yml").read_text()
BLANKS = set(re.findall(r"@[A-Z0-9]+@", FORMULA))


def test_the_workflow_fills_every_blank_of_the_formula():
    assert {"@HOMEPAGE@", "@URL@", "@VERSION@", "@SHA256@"} == BLANKS
    assert set(re.findall(r"s\|(@[A-Z0-9]+@)\|", WORKFLOW)) == BLANKS


def test_the_formula_is_ruby(tmp_path):
    if not shutil.which("ruby"):
        pytest.skip("ruby is not installed")
    formula = FORMULA
    for blank in BLANKS:
        formula = formula.replace(blank, "x")
    (tmp_path / "quire.rb").write_text(formula)
    subprocess.run(["ruby", "-c", tmp_path / "quire.rb"], check=True, capture_output=True)


def test_homebrew_and_quire_service_ask_launchd_for_the_same():
    home = Path("/Users/someone")
    manager = Launchd(Account("someone", 501, home))
    plist = manager.plist(describe_service({}, {}, home))
    service = FORMULA[FORMULA.index("service do") : FORMULA.index("test do")]
    assert plist["KeepAlive"] == {"SuccessfulExit": False}
    assert "keep_alive successful_exit: false" in service
    assert f"process_type :{plist['ProcessType'].lower()}" in service
    assert f"throttle_interval {plist['ThrottleInterval']}" in service
    assert plistlib.dumps(plist)


def test_the_source_distribution_has_what_the_formula_reads():
    named = [*re.findall(r'"(deploy/[\w.]+)"', FORMULA), "constraints.txt"]
    assert all((ROOT / name).is_file() for name in named)
    assert "include constraints.txt" in (ROOT / "MANIFEST.in").read_text()
