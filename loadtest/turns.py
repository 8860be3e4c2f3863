"""Loads on servers that are running, in turns: `python -m quire.loadtest.turns --server A=URL ...`.

    python -m quire.loadtest.turns --server old=http://127.0.0.1:8001 \\
        --server new=http://127.0.0.1:8000 --load mixed:64:384:10 --load uniform:64:384:7:85

A load is WORKLOAD:CLIENTS:REQUESTS:ROUNDS, with :CHARS for the length of a prompt and :TOKENS for
that of an answer behind, if wished. In a round every server gets the same texts, in an order that
turns round; each round has its own texts. While one server works, the others wait.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import msgspec

from quire.loadtest import environment
from quire.loadtest.chat import Target
from quire.loadtest.compare import LOAD_METRICS, Metric
from quire.loadtest.environment import Environment
from quire.loadtest.http import BaseURL
from quire.loadtest.result_file import FORMAT_VERSION, save
from quire.loadtest.results import LoadResult
from quire.loadtest.serve import LoadOptions, find_target, measure_load
from quire.loadtest.stats import LoadSummary, Median, number
from quire.loadtest.workloads import WORKLOADS, WorkloadSpec, conversations


class Load(NamedTuple):
    """One load and how often it is run."""

    options: LoadOptions
    rounds: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ValueError for a load that is none."""
        name, clients, requests, rounds, *rest = text.split(":")
        workload = next(each for each in (*WORKLOADS, None) if each in (name, None))
        if workload is None or len(rest) > 2 or int(rounds) < 1:
            raise ValueError(f"--load: {text!r} is not WORKLOAD:CLIENTS:REQUESTS:ROUNDS")
        chars, tokens = [*map(int, rest), *[0, 0]][:2]
        spec = WorkloadSpec(
            name=workload,
            requests=int(requests),
            max_tokens=tokens or 64,
            prompt_chars=chars or None,
        )
        conversations(spec)  # raises where it is impossible
        return cls(LoadOptions(spec, clients=int(clients), warmup=int(clients)), int(rounds))

    @property
    def name(self) -> str:
        return f"{self.options.workload.name}, {self.options.clients} clients"

    def of_round(self, number: int) -> LoadOptions:
        """Only the first round warms up."""
        spec = msgspec.structs.replace(
            self.options.workload, seed=self.options.workload.seed + number
        )
        warmup = 0 if number else self.options.warmup
        return msgspec.structs.replace(self.options, workload=spec, warmup=warmup)


class Turn(msgspec.Struct):
    load: str
    round: int
    server: str
    summary: LoadSummary


class TurnsResult(msgspec.Struct, tag="turns", tag_field="kind"):
    command: str
    servers: dict[str, str | None]  # name and Server header
    turns: list[Turn]
    environment: Environment
    note: str = ""
    format_version: int = FORMAT_VERSION

    @property
    def loads(self) -> list[str]:
        return list(dict.fromkeys(turn.load for turn in self.turns))

    def figures(self, load: str, metric: Metric) -> dict[str, list[float]]:
        """One metric by server, in the order of the rounds in which no request failed."""
        failed = {(turn.load, turn.round) for turn in self.turns if turn.summary.errors}
        found: dict[str, list[float]] = {name: [] for name in self.servers}
        for turn in self.turns:
            value = metric.of(turn) if turn.load == load else None
            if value is not None and (turn.load, turn.round) not in failed:
                found[turn.server].append(value)
        return found

    def ratios(self, load: str, metric: Metric) -> dict[str, Median]:
        """The last server against each other one, round by round; above 1 the last is better."""
        figures = self.figures(load, metric)
        *others, last = figures
        if metric.better == "higher":
            pairs = {name: zip(figures[last], figures[name], strict=True) for name in others}
        else:
            pairs = {name: zip(figures[name], figures[last], strict=True) for name in others}
        return {
            name: Median.of(over / under for over, under in pairs[name])
            for name in others
            if figures[name]
        }


async def take_turns(
    servers: Mapping[str, BaseURL],
    loads: Sequence[Load],
    on_load: Callable[[TurnsResult], None] = lambda so_far: None,
) -> TurnsResult:
    """Raises ServerError where a server does not answer. Failed requests are in the summaries.

    ``on_load`` hears of the result so far as each load ends.
    """
    targets: dict[str, tuple[Target, str | None]] = {
        name: await find_target(base, None, loads[0].options) for name, base in servers.items()
    }
    result = TurnsResult(
        command=environment.command_line(),
        servers={name: header for name, (_, header) in targets.items()},
        turns=[],
        environment=environment.describe(),
    )
    names = list(targets)
    for load in loads:
        for round_number in range(load.rounds):
            turned = round_number % len(names)
            measured: dict[str, LoadResult] = {}
            for name in names[turned:] + names[:turned]:
                target, header = targets[name]
                measured[name] = await measure_load(target, header, load.of_round(round_number))
            for name in names:
                summary = measured[name].summary
                result.turns.append(Turn(load.name, round_number, name, summary))
            rates = (number(measured[name].summary.output_tokens_per_s) for name in names)
            shown = "  ".join(f"{n} {rate}" for n, rate in zip(names, rates, strict=True))
            print(f"{load.name}, round {round_number + 1}: {shown} tokens/s", flush=True)
        on_load(result)
    return result


def _print(result: TurnsResult) -> None:
    for load in result.loads:
        print(load)
        for metric in LOAD_METRICS:
            medians = {
                name: Median.of(values).value
                for name, values in result.figures(load, metric).items()
                if values
            }
            shown = "  ".join(f"{name} {number(value)}" for name, value in medians.items())
            ratios = result.ratios(load, metric).items()
            print(f"  {metric.label:20} {shown}  ", "  ".join(f"/{n} {r}" for n, r in ratios))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m quire.loadtest.turns")
    parser.add_argument("--server", action="append", required=True, metavar="NAME=URL")
    parser.add_argument("--load", action="append", required=True, type=Load.parse, metavar="LOAD")
    parser.add_argument("--note", default="", help="what the servers are, for the record")
    parser.add_argument("--out", type=Path, help="write all summaries as JSON")
    args = parser.parse_args()
    servers = {
        name: BaseURL.parse(url) for name, url in (each.split("=", 1) for each in args.server)
    }

    def heard(result: TurnsResult) -> None:
        result.note = args.note
        if args.out:
            save(args.out, result)

    result = asyncio.run(take_turns(servers, args.load, heard))
    _print(result)
    return 1 if any(turn.summary.errors for turn in result.turns) else 0


if __name__ == "__main__":
    sys.exit(main())
