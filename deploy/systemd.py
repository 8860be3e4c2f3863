"""The Linux service: a systemd user unit, logging to the journal.

Options as in systemd.service(5) and systemd.exec(5).
"""

from __future__ import annotations

from pathlib import Path

from quire.deploy.service import Service
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


class Systemd:
    """Plans the steps for ``systemctl --user``. ``config_home`` is XDG_CONFIG_HOME."""

    def __init__(self, config_home: Path) -> None:
        self._unit = config_home / "systemd" / "user" / UNIT

    def install(self, service: Service) -> list[Step]:
        return [
            MakeFolder(self._unit.parent),
            WriteFile(self._unit, self.unit(service).encode()),
            _systemctl("daemon-reload"),
            _systemctl("enable", UNIT),
            # Unlike `enable --now` this also replaces one that is running.
            _systemctl("restart", UNIT),
        ]

    def uninstall(self) -> list[Step]:
        return [
            RunCommand(("systemctl", "--user", "disable", "--now", UNIT), may_fail=True),
            RemoveFile(self._unit),
            _systemctl("daemon-reload"),
        ]

    def status(self, run: Runner) -> tuple[str, bool]:
        """What to tell the user, and whether the service runs."""
        result = run(("systemctl", "--user", "status", "--no-pager", "--lines=5", UNIT))
        return result.output.strip(), result.returncode == 0

    def hint(self) -> str:
        return (
            "The log: journalctl --user -u quire\n"
            "To keep it running after you log out: loginctl enable-linger"
        )

    def unit(self, service: Service) -> str:
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
            "\n"
            "[Service]\n"
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
            f"{_SANDBOX}"
            "\n"
            "[Install]\n"
            "WantedBy=default.target\n"
        )


def _systemctl(*arguments: str) -> RunCommand:
    return RunCommand(("systemctl", "--user", *arguments))


def _escape_specifiers(text: str) -> str:
    return text.replace("%", "%%")


def _quote(text: str) -> str:
    escaped = _escape_specifiers(text).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
