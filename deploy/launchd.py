"""The macOS service: a LaunchAgent in the user's own session, where the GPU is.

Keys as in launchd.plist(5).
"""

from __future__ import annotations

import plistlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quire.deploy.service import Service
from quire.deploy.steps import (
    MakeFolder,
    RemoveFile,
    RunCommand,
    Runner,
    Step,
    WaitUntilFails,
    WriteFile,
)

LABEL = "local.quire.serve"


class Launchd:
    """Plans the steps for ``launchctl``. ``home`` and ``uid`` are the user's."""

    def __init__(self, home: Path, uid: int) -> None:
        self._domain = f"gui/{uid}"
        self._target = f"gui/{uid}/{LABEL}"
        self._plist = home / "Library" / "LaunchAgents" / f"{LABEL}.plist"
        self._logs = home / "Library" / "Logs" / "quire"

    def install(self, service: Service) -> list[Step]:
        return [
            MakeFolder(self._plist.parent),
            MakeFolder(self._logs),
            WriteFile(self._plist, plistlib.dumps(self.plist(service), sort_keys=False)),
            *self._stop(service.stop_timeout),
            RunCommand(("launchctl", "enable", self._target)),
            RunCommand(("launchctl", "bootstrap", self._domain, str(self._plist))),
        ]

    def uninstall(self) -> list[Step]:
        return [
            RunCommand(("launchctl", "bootout", self._target), may_fail=True),
            RemoveFile(self._plist),
        ]

    def status(self, run: Runner) -> tuple[str, bool]:
        """What to tell the user, and whether the service runs."""
        result = run(("launchctl", "print", self._target))
        if result.returncode != 0:
            return "not installed", False
        wanted = r"^\s*(state|pid|runs|last exit code) = .*$"
        lines = [match[0].strip() for match in re.finditer(wanted, result.output, re.MULTILINE)]
        return "\n".join([*lines, f"log: {self._log}"]), "state = running" in lines

    def hint(self) -> str:
        return f"The log is {self._log}"

    def plist(self, service: Service) -> dict[str, Any]:
        return {
            "Label": LABEL,
            "ProgramArguments": list(service.command),
            "EnvironmentVariables": dict(service.environment),
            "WorkingDirectory": str(service.working_directory),
            "RunAtLoad": True,
            # Exit code 0 is a drain that was asked for; anything else is started again.
            "KeepAlive": {"SuccessfulExit": False},
            "ThrottleInterval": 10,
            # Every other type may be moved to the efficiency cores.
            "ProcessType": "Interactive",
            "ExitTimeOut": service.stop_timeout,
            "StandardOutPath": str(self._log),
            "StandardErrorPath": str(self._log),
            # Each open stream is a descriptor; the default is 256.
            "SoftResourceLimits": {"NumberOfFiles": 8192},
            "Umask": 0o077,
        }

    @property
    def _log(self) -> Path:
        return self._logs / "quire.log"

    def _stop(self, stop_timeout: int) -> Sequence[Step]:
        """A running one drains first, and bootstrap is refused until it has gone."""
        return (
            RunCommand(("launchctl", "bootout", self._target), may_fail=True),
            WaitUntilFails(("launchctl", "print", self._target), stop_timeout + 10),
        )
