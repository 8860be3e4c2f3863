"""The property list: what launchd will read, whatever the paths contain."""

from __future__ import annotations

import plistlib
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from quire.deploy.launchd import LABEL, Launchd
from quire.deploy.service import Service, describe_service
from quire.deploy.steps import CommandResult, RunCommand, WriteFile

SERVICE = Service(
    command=("/opt/venv/bin/python", "-m", "quire.serve.cli", "serve", "--port", "9000"),
    environment={"PATH": "/usr/bin:/bin"},
    working_directory=Path("/Users/someone"),
    stop_timeout=51,
)
HOME = Path("/Users/someone")


def written(manager: Launchd, service: Service) -> WriteFile:
    (file,) = (step for step in manager.install(service) if isinstance(step, WriteFile))
    return file


def test_the_plist():
    file = written(Launchd(HOME, 501), SERVICE)
    assert file.path == HOME / "Library/LaunchAgents" / f"{LABEL}.plist"
    assert plistlib.loads(file.content) == {
        "Label": LABEL,
        "ProgramArguments": list(SERVICE.command),
        "EnvironmentVariables": {"PATH": "/usr/bin:/bin"},
        "WorkingDirectory": "/Users/someone",
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": 10,
        "ProcessType": "Interactive",
        "ExitTimeOut": 51,
        "StandardOutPath": "/Users/someone/Library/Logs/quire/quire.log",
        "StandardErrorPath": "/Users/someone/Library/Logs/quire/quire.log",
        "SoftResourceLimits": {"NumberOfFiles": 8192},
        "Umask": 0o077,
    }


def test_a_clean_drain_fits_into_the_exit_timeout():
    service = describe_service({"drain_timeout": "77"}, {}, HOME)
    plist = plistlib.loads(written(Launchd(HOME, 501), service).content)
    assert plist["ExitTimeOut"] > 77


names = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1).filter(
    str.isprintable
)


@given(names, names, names)
def test_every_path_survives_the_round_trip(folder, model, value):
    home = Path("/Users") / folder.replace("/", "_")
    service = Service((f"/opt/{model}", "--model", model), {"HF_HOME": value}, home, 40)
    plist = plistlib.loads(written(Launchd(home, 501), service).content)
    assert plist["ProgramArguments"] == [f"/opt/{model}", "--model", model]
    assert plist["EnvironmentVariables"] == {"HF_HOME": value}
    assert plist["StandardErrorPath"] == f"{home}/Library/Logs/quire/quire.log"


def test_nothing_in_the_plist_needs_a_shell():
    plist = plistlib.loads(written(Launchd(HOME, 501), describe_service({}, {}, HOME)).content)
    assert Path(plist["ProgramArguments"][0]).is_absolute()
    for text in (*plist["ProgramArguments"], plist["WorkingDirectory"], plist["StandardOutPath"]):
        assert not text.startswith("~")
        assert "$" not in text


def test_an_old_service_is_gone_before_the_new_one_starts():
    commands = [
        " ".join(step.argv) for step in Launchd(HOME, 501).install(SERVICE) if hasattr(step, "argv")
    ]
    assert commands == [
        f"launchctl bootout gui/501/{LABEL}",
        f"launchctl print gui/501/{LABEL}",
        f"launchctl enable gui/501/{LABEL}",
        f"launchctl bootstrap gui/501 {HOME}/Library/LaunchAgents/{LABEL}.plist",
    ]


def test_uninstall_stops_it_and_removes_the_file():
    stop, remove = Launchd(HOME, 501).uninstall()
    assert stop == RunCommand(("launchctl", "bootout", f"gui/501/{LABEL}"), may_fail=True)
    assert remove.path == HOME / "Library/LaunchAgents" / f"{LABEL}.plist"


def test_status_shows_the_lines_that_matter():
    output = "gui/501/x = {\n\tactive count = 1\n\tstate = running\n\n\tpid = 42\n\tnoise = 1\n}\n"
    text, running = Launchd(HOME, 501).status(lambda argv: CommandResult(0, output))
    assert running
    assert text == f"state = running\npid = 42\nlog: {HOME}/Library/Logs/quire/quire.log"
    stopped = output.replace("= running", "= not running")
    assert not Launchd(HOME, 501).status(lambda argv: CommandResult(0, stopped))[1]
    missing = CommandResult(113, "Could not find service")
    assert Launchd(HOME, 501).status(lambda argv: missing) == ("not installed", False)
