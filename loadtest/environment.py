"""Where a measurement was made, so that its figures can be judged later."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import sys
from importlib import metadata

import msgspec

_PACKAGES = ("quire", "mlx", "mlx-lm", "transformers")


class Environment(msgspec.Struct, frozen=True):
    python: str
    platform: str
    machine: str
    cpu_count: int  # that this process may use
    packages: dict[str, str]  # versions installed beside the client, by distribution name
    time: str  # UTC, ISO 8601


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def describe() -> Environment:
    """Versions come from package metadata: importing MLX would take a device."""
    versions = {package: _version(package) for package in _PACKAGES}
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return Environment(
        python=platform.python_version(),
        platform=platform.platform(),
        machine=platform.machine(),
        cpu_count=len(affinity(0)) if affinity else os.cpu_count() or 1,
        packages={package: version for package, version in versions.items() if version},
        time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def command_line() -> str:
    """The command that runs now, without the folder it was started from."""
    program = os.path.basename(sys.argv[0])
    name = ["quire", "bench"] if program == "__main__.py" else [program]
    return shlex.join([*name, *sys.argv[1:]])
