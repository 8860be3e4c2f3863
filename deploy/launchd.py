"""The macOS service: a LaunchAgent in the user's own session, or a LaunchDaemon from boot on.

Keys as in launchd.plist(5), commands as in launchctl(1).
"""

from __future__ import annotations

import os
import plistlib
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire.deploy.service import Account, Service
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
STOP_TIMEOUT = 60  # seconds; for a plist that is not at hand

_NO_SESSION = (
    "An agent needs the user to be logged in at the screen. Log in there once, or install the "
    "daemon, which needs nobody: sudo quire service install --daemon"
)
_SLEEP_HINT = (
    "A Mac that sleeps stops serving. To keep it awake on mains power: sudo pmset -c sleep 0"
)
# macOS denies these folders to background programs without asking anybody.
_PROTECTED = ("Desktop", "Documents", "Downloads", "Library/Mobile Documents")


def service_advice() -> Iterator[tuple[str, str]]:
    """Names and lines of what stops a service on this Mac that nothing else would tell."""
    if sys.platform != "darwin":
        return
    if os.environ.get("SSH_CONNECTION"):
        yield "session", _NO_SESSION
    yield "sleep", _SLEEP_HINT
    yield "folders", f"macOS hides {', '.join(_PROTECTED)} and other disks from services"


@dataclass(frozen=True)
class Launchd:
    """Plans the steps for ``launchctl``."""

    account: Account
    daemon: bool = False

    @property
    def _domain(self) -> str:
        return "system" if self.daemon else f"gui/{self.account.uid}"

    @property
    def _target(self) -> str:
        return f"{self._domain}/{LABEL}"

    @property
    def _plist(self) -> Path:
        library = Path("/Library") if self.daemon else self.account.home / "Library"
        return library / ("LaunchDaemons" if self.daemon else "LaunchAgents") / f"{LABEL}.plist"

    @property
    def log(self) -> Path:
        library = Path("/Library") if self.daemon else self.account.home / "Library"
        return library / "Logs" / "quire" / "quire.log"

    def install(self, service: Service) -> list[Step]:
        owner = self.account.name if self.daemon else None
        content = plistlib.dumps(self.plist(service), sort_keys=False)
        return [
            MakeFolder(self._plist.parent),
            MakeFolder(self.log.parent, owner),
            WriteFile(self._plist, content),
            *self._stop(service.stop_timeout),
            *self._load(),
        ]

    def uninstall(self) -> list[Step]:
        return [*self._stop(STOP_TIMEOUT), RemoveFile(self._plist), RemoveFile(self._starts)]

    def start(self) -> list[Step]:
        return [
            RemoveFile(self._starts),
            RunCommand(("launchctl", "enable", self._target)),
            # Fails where it is loaded already; then kickstart alone is needed.
            RunCommand(("launchctl", "bootstrap", self._domain, str(self._plist)), may_fail=True),
            RunCommand(("launchctl", "kickstart", self._target), hint=_NO_SESSION),
        ]

    def stop(self) -> list[Step]:
        """Until the next start or login: unloaded, so that nothing starts it again."""
        return [*self._stop(STOP_TIMEOUT)]

    def restart(self) -> list[Step]:
        """Also reads a changed plist, and runs what an upgrade has put in place."""
        return [*self._stop(STOP_TIMEOUT), *self._load()]

    @property
    def installed(self) -> bool:
        return self._plist.exists()

    @property
    def status_query(self) -> tuple[str, ...]:
        return ("launchctl", "print", self._target)

    def status(self, run: Runner) -> tuple[str, bool]:
        """What to tell the user, and whether the service runs."""
        result = run(self.status_query)
        if result.returncode != 0:
            return "not loaded" if self._plist.exists() else "not installed", False
        wanted = r"^\s*(state|pid|runs|last exit code) = .*$"
        lines = [match[0].strip() for match in re.finditer(wanted, result.output, re.MULTILINE)]
        return "\n".join([*lines, f"log: {self.log}"]), "state = running" in lines

    def logs(self, lines: int, follow: bool) -> tuple[str, ...]:
        """The command that shows the log."""
        # -F goes on with the new file when the old one is renamed.
        return ("tail", "-n", str(lines), *(("-F",) if follow else ()), str(self.log))

    def hints(self, service: Service) -> list[str]:
        flag = " --daemon" if self.daemon else ""
        hints = [f"The log: quire service logs{flag}, in {self.log}", _SLEEP_HINT]
        folders = [self.account.home / folder for folder in _PROTECTED] + [Path("/Volumes")]
        for word in service.arguments:
            path = Path(word)
            if path.is_absolute() and any(path.is_relative_to(folder) for folder in folders):
                hints.append(
                    f"macOS hides {path} from background programs: move it, for instance to "
                    f"~/Models, or give {service.interpreter} Full Disk Access in the settings"
                )
        return hints

    def plist(self, service: Service) -> dict[str, Any]:
        home = str(service.working_directory)
        user = {"UserName": self.account.name} if self.daemon else {}
        environment = dict(service.environment) | ({"HOME": home} if self.daemon else {})
        launch = ("-m", "quire.deploy.launch", str(self.log))
        return {
            "Label": LABEL,
            **user,
            "ProgramArguments": [service.interpreter, *launch, *service.arguments],
            "EnvironmentVariables": environment,
            "WorkingDirectory": home,
            "RunAtLoad": True,
            # Exit code 0 is a drain that was asked for, or an error that no new start can mend.
            "KeepAlive": {"SuccessfulExit": False},
            "ThrottleInterval": 10,
            # Every other type may be moved to the efficiency cores.
            "ProcessType": "Interactive",
            "ExitTimeOut": service.stop_timeout,
            "StandardOutPath": str(self.log),
            "StandardErrorPath": str(self.log),
            # Each open stream is a descriptor; the default is 256.
            "SoftResourceLimits": {"NumberOfFiles": 8192},
            "Umask": 0o077,
        }

    @property
    def _starts(self) -> Path:
        """Where :mod:`quire.deploy.launch` counts the latest starts."""
        return self.log.with_name("starts")

    def _stop(self, stop_timeout: int) -> Sequence[Step]:
        """A running one drains first, and bootstrap is refused until it has gone."""
        return (
            RunCommand(("launchctl", "bootout", self._target), may_fail=True),
            WaitUntilFails(self.status_query, stop_timeout + 10),
        )

    def _load(self) -> Sequence[Step]:
        bootstrap = ("launchctl", "bootstrap", self._domain, str(self._plist))
        return (
            RemoveFile(self._starts),
            RunCommand(("launchctl", "enable", self._target)),
            RunCommand(bootstrap, hint="" if self.daemon else _NO_SESSION),
        )
