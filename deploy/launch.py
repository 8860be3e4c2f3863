"""What launchd runs: ``python -m quire.deploy.launch LOG serve [FLAG...]``.

launchd starts again whatever ends with another code than 0, for ever, and lets its log grow. So an
error that no new start can mend ends with 0 here, as does the start after which the server has been
started too often, and the log is renamed when it is large.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from quire.serve import cli

BAD_SETTINGS = 2  # the command's exit code for a setting that is wrong
# As systemd counts with StartLimitBurst and StartLimitIntervalSec.
START_LIMIT = 5
START_INTERVAL = 300.0  # seconds
LOG_LIMIT = 10 * 2**20  # bytes
LOG_CHECK_INTERVAL = 300.0  # seconds; an idle service hardly ever wakes up for this


def main(argv: Sequence[str]) -> int:
    log, *command = argv
    starts = RecentStarts(Path(log).with_name("starts"))
    rotate(Path(log))
    if not starts.allowed(time.time()):
        print(
            f"quire: error: started {START_LIMIT} times in {START_INTERVAL:g} s without success; "
            "not started again. When the cause is mended: quire service restart",
            file=sys.stderr,
        )
        return 0
    watcher = threading.Thread(target=_watch, args=(Path(log),), daemon=True)
    watcher.start()
    code = cli.main(command)
    if code == BAD_SETTINGS:
        print("quire: not started again; mend it, then: quire service restart", file=sys.stderr)
        code = 0
    if code == 0:
        starts.forget()
    return code


class RecentStarts:
    """Times of the latest starts, kept in a file: a process that is killed cannot count itself."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def allowed(self, now: float) -> bool:
        """Count a start at ``now``, in seconds since the epoch; False if it is one too many."""
        recent = [start for start in self._read() if 0 <= now - start < START_INTERVAL]
        if len(recent) >= START_LIMIT:
            # What starts it next is a person or a login.
            self.forget()
            return False
        # On a full disk nobody counts; the server is worth more than the count.
        with contextlib.suppress(OSError):
            self._path.write_text("".join(f"{start}\n" for start in [*recent, now]))
        return True

    def forget(self) -> None:
        self._path.unlink(missing_ok=True)

    def _read(self) -> list[float]:
        try:
            return [float(line) for line in self._path.read_text().splitlines()]
        except (OSError, ValueError):
            return []


def rotate(log: Path, limit: int = LOG_LIMIT) -> None:
    """Rename a log over ``limit`` bytes and write on in a new one.

    launchd opened the log as standard output and error: both are replaced, each in one system call.
    """
    try:
        if log.stat().st_size < limit:
            return
        os.replace(log, log.with_name(log.name + ".1"))
        fresh = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    except OSError:
        return  # No folder or no room: the server runs on, and the next check tries again.
    os.dup2(fresh, 1)
    os.dup2(fresh, 2)
    os.close(fresh)


def _watch(log: Path) -> None:
    while True:
        time.sleep(LOG_CHECK_INTERVAL)
        rotate(log)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
