"""The emulator itself: each key does what launchd.plist(5) says."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from launchd_emulator import Job

SCALE = 0.01


def job(folder: Path, program: str, **keys: Any) -> Job:
    log = str(folder / "log")
    plist = {
        "ProgramArguments": [sys.executable, "-c", program],
        "StandardOutPath": log,
        "StandardErrorPath": log,
        "RunAtLoad": True,
        **keys,
    }
    return Job(plist, SCALE, SCALE)


def test_a_failure_is_started_again_and_success_is_not(tmp_path):
    counting = (
        "import pathlib, sys; p = pathlib.Path('n'); n = len(p.read_text()) if p.exists() else 0;"
        "p.write_text('x' * (n + 1)); sys.exit(n < 2)"
    )
    keep = {"SuccessfulExit": False}
    running = job(tmp_path, counting, WorkingDirectory=str(tmp_path), KeepAlive=keep)
    running.settle()
    assert running.exits == [1, 1, 0]
    running.bootout()


def test_starts_are_throttled(tmp_path):
    running = job(
        tmp_path, "import os; os.abort()", KeepAlive={"SuccessfulExit": False}, ThrottleInterval=30
    )
    while len(running.exits) < 3:
        signal.sigtimedwait([], 0.01)
    running.bootout()
    gaps = [b - a for a, b in zip(running.spawned, running.spawned[1:], strict=False)]
    assert min(gaps) >= 30 * SCALE
    assert set(running.exits) == {-signal.SIGABRT}


def test_who_ignores_the_signal_is_killed(tmp_path):
    stubborn = (
        "import signal, sys, time; signal.signal(15, 1); print(1, flush=True); time.sleep(60)"
    )
    running = job(tmp_path, stubborn, ExitTimeOut=30)
    while not (tmp_path / "log").exists() or not (tmp_path / "log").read_text():
        signal.sigtimedwait([], 0.01)
    running.bootout()
    assert running.exits == [-signal.SIGKILL]


def test_the_environment_is_the_plists_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "1")
    running = job(tmp_path, "import os; print(sorted(os.environ))", EnvironmentVariables={"A": "1"})
    running.settle()
    running.bootout()
    shown = (tmp_path / "log").read_text()
    assert "SECRET" not in shown
    assert "'A'" in shown


def test_an_unknown_key_is_noticed(tmp_path):
    with pytest.raises(AssertionError, match="Nonsense"):
        Job._spawn(type("Fake", (), {"plist": {"Nonsense": 1}})())
