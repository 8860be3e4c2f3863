"""The command line as a user meets it: real processes, exit codes, one-line errors."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest

from quire.serve import cli


def quire(*argv: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "quire.serve.cli", *argv],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", **environ},
    )


def test_help_lists_the_commands():
    result = quire("--help")
    assert result.returncode == 0
    for command in cli.COMMANDS:
        assert command in result.stdout
    assert quire().stdout == result.stdout


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from quire.serve import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in sys.modules if m.split('.')[0] in "
        "('mlx', 'zmq', 'uvicorn', 'starlette', 'msgspec', 'rich', 'huggingface_hub')])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_version():
    assert quire("--version").stdout == f"quire {version('quire')}\n"


@pytest.mark.parametrize(
    "argv", [["nonsense"], ["--nonsense"], ["--", "serve"], ["serve", "--bad"]]
)
def test_bad_usage_exits_with_2(argv):
    result = quire(*argv)
    assert result.returncode == 2
    assert "error:" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_flag_that_is_nearly_one_is_told():
    assert "did you mean --port?" in quire("serve", "--prot", "1").stderr
    assert quire("doctor", "--dtype", "float32").returncode == 2


def test_help_shows_values_as_they_are_written():
    shown = quire("serve", "--help").stdout
    assert "(default: claude-*)" in " ".join(shown.split())
    assert "(default: no)" in " ".join(shown.split())
    assert "(default: False)" not in shown


def test_a_bad_setting_is_one_line_and_2():
    result = quire("serve", QUIRE_PORT="many")
    assert result.returncode == 2
    assert result.stderr == "quire: error: QUIRE_PORT must be a whole number, not 'many'\n"


def test_flags_cannot_be_abbreviated():
    assert quire("serve", "--max-model", "5").returncode == 2


def test_ctrl_c_is_130_without_a_traceback(monkeypatch, capsys):
    class Command:
        @staticmethod
        def add_arguments(parser):
            parser.add_argument("--flag")

        @staticmethod
        def run(args):
            assert args.flag == "value"
            raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "fake", ("fake_command", "do nothing"))
    monkeypatch.setitem(sys.modules, "fake_command", Command)
    assert cli.main(["fake", "--flag", "value"]) == 130
    assert capsys.readouterr().err == ""
