"""Steps of several versions of Quire in turns: `python -m quire.loadtest.pairs MODEL`.

    python -m quire.loadtest.pairs MODEL --version old=DIR --version new=DIR --decode 1x128 64x128

DIR is a folder in which a version's wheel lies unpacked. Each version has a process and an engine
of its own for the whole run, side by side on one device; while one is timed the others wait. The
first start of a version on a GPU compiles its kernels, which can take minutes. The
ratio of a round is the first version's median step over the other's, above 1 where the other is
faster; printed are the median of the rounds and its 95% interval.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from quire.loadtest import engine_steps, environment
from quire.loadtest.environment import Environment
from quire.loadtest.result_file import FORMAT_VERSION, save
from quire.loadtest.stats import Median
from quire.loadtest.steps import add_plan


class Round(msgspec.Struct):
    ms: dict[str, dict[str, float]]  # median step, by version and by what was run


class PairsResult(msgspec.Struct, tag="pairs", tag_field="kind"):
    command: str
    model: str
    starts: dict[str, dict[str, Any]]  # of each version: seconds, bytes of weights and pages
    rounds: list[Round]
    memory: dict[str, dict[str, int]]  # peaks of the last round
    environment: Environment
    format_version: int = FORMAT_VERSION

    def ratios(self) -> Mapping[str, Mapping[str, Median]]:
        """By what was run and by version: the first version's step over that one's."""
        first, *others = self.rounds[0].ms
        return {
            what: {
                other: Median.of(
                    each.ms[first][what] / each.ms[other][what] for each in self.rounds
                )
                for other in others
            }
            for what in self.rounds[0].ms[first]
        }


class StepProcess:
    """A process that times an engine's steps whenever it is asked."""

    def __init__(self, program: list[str], paths: list[str] | None = None, home: str = "") -> None:
        env = dict(os.environ)
        if paths is not None:
            known = env.get("PYTHONPATH")
            env["PYTHONPATH"] = os.pathsep.join([*paths, known] if known else paths)
        if home:
            env["HOME"] = env["XDG_CACHE_HOME"] = home  # versions discard each other's records
        self._process = subprocess.Popen(
            [sys.executable, *program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )

    def ask(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        """The next line it writes. Raises RuntimeError if it ends instead."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a process ended with {self._process.wait()}; see its output above")
        return json.loads(line)

    def measure(self) -> Any:
        self.ask()
        return self.answer()

    def stop(self) -> None:
        """End it, whatever it does."""
        with self._process:  # waits, and closes its pipes
            self._process.terminate()


def take_turns(
    processes: Mapping[str, StepProcess],
    rounds: int,
    result: PairsResult,
    on_round: Callable[[PairsResult], None],
) -> None:
    """Add ``rounds`` rounds to the result; ``on_round`` hears of it after each.

    Raises RuntimeError where a version ends on the way.
    """
    for number in range(rounds):
        names = list(processes)
        if number % 2:  # who comes second finds a warmer device
            names.reverse()
        answers = {name: processes[name].measure() for name in names}
        result.memory = {name: answer["memory"] for name, answer in answers.items()}
        medians = {
            name: {what: statistics.median(ms) for what, ms in answers[name]["ms"].items()}
            for name in processes
        }
        result.rounds.append(Round(medians))
        on_round(result)


def measure(
    args: argparse.Namespace,
    versions: Mapping[str, str],
    on_round: Callable[[PairsResult], None] = lambda so_far: None,
) -> PairsResult:
    """Raises RuntimeError where a version does not start."""
    plan = engine_steps.Plan(args.decode, args.prompts, args.mixed, args.steps)
    program = ["-P", engine_steps.__file__]
    program.append(engine_steps.settings(args.model, plan, args.kv_cache_memory))
    processes = {
        name: StepProcess(program, [folder], str(Path(folder, ".home")))
        for name, folder in versions.items()
    }
    try:
        result = PairsResult(
            command=environment.command_line(),
            model=Path(args.model).name,
            starts={name: process.answer() for name, process in processes.items()},
            rounds=[],
            memory={},
            environment=environment.describe(),
        )
        for name, start in result.starts.items():
            print(f"{name}: started in {start['start_s']:.1f} s", flush=True)
        take_turns(processes, args.rounds, result, on_round)
    finally:
        for process in processes.values():
            process.stop()
    return result


def _print(result: PairsResult) -> None:
    for what, ratios in result.ratios().items():
        steps = {
            name: statistics.median(each.ms[name][what] for each in result.rounds)
            for name in result.starts
        }
        shown = "  ".join(f"{name} {ms:.2f} ms" for name, ms in steps.items())
        print(f"{what:28} {shown}  " + "  ".join(f"{ratio}" for ratio in ratios.values()))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m quire.loadtest.pairs")
    parser.add_argument("model", help="a model folder")
    parser.add_argument("--version", action="append", required=True, metavar="NAME=DIR")
    add_plan(parser)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="write all medians as JSON")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # takes its processes along
    versions = dict(each.split("=", 1) for each in args.version)
    if len(versions) < 2:
        parser.error("--version: at least two, under different names")

    def heard(so_far: PairsResult) -> None:
        print(f"round {len(so_far.rounds)} of {args.rounds}", flush=True)
        if args.out:
            save(args.out, so_far)

    _print(measure(args, versions, heard))
    return 0


if __name__ == "__main__":
    sys.exit(main())
