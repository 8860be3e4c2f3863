"""The Linux service: a systemd unit of the user or of the system, logging to the journal.

Options as in systemd.service(5) and systemd.exec(5).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quire.deploy.service import Account, Service
from quire.deploy.steps import MakeFolder, RemoveFile, RunCommand, Runner, Step, WriteFile

UNIT = "quire.service"

# Only what needs neither privileges nor a mount namespace, which user managers may not make.
# AF_NETLINK is for getaddrinfo. Generated machine code rules out MemoryDenyWriteExecute.
_SANDBOX = """\
NoNewPrivileges=yes
LockPersonality=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
"""
# The home folder stays writable: models and caches live there.
_SYSTEM_SANDBOX = """\
ProtectSystem=full
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectControlGroups=yes
"""


@dataclass(frozen=True)
class Systemd:
    """Plans the steps for ``systemctl``. ``config_home`` is XDG_CONFIG_HOME, for a user's unit."""

    account: Account
    config_home: Path
    daemon: bool = False

    @property
    def _unit(self) -> Path:
        user_units = self.config_home / "systemd" / "user"
        return (Path("/etc/systemd/system") if self.daemon else user_units) / UNIT

    def install(self, service: Service) -> list[Step]:
        return [
            MakeFolder(self._unit.parent),
            WriteFile(self._unit, self.unit(service).encode()),
            self._systemctl("daemon-reload"),
            self._systemctl("enable", UNIT),
            *self.restart(),
        ]

    def uninstall(self) -> list[Step]:
        return [
            self._systemctl("disable", "--now", UNIT, may_fail=True),
            RemoveFile(self._unit),
            self._systemctl("daemon-reload"),
        ]

    def start(self) -> list[Step]:
        return [self._forget_failures(), self._systemctl("start", UNIT)]

    def stop(self) -> list[Step]:
        return [self._systemctl("stop", UNIT)]

    def restart(self) -> list[Step]:
        return [self._forget_failures(), self._systemctl("restart", UNIT)]

    @property
    def installed(self) -> bool:
        return self._unit.exists()

    @property
    def status_query(self) -> tuple[str, ...]:
        return self._systemctl("status", "--no-pager", "--lines=5", UNIT).argv

    def status(self, run: Runner) -> tuple[str, bool]:
        """What to tell the user, and whether the service runs."""
        result = run(self.status_query)
        return result.output.strip(), result.returncode == 0

    def logs(self, lines: int, follow: bool) -> tuple[str, ...]:
        """The command that shows the log."""
        more = ("--follow",) if follow else ("--no-pager",)
        return ("journalctl", *self._scope, f"--unit={UNIT}", f"--lines={lines}", *more)

    def hints(self, service: Service) -> list[str]:
        hints = ["The log: quire service logs" + (" --daemon" if self.daemon else "")]
        if not self.daemon:
            hints.append("To keep it running after you log out: loginctl enable-linger")
        return hints

    @property
    def _scope(self) -> tuple[str, ...]:
        return () if self.daemon else ("--user",)

    def _systemctl(self, *arguments: str, may_fail: bool = False) -> RunCommand:
        return RunCommand(("systemctl", *self._scope, *arguments), may_fail)

    def _forget_failures(self) -> RunCommand:
        """A unit that failed too often is not started, also when a person asks for it."""
        return self._systemctl("reset-failed", UNIT, may_fail=True)

    def unit(self, service: Service) -> str:
        user = f"User={_escape_specifiers(self.account.name)}\n" if self.daemon else ""
        # Other than a user's session, the boot does not wait for the network by itself.
        network = "After=network-online.target\nWants=network-online.target\n"
        network = network if self.daemon else ""
        # The colon turns off $VARIABLE substitution in the arguments.
        executable, *arguments = service.command
        command = " ".join(map(_quote, [f":{executable}", *arguments]))
        environment = "".join(
            f"Environment={_quote(f'{name}={value}')}\n"
            for name, value in service.environment.items()
        )
        return (
            "[Unit]\n"
            "Description=Quire model server\n"
            # A server that cannot start is left alone in the end.
            "StartLimitIntervalSec=300\n"
            "StartLimitBurst=5\n"
            f"{network}"
            "\n"
            "[Service]\n"
            f"{user}"
            "Type=exec\n"
            f"ExecStart={command}\n"
            f"WorkingDirectory={_escape_specifiers(str(service.working_directory))}\n"
            f"{environment}"
            "Restart=on-failure\n"
            "RestartSec=10\n"
            # Exit code 2 is a setting that is wrong; trying again cannot help.
            "RestartPreventExitStatus=2\n"
            # The drain is the front end's; its worker must not get the signal.
            "KillMode=mixed\n"
            "KillSignal=SIGTERM\n"
            f"TimeoutStopSec={service.stop_timeout}\n"
            "LimitNOFILE=8192\n"
            "UMask=0077\n"
            f"{_SANDBOX}{_SYSTEM_SANDBOX if self.daemon else ''}"
            "\n"
            "[Install]\n"
            f"WantedBy={'multi-user' if self.daemon else 'default'}.target\n"
        )


def _escape_specifiers(text: str) -> str:
    return text.replace("%", "%%")


def _quote(text: str) -> str:
    escaped = _escape_specifiers(text).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
