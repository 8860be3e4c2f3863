"""``quire service``: the server as a background service of the user."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from quire.deploy.launchd import Launchd
from quire.deploy.service import describe_service
from quire.deploy.steps import Runner, StepFailed, carry_out, run_command, show
from quire.deploy.systemd import Systemd
from quire.serve import settings
from quire.serve.settings import SettingsError

Manager = Launchd | Systemd

_PLATFORM_MANAGERS = {"darwin": "launchd", "linux": "systemd"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    install = actions.add_parser(
        "install",
        help="start the server now and at every login; takes the flags of `quire serve`",
        allow_abbrev=False,
    )
    settings.add_arguments(install)
    uninstall = actions.add_parser(
        "uninstall", help="stop the server and forget it", allow_abbrev=False
    )
    status = actions.add_parser("status", help="show whether the server runs", allow_abbrev=False)
    for action in (install, uninstall):
        action.add_argument(
            "--dry-run", action="store_true", help="show what would be done, and do nothing"
        )
    for action in (install, uninstall, status):
        action.add_argument(
            "--manager",
            choices=sorted(set(_PLATFORM_MANAGERS.values())),
            default=_PLATFORM_MANAGERS.get(sys.platform),
            help="service manager (default: this system's)",
        )


def run(args: argparse.Namespace, run: Runner = run_command) -> int:
    """0 if done (for status: if the server runs), 1 if a step failed, 3 if it does not run."""
    manager = _manager(args.manager)
    try:
        if args.action == "status":
            text, running = manager.status(run)
            print(text)
            return 0 if running else 3
        if args.action == "install":
            flags = settings.flags_of(args)
            steps = manager.install(describe_service(flags, os.environ, Path.home()))
            _warn_about_variables()
        else:
            steps = manager.uninstall()
        if args.dry_run:
            print("\n".join(map(show, steps)))
            return 0
        carry_out(steps, run)
    except StepFailed as error:
        print(f"quire: error: {error}", file=sys.stderr)
        return 1
    print("Installed and started." if args.action == "install" else "Stopped and removed.")
    if args.action == "install":
        print(manager.hint())
    return 0


def _manager(name: str | None) -> Manager:
    if name == "launchd":
        return Launchd(Path.home(), os.getuid())
    if name == "systemd":
        config_home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
        return Systemd(Path(config_home))
    raise SettingsError(f"no service manager is known for {sys.platform}; run `quire serve`")


def _warn_about_variables() -> None:
    ignored = [setting for setting in settings.SETTINGS if os.environ.get(setting.variable)]
    for setting in ignored:
        print(
            f"quire: note: the service does not see {setting.variable}; pass {setting.flag}",
            file=sys.stderr,
        )
