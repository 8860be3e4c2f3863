"""Where a measurement was made, so that its figures can be judged later."""

from __future__ import annotations

import datetime
import functools
import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata

import msgspec

# One of mlx-metal, mlx-cuda-13 and mlx-cpu says what mlx computes on.
_PACKAGES = ("quire", "mlx", "mlx-metal", "mlx-cuda-13", "mlx-cpu", "mlx-lm", "transformers")
_GPU_SECONDS = 10.0  # for nvidia-smi, which is slow to start on an idle driver


class Environment(msgspec.Struct, frozen=True):
    python: str
    platform: str
    machine: str
    cpu_count: int  # that this process may use
    packages: dict[str, str]  # versions installed beside the client, by distribution name
    time: str  # UTC, ISO 8601
    gpus: list[str] = []  # "name, driver version" of each NVIDIA GPU


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def _nvidia_gpus() -> tuple[str, ...]:
    """Empty where there is no driver, and where it does not answer."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=_GPU_SECONDS
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(answer.stdout.strip().splitlines())


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
        gpus=list(_nvidia_gpus()),
    )


def command_line() -> str:
    """The command that runs now, without the folder it was started from."""
    program = os.path.basename(sys.argv[0])
    spec = sys.modules["__main__"].__spec__  # of a module run by its name
    name = ["quire", "bench"] if program == "__main__.py" else [program]
    if spec is not None and program != "__main__.py":
        name = ["python", "-m", spec.name]
    return shlex.join([*name, *sys.argv[1:]])
