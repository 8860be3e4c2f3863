"""`quire service` on an emulated launchd with the real server: its whole life."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import socket
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from launchd_emulator import Launchctl

from quire.deploy import command, launch

PATIENCE = 60  # seconds; only a broken service ever takes this long
INSTALL = ["bootout", "print", "enable", "bootstrap"]


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def launchctl() -> Iterator[Launchctl]:
    fake = Launchctl()
    yield fake
    fake.close()


def service(run: Launchctl, *argv: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([*argv, "--manager", "launchd"]), run)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def eventually_ready(port: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5),
        ):
            return
        time.sleep(0.05)
    raise AssertionError("never ready")


def log(home: Path) -> str:
    return (home / "Library/Logs/quire/quire.log").read_text()


def test_install_crash_upgrade_stop_start_uninstall(home, launchctl, capsys):
    port, other = free_port(), free_port()
    flags = ("--kv-cache-memory", "2MiB", "--device", "cpu")
    assert service(launchctl, "install", "--port", str(port), *flags) == 0
    assert launchctl.calls == INSTALL
    eventually_ready(port)

    first = launchctl.job
    assert first is not None
    first.running.send_signal(signal.SIGKILL)
    eventually_ready(port)
    assert first.exits == [-signal.SIGKILL]

    launchctl.calls.clear()
    assert service(launchctl, "install", "--port", str(other), *flags) == 0
    assert launchctl.calls == INSTALL
    assert first.exits == [-signal.SIGKILL, 0]  # the drain, before the new one starts
    eventually_ready(other)
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)

    assert service(launchctl, "stop") == 0
    assert service(launchctl, "stop") == 0  # once more does no harm
    assert launchctl.job.exits == [0]
    assert service(launchctl, "status") == 3
    assert "not loaded" in capsys.readouterr().out

    launchctl.calls.clear()
    assert service(launchctl, "start") == 0
    assert launchctl.calls == ["enable", "bootstrap", "kickstart"]
    assert service(launchctl, "start") == 0  # it runs on
    eventually_ready(other)
    assert service(launchctl, "status") == 0
    assert len(launchctl.job.spawned) == 1

    assert service(launchctl, "uninstall") == 0
    assert service(launchctl, "uninstall") == 0
    assert service(launchctl, "status") == 3
    assert "not installed" in capsys.readouterr().out
    assert [path.name for path in (home / "Library/Logs/quire").iterdir()] == ["quire.log"]


def test_a_wrong_setting_is_told_once(home, launchctl):
    config = home / "quire.toml"
    config.write_text("drain_timeout = 1\n")
    service(launchctl, "install", "--config", str(config), "--port", str(free_port()))
    config.write_text("drain_timeout = 'long'\n")  # edited later, and wrong
    service(launchctl, "restart")
    launchctl.job.settle()
    assert launchctl.job.exits == [0]
    assert "drain_timeout must be a number" in log(home)
    assert "quire service restart" in log(home)


def test_what_no_new_start_can_mend_is_tried_once(home, launchctl):
    empty = home / "models" / "empty"
    empty.mkdir(parents=True)
    service(launchctl, "install", "--port", str(free_port()), "--model", str(empty))
    launchctl.job.settle()
    assert launchctl.job.exits == [0]
    assert log(home).count("has no config.json") == 1
    assert "not started again" in log(home)


def test_a_server_that_never_starts_is_given_up(home, launchctl):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        service(launchctl, "install", "--port", str(port))
        launchctl.job.settle()
        assert launchctl.job.exits == [1] * launch.START_LIMIT + [0]
        assert log(home).count("Address already in use") == launch.START_LIMIT
        assert "started 5 times in 300 s without success" in log(home)
        # A person's restart counts afresh.
        service(launchctl, "restart")
        launchctl.job.settle()
        assert launchctl.job.exits == [1] * launch.START_LIMIT + [0]


def test_nobody_at_the_screen_gets_a_hint(home, capsys):
    run = Launchctl(at_the_screen=False)
    assert service(run, "install") == 1
    error = capsys.readouterr().err
    assert "125: Domain does not support specified action" in error
    assert "sudo quire service install --daemon" in error


def test_what_is_not_installed_is_not_started(home, launchctl, capsys):
    for action in ("start", "stop", "restart"):
        assert service(launchctl, action) == 1
        assert "No service is installed: quire service install" in capsys.readouterr().err
    assert launchctl.calls == []


def test_the_hints_name_what_surprises_on_a_mac(home, launchctl, capsys):
    model = home / "Documents" / "model"
    model.mkdir(parents=True)
    service(launchctl, "install", "--model", str(model), "--dry-run")
    shown = capsys.readouterr().out
    assert re.search(rf"macOS hides {re.escape(str(model))} from background programs", shown)
    assert "pmset" in shown


def test_the_log_begins_anew_when_it_is_large(tmp_path):
    path = tmp_path / "quire.log"
    program = (
        "import sys, pathlib; from quire.deploy.launch import rotate;"
        f"p = pathlib.Path({str(path)!r}); print('old', flush=True); rotate(p, 3);"
        "print('new', flush=True); print('error', file=sys.stderr, flush=True); rotate(p, 999)"
    )
    with path.open("ab") as out:
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-c", program],
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, out.fileno(), fd) for fd in (1, 2)],
        )
    assert os.waitpid(pid, 0)[1] == 0
    assert (tmp_path / "quire.log.1").read_text() == "old\n"
    assert path.read_text() == "new\nerror\n"


def test_starts_are_counted_in_a_window(tmp_path):
    starts = launch.RecentStarts(tmp_path / "starts")
    assert all(starts.allowed(now) for now in (0, 100, 200, 290, 299))
    assert starts.allowed(301)  # the first is forgotten
    assert not starts.allowed(350)
    assert starts.allowed(351)  # whoever comes after giving up
    (tmp_path / "starts").write_text("not a number")
    assert starts.allowed(400)
