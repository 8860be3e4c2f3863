"""Changes to the machine as plain data: planned, shown by a dry run, and then carried out."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

POLL_INTERVAL = 0.5  # seconds


class StepFailed(Exception):
    """A step could not be carried out; the message is one line for the user."""


@dataclass(frozen=True)
class MakeFolder:
    path: Path
    owner: str | None = None  # user name; None: whoever runs this


@dataclass(frozen=True)
class WriteFile:
    path: Path
    content: bytes
    mode: int = 0o644


@dataclass(frozen=True)
class RemoveFile:
    path: Path


@dataclass(frozen=True)
class RunCommand:
    argv: tuple[str, ...]
    may_fail: bool = False
    hint: str = ""  # a sentence for the user if it fails


@dataclass(frozen=True)
class WaitUntilFails:
    """Repeat a query until it fails, that is until what it asks for is gone."""

    argv: tuple[str, ...]
    limit: float  # seconds


Step = MakeFolder | WriteFile | RemoveFile | RunCommand | WaitUntilFails


@dataclass(frozen=True)
class CommandResult:
    returncode: int
    output: str  # standard output and error together


Runner = Callable[[Sequence[str]], CommandResult]


def run_command(argv: Sequence[str]) -> CommandResult:
    """Run ``argv``. Raises :class:`StepFailed` if there is no such program."""
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise StepFailed(f"Cannot run {argv[0]}: {error.strerror}.") from error
    return CommandResult(done.returncode, done.stdout)


def show(step: Step) -> str:
    """The step as a shell user would write it; a file with its content below."""
    match step:
        case MakeFolder(path, owner):
            make = f"install -d -o {shlex.quote(owner)}" if owner else "mkdir -p"
            return f"{make} {shlex.quote(str(path))}"
        case WriteFile(path, content, _):
            return f"write {shlex.quote(str(path))}:\n{content.decode()}"
        case RemoveFile(path):
            return f"rm -f {shlex.quote(str(path))}"
        case RunCommand(argv):
            return shlex.join(argv)
        case WaitUntilFails(argv):
            return f"while {shlex.join(argv)}; do sleep {POLL_INTERVAL}; done"


def carry_out(steps: Sequence[Step], run: Runner) -> None:
    """Do ``steps`` in order. Raises :class:`StepFailed` at the first that fails."""
    for step in steps:
        try:
            _carry_out(step, run)
        except OSError as error:
            raise StepFailed(f"Cannot {show(step).splitlines()[0]}: {error.strerror}.") from error


def _carry_out(step: Step, run: Runner) -> None:
    match step:
        case MakeFolder(path, owner):
            path.mkdir(parents=True, exist_ok=True)
            if owner is not None:
                shutil.chown(path, owner)
        case WriteFile(path, content, mode):
            # The manager may read the file at any time: it sees the old one or the new one.
            draft = path.with_name(path.name + ".new")
            draft.write_bytes(content)
            draft.chmod(mode)
            os.replace(draft, path)
        case RemoveFile(path):
            path.unlink(missing_ok=True)
        case RunCommand(argv, may_fail, hint):
            result = run(argv)
            if result.returncode != 0 and not may_fail:
                reason = " ".join(result.output.split()) or f"exit code {result.returncode}"
                remedy = f" {hint}" if hint else ""
                raise StepFailed(f"{shlex.join(argv)} failed: {reason}{remedy}")
        case WaitUntilFails(argv, limit):
            deadline = time.monotonic() + limit
            while run(argv).returncode == 0:
                if time.monotonic() > deadline:
                    raise StepFailed(f"{shlex.join(argv)} still succeeds after {limit:g} s.")
                time.sleep(POLL_INTERVAL)
