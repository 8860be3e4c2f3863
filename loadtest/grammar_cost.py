"""What grammars cost a step, and the rows beside them: `python -m quire.loadtest.grammar_cost`.

Streams of equal length on a running server, in turns without any grammar, with one in every second
stream, and in all. The grammars are different JSON schemas whose texts do not end before
`max_tokens`. Greedy unless told: a model of random weights samples tokens that have no text.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from quire.loadtest import environment
from quire.loadtest.chat import Target, stream_chat
from quire.loadtest.environment import Environment
from quire.loadtest.http import BaseURL
from quire.loadtest.records import RequestRecord
from quire.loadtest.result_file import FORMAT_VERSION, save
from quire.loadtest.serve import LoadOptions, find_target
from quire.loadtest.stats import Median
from quire.loadtest.workloads import WorkloadSpec

_SETTLING = 8  # gaps at both ends of a stream, while others start or have ended
SHARES = {"none": 0, "half": 2, "all": 1}  # every how many streams have a grammar


class GrammarTurn(msgspec.Struct):
    share: str
    round: int
    with_grammar: list[float]  # median gap of each such stream, ms
    without: list[float]
    tokens_per_s: float


class GrammarCostResult(msgspec.Struct, tag="grammar cost", tag_field="kind"):
    command: str
    streams: int
    turns: list[GrammarTurn]
    environment: Environment
    note: str = ""
    format_version: int = FORMAT_VERSION

    def step(self, share: str, group: str | None = None) -> list[float]:
        """Median gap of each round, in ms, of the streams with or without a grammar, or of all."""
        return [
            statistics.median(getattr(turn, group) if group else turn.with_grammar + turn.without)
            for turn in self.turns
            if turn.share == share
        ]

    def groups(self) -> list[tuple[str, list[float]]]:
        """What is compared, and its gap in each round."""
        return [
            ("no grammar", self.step("none")),
            ("every second stream", self.step("half")),
            ("those with one", self.step("half", "with_grammar")),
            ("their neighbours", self.step("half", "without")),
            ("all streams", self.step("all")),
        ]


def _schema(number: int) -> dict[str, Any]:
    """An array that no short answer fills; each number has a schema of its own."""
    item = {
        "type": "object",
        "properties": {f"name_{number}": {"type": "string"}, "size": {"type": "integer"}},
        "required": [f"name_{number}", "size"],
        "additionalProperties": False,
    }
    schema = {"type": "array", "items": item, "minItems": 1000}
    return {
        "type": "json_schema",
        "json_schema": {"name": f"schema_{number}", "strict": True, "schema": schema},
    }


async def _stream(target: Target, number: int, tokens: int, grammar: bool) -> RequestRecord:
    if grammar:
        fields = {"response_format": _schema(number)}
        target = msgspec.structs.replace(target, fields=fields)
    text = f"List things, please. This is stream {number}."
    record = RequestRecord(number, number, 0, len(text), tokens, chunk_ms=[])
    message = [{"role": "user", "content": text}]
    await stream_chat(target, message, record, time.perf_counter())
    if record.error is not None:
        raise RuntimeError(f"stream {number}: {record.error.message}")
    return record


async def _turn(
    target: Target, share: str, round_number: int, args: argparse.Namespace
) -> GrammarTurn:
    every = SHARES[share]
    began = time.perf_counter()
    records = await asyncio.gather(
        *(
            _stream(target, number, args.tokens, bool(every) and number % every == 0)
            for number in range(args.streams)
        )
    )
    seconds = time.perf_counter() - began
    gaps: dict[bool, list[float]] = {True: [], False: []}
    for record in records:
        middle = record.gaps_ms[_SETTLING:-_SETTLING]
        gaps[bool(every) and record.index % every == 0].append(statistics.median(middle))
    tokens = sum(record.completion_tokens or 0 for record in records)
    return GrammarTurn(share, round_number, gaps[True], gaps[False], tokens / seconds)


async def measure(base: BaseURL, args: argparse.Namespace) -> GrammarCostResult:
    """Raises RuntimeError where a stream fails."""
    options = LoadOptions(WorkloadSpec(), temperature=args.temperature, ignore_eos=True)
    target, _ = await find_target(base, None, options)
    turns = []
    for round_number in range(args.rounds + 1):  # the first compiles the schemas
        for share in SHARES:
            turn = await _turn(target, share, round_number, args)
            if round_number:
                turns.append(turn)
    return GrammarCostResult(
        environment.command_line(), args.streams, turns, environment.describe(), args.note
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m quire.loadtest.grammar_cost")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=160, help="of each stream (160)")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--note", default="")
    parser.add_argument("--out", type=Path, help="write all medians as JSON")
    args = parser.parse_args()
    result = asyncio.run(measure(BaseURL.parse(args.url), args))
    plain = result.step("none")
    for label, found in result.groups():
        ratio = Median.of(new / old for new, old in zip(found, plain, strict=True))
        print(f"{label:22} {statistics.median(found):.2f} ms between tokens, {ratio}")
    if args.out:
        save(args.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
