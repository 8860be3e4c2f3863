"""The script that has Apple's compiler read the texts, with a stand-in for that compiler.

The script has never been run on macOS: what is shown here is that it asks for every file in every
version, and that one failure is not lost.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / ".ci" / "compile_metal"
XCRUN = """#!/bin/sh
[ "$1 $2 $3" = "-sdk macosx metal" ] || exit 64
case "$4" in -std=metal3.1|-std=metal3.2) ;; *) echo "error: invalid value '$4'" >&2; exit 1 ;; esac
[ "$5" = "-fsyntax-only" ] || exit 64
echo "$4 $(basename "$6")" >> "$ASKED"
if grep -q BROKEN "$6"; then echo "$6:1:1: error: broken" >&2; exit 1; fi
"""


def compile_metal(tmp_path: Path, xcrun: str = XCRUN) -> tuple[int, str, list[str]]:
    """Exit code, output, and what the compiler was asked for."""
    stand_in = tmp_path / "bin" / "xcrun"
    stand_in.parent.mkdir()
    stand_in.write_text(xcrun)
    stand_in.chmod(0o755)
    asked = tmp_path / "asked"
    path = f"{stand_in.parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "ASKED": str(asked)}
    ended = subprocess.run(
        [SCRIPT, tmp_path / "texts"], env=environment, capture_output=True, text=True, check=False
    )
    lines = asked.read_text().splitlines() if asked.exists() else []
    return ended.returncode, ended.stdout + ended.stderr, lines


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("a", "b c"):
        (folder / f"{name}.metal").write_text("kernel void f() {}\n")
    return folder


@pytest.mark.usefixtures("texts")
def test_every_text_is_compiled_in_every_version(tmp_path: Path) -> None:
    code, output, asked = compile_metal(tmp_path)
    assert code == 0, output
    for version in ("metal3.1", "metal3.2"):
        assert f"{version}: 2 of 2 texts compile" in output
        assert {f"-std={version} a.metal", f"-std={version} b c.metal"} < set(asked)
    assert "metal4.0: not known to this compiler: error: invalid value" in output


def test_one_failure_is_an_error_with_its_reason(tmp_path: Path, texts: Path) -> None:
    (texts / "wrong.metal").write_text("BROKEN\n")
    code, output, _ = compile_metal(tmp_path)
    assert code == 1
    assert "metal3.2: wrong.metal" in output
    assert "error: broken" in output
    assert "metal3.2: 2 of 3 texts compile" in output


@pytest.mark.usefixtures("texts")
def test_without_a_compiler_nothing_passes(tmp_path: Path) -> None:
    code, output, _ = compile_metal(
        tmp_path, "#!/bin/sh\necho 'xcrun: no developer tools' >&2\nexit 1\n"
    )
    assert code == 1
    assert "knows none of the versions" in output


def test_without_texts_nothing_passes(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    code, output, _ = compile_metal(tmp_path)
    assert code == 1
    assert "no .metal file" in output


def test_the_dump_says_what_it_writes() -> None:
    shown = subprocess.run(
        [sys.executable, ROOT / "tests" / "kernels" / "dump_metal_texts.py", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "FOLDER" in shown.stdout.upper()
