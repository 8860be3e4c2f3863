"""``quire service`` end to end, with a recorder in place of launchctl and systemctl."""

from __future__ import annotations

import argparse
import plistlib
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from quire.deploy import command, steps
from quire.deploy.steps import CommandResult, StepFailed, run_command
from quire.serve import cli


class Recorder:
    """Answers 0 to everything but the commands whose first words are in ``failing``."""

    def __init__(self, *failing: str) -> None:
        self.commands: list[str] = []
        self._failing = failing

    def __call__(self, argv: Sequence[str]) -> CommandResult:
        self.commands.append(" ".join(argv))
        failed = any(self.commands[-1].startswith(start) for start in self._failing)
        return CommandResult(5, "it is\nbroken") if failed else CommandResult(0, "")


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    return tmp_path


def service(run, *argv: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(argv), run)


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_install_and_uninstall_with_launchd(home, capsys):
    run = Recorder("launchctl print")
    assert service(run, "install", "--port", "9000", "--manager", "launchd") == 0
    (plist,) = files(home)
    arguments = plistlib.loads((home / plist).read_bytes())["ProgramArguments"]
    assert arguments[arguments.index("--port") + 1] == "9000"
    assert (home / "Library/Logs/quire").is_dir()
    assert run.commands[-1].startswith("launchctl bootstrap gui/")
    assert "Installed and started." in capsys.readouterr().out

    assert service(run, "uninstall", "--manager", "launchd") == 0
    assert files(home) == []


def test_install_and_uninstall_with_systemd(home):
    run = Recorder()
    assert service(run, "install", "--manager", "systemd") == 0
    assert files(home) == [".config/systemd/user/quire.service"]
    assert service(run, "uninstall", "--manager", "systemd") == 0
    assert files(home) == []
    assert run.commands[-1] == "systemctl --user daemon-reload"


@pytest.mark.parametrize("manager", ["launchd", "systemd"])
@pytest.mark.parametrize(
    "action", ["install", "uninstall", "start", "stop", "restart", "status", "logs"]
)
def test_a_dry_run_changes_nothing(action, manager, home, capsys):
    run = Recorder()
    assert service(run, action, "--manager", manager, "--dry-run") == 0
    assert run.commands == []
    assert list(home.iterdir()) == []
    output = capsys.readouterr().out
    assert str(home) in output or "--user" in output or "gui/" in output
    assert {"install": "ctl ", "logs": "quire"}.get(action, "ctl ") in output


@pytest.mark.parametrize("manager", ["launchd", "systemd"])
@pytest.mark.parametrize("flags", [(), ("--daemon",)])
def test_the_command_that_shows_the_log_is_named_in_full(flags, manager, home, capsys):
    assert service(Recorder(), "install", *flags, "--manager", manager, "--dry-run") == 0
    output = capsys.readouterr().out
    shown = re.search(r"# The log: quire service logs( --daemon)?(, |$)", output, re.MULTILINE)
    assert shown is not None
    assert bool(shown[1]) == bool(flags)


def test_a_failing_command_is_one_line(home, capsys):
    run = Recorder("systemctl --user restart")
    assert service(run, "install", "--manager", "systemd") == 1
    error = capsys.readouterr().err
    assert error == ("quire: error: systemctl --user restart quire.service failed: it is broken\n")


def test_an_old_service_that_will_not_go_is_reported(home, capsys, monkeypatch):
    monkeypatch.setattr(steps, "POLL_INTERVAL", 0)
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(steps.time, "monotonic", lambda: next(clock))
    assert service(Recorder(), "install", "--manager", "launchd") == 1
    assert "still succeeds" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_one_line(home, capsys):
    (home / ".config").write_text("in the way")
    assert service(Recorder(), "install", "--manager", "systemd") == 1
    error = capsys.readouterr().err
    assert error.startswith("quire: error: Cannot mkdir")
    assert len(error.splitlines()) == 1


def test_a_missing_program_is_one_line():
    with pytest.raises(StepFailed, match=r"Cannot run no-such-program: No such file"):
        run_command(["no-such-program"])


def test_output_and_exit_code_of_a_command():
    assert run_command(["sh", "-c", "echo out; echo err >&2; exit 4"]) == CommandResult(
        4, "out\nerr\n"
    )


def test_status_tells_by_its_exit_code(home):
    assert service(Recorder(), "status", "--manager", "systemd") == 0
    assert service(Recorder("systemctl"), "status", "--manager", "systemd") == 3


def test_variables_that_the_service_will_not_see_are_mentioned(home, capsys, monkeypatch):
    monkeypatch.setenv("QUIRE_PORT", "9000")
    service(Recorder(), "install", "--manager", "systemd", "--dry-run")
    assert "does not see QUIRE_PORT; pass --port" in capsys.readouterr().err


def test_bad_flags_exit_with_2(home, capsys):
    assert cli.main(["service", "install", "--port", "x", "--dry-run"]) == 2
    assert capsys.readouterr().err.startswith("quire: error: flag --port")
    with pytest.raises(SystemExit) as caught:
        cli.main(["service", "install", "--nonsense", "1"])
    assert caught.value.code == 2


def test_the_prometheus_configuration_is_in_the_package():
    import importlib.resources

    text = importlib.resources.files("quire.deploy").joinpath("prometheus.yml").read_text()
    assert "metrics_path: /metrics" in text
    assert '["127.0.0.1:8000"]' in text


def test_the_daemon_needs_root_and_says_so(home, capsys, monkeypatch):
    monkeypatch.setattr(command.os, "geteuid", lambda: 501)
    run = Recorder()
    assert service(run, "install", "--daemon", "--manager", "launchd") == 1
    assert "sudo quire service install" in capsys.readouterr().err
    assert run.commands == []


def test_the_daemon_runs_as_the_caller_of_sudo(home, capsys, monkeypatch):
    monkeypatch.setenv("SUDO_USER", "daemon")
    assert service(Recorder(), "install", "--daemon", "--manager", "systemd", "--dry-run") == 0
    assert "User=daemon\n" in capsys.readouterr().out


def test_logs_are_shown_by_the_systems_own_program(home, monkeypatch):
    shown = []
    monkeypatch.setattr(command.subprocess, "call", lambda argv: shown.append(argv) or 0)
    assert service(Recorder(), "logs", "--manager", "systemd", "--follow") == 0
    assert service(Recorder(), "logs", "--manager", "launchd", "-n", "7") == 0
    assert shown[0][:2] == ("journalctl", "--user")
    assert shown[0][-1] == "--follow"
    assert shown[1] == ("tail", "-n", "7", str(home / "Library/Logs/quire/quire.log"))
