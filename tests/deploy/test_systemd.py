"""The unit file: options in their sections, words that survive systemd's quoting."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.deploy.service import Account, Service, describe_service
from quire.deploy.steps import CommandResult, WriteFile
from quire.deploy.systemd import Systemd

SOMEONE = Account("someone", 1000, Path("/home/someone"))
MANAGER = Systemd(SOMEONE, Path("/home/someone/.config"))
DAEMON = Systemd(SOMEONE, Path("/nowhere"), daemon=True)


def parse(service: Service) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=False, delimiters=("=",))
    parser.optionxform = str
    parser.read_string(MANAGER.unit(service))
    return parser


def split(line: str) -> list[str]:
    """The words of a line in which every word is in double quotes, as systemd reads them."""
    words, rest = [], line
    while rest:
        assert rest[0] == '"'
        word, position = "", 1
        while rest[position] != '"':
            position += rest[position] == "\\"
            word += rest[position]
            position += 1
        words.append(word.replace("%%", "%"))
        rest = rest[position + 1 :].lstrip(" ")
    return words


def test_the_options_that_matter():
    service = describe_service({"port": "9000", "drain_timeout": "60"}, {}, Path("/home/someone"))
    unit = parse(service)
    options = unit["Service"]
    words = split(options["ExecStart"])
    assert words[0] == f":{sys.executable}"
    assert words[1:] == list(service.command[1:])
    assert int(options["TimeoutStopSec"]) > 60
    assert options["Restart"] == "on-failure"
    assert options["KillSignal"] == "SIGTERM"
    assert options["KillMode"] == "mixed"
    assert int(options["LimitNOFILE"]) >= 4096
    assert unit["Install"]["WantedBy"] == "default.target"


@given(st.lists(st.text().filter(str.isprintable), min_size=1))
def test_every_word_survives(words):
    service = Service("/bin/x", words, {}, Path("/"), 40)
    command = split(parse(service)["Service"]["ExecStart"])
    assert command == [":/bin/x", "-m", "quire.serve.cli", *words]


def test_install_restarts_a_running_service_with_the_new_file():
    service = describe_service({}, {}, Path("/home/someone"))
    steps = MANAGER.install(service)
    (file,) = (step for step in steps if isinstance(step, WriteFile))
    assert file.path == Path("/home/someone/.config/systemd/user/quire.service")
    commands = [" ".join(step.argv) for step in steps if hasattr(step, "argv")]
    assert commands == [
        "systemctl --user daemon-reload",
        "systemctl --user enable quire.service",
        "systemctl --user reset-failed quire.service",
        "systemctl --user restart quire.service",
    ]


def test_status_is_what_systemctl_says():
    assert MANAGER.status(lambda argv: CommandResult(0, "active\n")) == ("active", True)
    assert MANAGER.status(lambda argv: CommandResult(3, "inactive\n")) == ("inactive", False)


def test_the_systems_unit_runs_as_the_user_from_boot_on():
    service = describe_service({}, {}, Path("/home/someone"))
    unit = configparser.ConfigParser(interpolation=None, strict=False, delimiters=("=",))
    unit.optionxform = str
    unit.read_string(DAEMON.unit(service))
    assert unit["Service"]["User"] == "someone"
    assert unit["Install"]["WantedBy"] == "multi-user.target"
    assert unit["Unit"]["After"] == "network-online.target"
    steps = DAEMON.install(service)
    assert steps[1].path == Path("/etc/systemd/system/quire.service")
    assert not any("--user" in step.argv for step in steps if hasattr(step, "argv"))


def test_failures_end_and_are_forgotten_on_request():
    unit = parse(describe_service({}, {}, Path("/home/someone")))
    assert (unit["Unit"]["StartLimitBurst"], unit["Unit"]["StartLimitIntervalSec"]) == ("5", "300")
    assert unit["Service"]["RestartPreventExitStatus"] == "2"
    for steps in (MANAGER.start(), MANAGER.restart()):
        assert steps[0].argv[2] == "reset-failed"


@pytest.mark.parametrize("daemon", [False, True])
@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_systemd_accepts_the_unit(tmp_path, daemon):
    home = tmp_path / "home & <100%> of $USER"
    home.mkdir()
    program = home / "pythön 3"
    program.symlink_to(sys.executable)
    service = Service(
        str(program), ("--model", 'a "b" \\ $HOME 100%'), {"HF_HOME": str(home)}, home, 40
    )
    unit = tmp_path / "quire.service"
    account = Account("root", 0, home)
    unit.write_text(Systemd(account, tmp_path, daemon).unit(service))
    result = subprocess.run(
        ["systemd-analyze", "verify", *([] if daemon else ["--user"]), str(unit)],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "XDG_RUNTIME_DIR": str(tmp_path), "HOME": str(home)},
    )
    assert result.stderr == ""
    assert result.returncode == 0
