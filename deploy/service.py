"""What a background service runs, whichever service manager starts it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from quire.serve.settings import (
    SETTINGS,
    SettingsError,
    absolute,
    check_files,
    check_models,
    load,
)

# Where model files are found. Secrets stay out: service files are often readable by everyone,
# and the Hugging Face token has a file of its own.
_PASSED_ON = ("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE")
_SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
STOP_MARGIN = 20  # seconds beyond the drain: the worker leaves, the last answers are sent


@dataclass(frozen=True)
class Account:
    """The user that the server runs as."""

    name: str
    uid: int
    home: Path


@dataclass(frozen=True)
class Service:
    """A command line that needs no shell: absolute paths, nothing to expand."""

    interpreter: str
    arguments: tuple[str, ...]  # of the quire command: "serve" and its flags
    environment: Mapping[str, str]
    working_directory: Path
    stop_timeout: int  # seconds; longer than the drain

    @property
    def command(self) -> tuple[str, ...]:
        return (self.interpreter, "-m", "quire.serve.cli", *self.arguments)


def describe_service(flags: Mapping[str, str], environ: Mapping[str, str], home: Path) -> Service:
    """The service that runs ``quire serve`` with ``flags``.

    Paths among them are seen from the current directory.

    Raises:
        SettingsError: a value that ``quire serve`` would refuse, or a file or folder that is not
            there.
    """
    # The service will not see this shell's QUIRE_* variables, so they do not count here either.
    pinned = absolute(flags, Path.cwd())
    settings = load(pinned, {})
    check_models(settings)
    check_files(settings)
    if settings.port == 0:
        raise SettingsError("a service needs a port of its own; give one with --port")
    for name in ("api_key", "admin_key"):
        if getattr(settings, name) is not None and name in flags:
            raise SettingsError(
                "everybody can read a service's definition: keys belong into a file, given with "
                "--api-key-file (see `quire keys`)"
            )
    # As a flag it wins over a later edit of the file, so the manager's patience stays enough.
    pinned["drain_timeout"] = f"{settings.drain_timeout:g}"

    arguments = ["serve"]
    if "config" in pinned:
        arguments += ["--config", pinned["config"]]
    for setting in SETTINGS:
        if setting.name in pinned:
            arguments += [setting.flag, pinned[setting.name]]
    interpreter = lasting_path(sys.executable)
    environment = {"PATH": _SYSTEM_PATH, "PYTHONUNBUFFERED": "1"}
    environment |= {name: environ[name] for name in _PASSED_ON if environ.get(name)}
    for text in (interpreter, *arguments, *environment.values(), str(home)):
        if not text.isprintable():
            raise SettingsError(f"a service cannot be given control characters, as in {text!r}")
    return Service(
        interpreter=interpreter,
        arguments=tuple(arguments),
        environment=environment,
        working_directory=home,
        stop_timeout=int(settings.drain_timeout) + 1 + STOP_MARGIN,
    )


def lasting_path(interpreter: str) -> str:
    """The path that stays when Homebrew upgrades: ``opt/NAME`` instead of ``Cellar/NAME/1.2``."""
    match = re.fullmatch(r"(.*)/Cellar/([^/]+)/[^/]+/(.*)", interpreter)
    if match is None:
        return interpreter
    lasting = f"{match[1]}/opt/{match[2]}/{match[3]}"
    return lasting if os.path.exists(lasting) else interpreter
