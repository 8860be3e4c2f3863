"""``quire service``: the server in the background, as a service of the user or of the machine."""

from __future__ import annotations

import argparse
import os
import pwd
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from quire.deploy.launchd import Launchd
from quire.deploy.service import Account, describe_service
from quire.deploy.steps import RunCommand, Runner, Step, StepFailed, carry_out, run_command, show
from quire.deploy.systemd import Systemd
from quire.serve import settings
from quire.serve.settings import SettingsError

Manager = Launchd | Systemd

_PLATFORM_MANAGERS = {"darwin": "launchd", "linux": "systemd"}
_ACTIONS = {
    "install": "start the server now and at every login; takes the flags of `quire serve`",
    "uninstall": "stop the server and forget it",
    "start": "start the installed server",
    "stop": "let the server finish what runs, and keep it stopped until the next login",
    "restart": "stop and start it, for instance after an upgrade",
    "status": "show whether the server runs",
    "logs": "show the server's log",
}
_DONE = {
    "install": "Installed and started.",
    "uninstall": "Stopped and removed.",
    "start": "Started.",
    "stop": "Stopped.",
    "restart": "Restarted.",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, summary in _ACTIONS.items():
        action = actions.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        if name == "install":
            settings.add_arguments(action)
        if name == "logs":
            action.add_argument(
                "-n", "--lines", type=int, default=100, metavar="N", help="lines (default: 100)"
            )
            action.add_argument(
                "-f", "--follow", action="store_true", help="go on with what comes, until Ctrl-C"
            )
        action.add_argument(
            "--daemon",
            action="store_true",
            help="the service of the machine, from boot on, as the user who calls sudo",
        )
        action.add_argument(
            "--dry-run", action="store_true", help="show what would be done, and do nothing"
        )
        action.add_argument(
            "--manager",
            choices=sorted(set(_PLATFORM_MANAGERS.values())),
            default=_PLATFORM_MANAGERS.get(sys.platform),
            help="service manager (default: this system's)",
        )


def run(args: argparse.Namespace, run: Runner = run_command) -> int:
    """0 if done (for status: if the server runs), 1 if a step failed, 3 if it does not run."""
    manager = _manager(args.manager, args.daemon)
    try:
        if args.action == "status" and not args.dry_run:
            text, running = manager.status(run)
            print(text)
            return 0 if running else 3
        if args.action == "logs" and not args.dry_run:
            return _show_log(manager.logs(args.lines, args.follow))
        return _change(args, manager, run)
    except StepFailed as error:
        print(f"quire: error: {error}", file=sys.stderr)
        return 1


def _show_log(command: Sequence[str]) -> int:
    try:
        return subprocess.call(command)
    except FileNotFoundError:
        raise StepFailed(f"Cannot run {command[0]}: not found.") from None


def _change(args: argparse.Namespace, manager: Manager, run: Runner) -> int:
    hints: list[str] = []
    if args.action == "install":
        service = describe_service(settings.flags_of(args), os.environ, manager.account.home)
        hints = manager.hints(service)
        _warn_about_variables()
        steps = manager.install(service)
    else:
        steps = _steps(args, manager)
    if args.dry_run:
        print("\n".join([*map(show, steps), *(f"# {hint}" for hint in hints)]))
        return 0
    if args.action in ("start", "stop", "restart") and not manager.installed:
        raise StepFailed("No service is installed: quire service install")
    if args.daemon and os.geteuid() != 0:
        raise StepFailed(f"The daemon is root's to change: sudo quire service {args.action} ...")
    carry_out(steps, run)
    print("\n".join([_DONE[args.action], *hints]))
    return 0


def _steps(args: argparse.Namespace, manager: Manager) -> list[Step]:
    match args.action:
        case "uninstall":
            return manager.uninstall()
        case "start":
            return manager.start()
        case "stop":
            return manager.stop()
        case "restart":
            return manager.restart()
        case "logs":
            return [RunCommand(manager.logs(args.lines, args.follow))]
        case _:
            return [RunCommand(manager.status_query)]


def _manager(name: str | None, daemon: bool) -> Manager:
    account = _account(daemon)
    if name == "launchd":
        return Launchd(account, daemon)
    if name == "systemd":
        config_home = os.environ.get("XDG_CONFIG_HOME") or account.home / ".config"
        return Systemd(account, Path(config_home), daemon)
    raise SettingsError(f"no service manager is known for {sys.platform}; run `quire serve`")


def _account(daemon: bool) -> Account:
    """Who calls; for a daemon whoever calls sudo, since the server needs no privileges."""
    name = os.environ.get("SUDO_USER") if daemon else None
    if name is None:
        user = pwd.getpwuid(os.getuid())
        return Account(user.pw_name, user.pw_uid, Path.home())
    user = pwd.getpwnam(name)
    return Account(user.pw_name, user.pw_uid, Path(user.pw_dir))


def _warn_about_variables() -> None:
    ignored = [setting for setting in settings.SETTINGS if os.environ.get(setting.variable)]
    for setting in ignored:
        print(
            f"quire: note: the service does not see {setting.variable}; pass {setting.flag}",
            file=sys.stderr,
        )
