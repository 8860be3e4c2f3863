"""The property list: what launchd will read, whatever the paths contain."""

from __future__ import annotations

import plistlib
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from quire.deploy.launchd import LABEL, Launchd
from quire.deploy.service import Account, Service, describe_service
from quire.deploy.steps import CommandResult, MakeFolder, WriteFile

SERVICE = Service(
    interpreter="/opt/venv/bin/python",
    arguments=("serve", "--port", "9000"),
    environment={"PATH": "/usr/bin:/bin"},
    working_directory=Path("/Users/someone"),
    stop_timeout=51,
)
HOME = Path("/Users/someone")
AGENT = Launchd(Account("someone", 501, HOME))
DAEMON = Launchd(Account("someone", 501, HOME), daemon=True)
LOG = "/Users/someone/Library/Logs/quire/quire.log"


def written(manager: Launchd, service: Service) -> WriteFile:
    (file,) = (step for step in manager.install(service) if isinstance(step, WriteFile))
    return file


def test_the_plist():
    file = written(AGENT, SERVICE)
    assert file.path == HOME / "Library/LaunchAgents" / f"{LABEL}.plist"
    assert plistlib.loads(file.content) == {
        "Label": LABEL,
        "ProgramArguments": [
            *("/opt/venv/bin/python", "-m", "quire.deploy.launch", LOG),
            *("serve", "--port", "9000"),
        ],
        "EnvironmentVariables": {"PATH": "/usr/bin:/bin"},
        "WorkingDirectory": "/Users/someone",
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": 10,
        "ProcessType": "Interactive",
        "ExitTimeOut": 51,
        "StandardOutPath": LOG,
        "StandardErrorPath": LOG,
        "SoftResourceLimits": {"NumberOfFiles": 8192},
        "Umask": 0o077,
    }


def test_a_clean_drain_fits_into_the_exit_timeout():
    service = describe_service({"drain_timeout": "77"}, {}, HOME)
    plist = plistlib.loads(written(AGENT, service).content)
    assert plist["ExitTimeOut"] > 77


names = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1).filter(
    str.isprintable
)


@given(names, names, names)
def test_every_path_survives_the_round_trip(folder, model, value):
    home = Path("/Users") / folder.replace("/", "_")
    service = Service(f"/opt/{model}", ("--model", model), {"HF_HOME": value}, home, 40)
    agent = Launchd(Account("someone", 501, home))
    plist = plistlib.loads(written(agent, service).content)
    assert plist["ProgramArguments"][0] == f"/opt/{model}"
    assert plist["ProgramArguments"][-2:] == ["--model", model]
    assert plist["EnvironmentVariables"] == {"HF_HOME": value}
    assert plist["StandardErrorPath"] == f"{home}/Library/Logs/quire/quire.log"


def test_nothing_in_the_plist_needs_a_shell():
    plist = plistlib.loads(written(AGENT, describe_service({}, {}, HOME)).content)
    assert Path(plist["ProgramArguments"][0]).is_absolute()
    for text in (*plist["ProgramArguments"], plist["WorkingDirectory"], plist["StandardOutPath"]):
        assert not text.startswith("~")
        assert "$" not in text


def test_an_old_service_is_gone_before_the_new_one_starts():
    commands = [" ".join(step.argv) for step in AGENT.install(SERVICE) if hasattr(step, "argv")]
    assert commands == [
        f"launchctl bootout gui/501/{LABEL}",
        f"launchctl print gui/501/{LABEL}",
        f"launchctl enable gui/501/{LABEL}",
        f"launchctl bootstrap gui/501 {HOME}/Library/LaunchAgents/{LABEL}.plist",
    ]


def test_the_daemon_runs_as_the_user_from_boot_on():
    file = written(DAEMON, SERVICE)
    assert file.path == Path("/Library/LaunchDaemons") / f"{LABEL}.plist"
    assert file.mode == 0o644
    plist = plistlib.loads(file.content)
    assert plist["UserName"] == "someone"
    assert plist["EnvironmentVariables"]["HOME"] == str(HOME)
    assert plist["StandardErrorPath"] == "/Library/Logs/quire/quire.log"
    steps = DAEMON.install(SERVICE)
    assert MakeFolder(Path("/Library/Logs/quire"), "someone") in steps
    assert {step.argv[2] for step in steps if hasattr(step, "argv")} == {
        f"system/{LABEL}",
        "system",
    }
    # An agent must not name a user.
    assert "UserName" not in plistlib.loads(written(AGENT, SERVICE).content)


def test_status_shows_the_lines_that_matter():
    output = "gui/501/x = {\n\tactive count = 1\n\tstate = running\n\n\tpid = 42\n\tnoise = 1\n}\n"
    text, running = AGENT.status(lambda argv: CommandResult(0, output))
    assert running
    assert text == f"state = running\npid = 42\nlog: {HOME}/Library/Logs/quire/quire.log"
    stopped = output.replace("= running", "= not running")
    assert not AGENT.status(lambda argv: CommandResult(0, stopped))[1]
    missing = CommandResult(113, "Could not find service")
    assert AGENT.status(lambda argv: missing) == ("not installed", False)
