"""The ``quire`` command: picks the module of a sub-command and runs it."""

from __future__ import annotations

import argparse
import difflib
import importlib
import re
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import NoReturn

from quire.serve.log_writer import discard_output
from quire.serve.settings import SettingsError

# Named, not imported: `quire --help` stays instant, and serve/ does not depend on the others.
# Each module offers add_arguments(parser) and run(args) -> exit code.
COMMANDS = {
    "serve": ("quire.serve.serve_command", "serve a model over HTTP"),
    "models": ("quire.serve.models_command", "list, download and delete models"),
    "estimate": ("quire.serve.estimate_command", "tell whether a model fits into the memory"),
    "keys": ("quire.serve.keys_command", "make an API key"),
    "ps": ("quire.serve.ps_command", "show what a running server does"),
    "service": ("quire.deploy.command", "run the server in the background: launchd or systemd"),
    "tune": ("quire.loadtest.tune", "measure this machine's fastest kernels, once"),
    "doctor": ("quire.loadtest.doctor", "show the machine, and check its kernels"),
    "report": ("quire.loadtest.machine_report", "measure this machine for others to read"),
    "bench": ("quire.loadtest.command", "measure a running server, or the kernels"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 2 for bad usage, 130 after Ctrl-C."""
    try:
        return _dispatch(list(sys.argv[1:] if argv is None else argv))
    except SettingsError as error:
        print(f"quire: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `quire ... | head`
        discard_output()
        return 128 + signal.SIGPIPE


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] not in COMMANDS:
        parser = _top_level_parser()
        parser.parse_args(argv or ["--help"])
        parser.error("the command comes first")
    name, rest = argv[0], argv[1:]
    module_name, summary = COMMANDS[name]
    module = importlib.import_module(module_name)
    parser = _Parser(
        prog=f"quire {name}", description=summary[0].upper() + summary[1:] + ".", allow_abbrev=False
    )
    module.add_arguments(parser)
    code = module.run(parser.parse_args(rest))
    assert isinstance(code, int)
    return code


class _Parser(argparse.ArgumentParser):
    """Says which flag may be meant by one that there is none of."""

    def error(self, message: str) -> NoReturn:
        found = re.fullmatch("unrecognized arguments: (--[^ =]+).*", message, re.DOTALL)
        known = [flag for action in self._actions for flag in action.option_strings]
        close = difflib.get_close_matches(found[1], known, n=1) if found else []
        super().error(f"{message}; did you mean {close[0]}?" if close else message)


def _top_level_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="quire",
        description="An OpenAI-compatible model server for MLX.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="`quire COMMAND --help` explains one command.",
    )
    parser.add_argument("--version", action="version", version=f"quire {version('quire')}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (_, summary) in COMMANDS.items():
        commands.add_parser(name, help=summary)
    return parser


if __name__ == "__main__":
    sys.exit(main())
