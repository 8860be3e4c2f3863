"""What launchd does with one job, as launchd.plist(5) says, with real processes.

launchd itself starts again what ends (KeepAlive), not more often than ThrottleInterval, gives the
job its own environment and nothing else, and kills what outlives SIGTERM by ExitTimeOut. Times are
scaled down.
"""

from __future__ import annotations

import os
import plistlib
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quire.deploy.steps import CommandResult


class Job:
    """A loaded property list. The scales shorten its intervals."""

    def __init__(self, plist: dict[str, Any], scale: float, exit_scale: float = 1) -> None:
        self.plist = plist
        self.exits: list[int] = []  # negative: the signal
        self.spawned: list[float] = []
        self.running: subprocess.Popen[bytes] | None = None
        self._scale = scale
        self._exit_scale = exit_scale
        self._wanted = threading.Condition()
        self._unload = False
        self._start = plist.get("RunAtLoad", False) or self._keeps_alive_by_exit()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def kickstart(self) -> None:
        with self._wanted:
            self._start = self.running is None
            self._wanted.notify_all()

    def bootout(self) -> None:
        """SIGTERM, then SIGKILL for the whole group; returns when the job has gone."""
        with self._wanted:
            self._unload = True
            self._wanted.notify_all()
            process = self.running
        if process is not None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(self.plist.get("ExitTimeOut", 20) * self._exit_scale or None)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
        self._thread.join()

    def settle(self) -> None:
        """Returns once nothing runs and nothing will be started."""
        with self._wanted:
            assert self._wanted.wait_for(lambda: self.running is None and not self._start, 60)

    def _keeps_alive_by_exit(self) -> bool:
        keep = self.plist.get("KeepAlive", False)
        return "SuccessfulExit" in keep if isinstance(keep, dict) else keep

    def _starts_again(self, code: int) -> bool:
        keep = self.plist.get("KeepAlive", False)
        if not isinstance(keep, dict):
            return bool(keep)
        return "SuccessfulExit" in keep and keep["SuccessfulExit"] == (code == 0)

    def _run(self) -> None:
        throttle = self.plist.get("ThrottleInterval", 10) * self._scale
        while True:
            with self._wanted:
                self._wanted.wait_for(lambda: self._start or self._unload)
                if self.spawned:
                    due = self.spawned[-1] + throttle - time.monotonic()
                    self._wanted.wait_for(lambda: self._unload, max(due, 0))
                if self._unload:
                    return
                self.running = process = self._spawn()
                self.spawned.append(time.monotonic())
                self._start = False
            code = process.wait()
            with self._wanted:
                self.exits.append(code)
                self.running = None
                self._start = self._starts_again(code)
                self._wanted.notify_all()

    def _spawn(self) -> subprocess.Popen[bytes]:
        plist = self.plist
        assert set(plist) <= SUPPORTED, set(plist) - SUPPORTED
        with (
            open(plist["StandardOutPath"], "ab") as output,
            open(plist["StandardErrorPath"], "ab") as errors,
        ):
            return subprocess.Popen(
                plist["ProgramArguments"],
                env=plist.get("EnvironmentVariables", {}),
                cwd=plist.get("WorkingDirectory", "/"),
                umask=plist.get("Umask", 0o022),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                start_new_session=True,
            )


SUPPORTED = {
    *("Label", "ProgramArguments", "EnvironmentVariables", "WorkingDirectory", "RunAtLoad"),
    *("KeepAlive", "ThrottleInterval", "ExitTimeOut", "StandardOutPath", "StandardErrorPath"),
    *("Umask", "ProcessType", "SoftResourceLimits"),
}


class Launchctl:
    """``launchctl`` over :class:`Job`, with the calls it got. A runner for ``carry_out``."""

    def __init__(self, scale: float = 0.01, *, at_the_screen: bool = True) -> None:
        self.calls: list[str] = []
        self.job: Job | None = None  # the latest, also when it is no longer loaded
        self._loaded: dict[str, Job] = {}
        self._scale = scale
        self._at_the_screen = at_the_screen

    def __call__(self, argv: Sequence[str]) -> CommandResult:
        program, action, target, *rest = argv
        assert program == "launchctl"
        self.calls.append(action)
        if action == "bootstrap":
            return self._bootstrap(target, Path(rest[0]))
        if action == "enable":
            return CommandResult(0, "")
        job = self._loaded.get(target)
        if job is None:
            return CommandResult(113, f"Could not find service in domain for {target}")
        if action == "bootout":
            job.bootout()
            del self._loaded[target]
        elif action == "kickstart":
            job.kickstart()
        elif action == "print":
            state = "running" if job.running else "not running"
            return CommandResult(0, f"{target} = {{\n\tstate = {state}\n\truns = 1\n}}\n")
        return CommandResult(0, "")

    def _bootstrap(self, domain: str, path: Path) -> CommandResult:
        if domain.startswith("gui/") and not self._at_the_screen:
            message = "Bootstrap failed: 125: Domain does not support specified action"
            return CommandResult(125, message)
        plist = plistlib.loads(path.read_bytes())
        target = f"{domain}/{plist['Label']}"
        assert path.stem == plist["Label"]
        if target in self._loaded:
            return CommandResult(5, "Bootstrap failed: 5: Input/output error")
        self.job = self._loaded[target] = Job(plist, self._scale)
        return CommandResult(0, "")

    def close(self) -> None:
        for job in self._loaded.values():
            job.bootout()
