"""The same traffic on several servers, one running at a time, A B A B.

Every run gets a freshly started server, so no prompt cache carries over. Within a round all
servers get the same texts; each round has its own.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from quire.loadtest import environment
from quire.loadtest.chat import ServerError
from quire.loadtest.records import RequestRecord
from quire.loadtest.results import ComparedRun, CompareResult, LoadResult, StallResult
from quire.loadtest.serve import LoadOptions, measure_load
from quire.loadtest.servers import ServerSpec, running
from quire.loadtest.stall import StallOptions, measure_stall

# A workload, or the stall measurement.
Task = LoadOptions | StallOptions


def task_name(task: Task) -> str:
    return task.workload.name if isinstance(task, LoadOptions) else "stall"


_DYING_SECONDS = 2.0


def _seeded(task: Task, round_number: int) -> tuple[Task, int]:
    if isinstance(task, StallOptions):
        seed = task.seed + round_number
        return msgspec.structs.replace(task, seed=seed), seed
    seed = task.workload.seed + round_number
    workload = msgspec.structs.replace(task.workload, seed=seed)
    return msgspec.structs.replace(task, workload=workload), seed


async def run_once(
    spec: ServerSpec, task: Task, probe: LoadOptions, ready_seconds: float, log: Path | None = None
) -> tuple[LoadResult | StallResult | None, str | None]:
    """Start the server, measure, stop it. Returns the result and why it cannot be trusted.

    A server that dies on the way leaves both: what was measured until then, and how it died.
    """
    with running(spec, log) as server:
        result: LoadResult | StallResult | None = None
        failure = None
        try:
            target, header = await server.wait_ready(probe, ready_seconds)
            if isinstance(task, StallOptions):
                result = await measure_stall(target, header, task)
            else:
                result = await measure_load(target, header, task)
        except ServerError as error:
            failure = str(error)
        if failure or (result and any(record.error for record in result.records)):
            # A dying server drops its connections a moment before it is gone.
            await server.wait_exit(_DYING_SECONDS)
        return result, server.exit_message() or failure


async def compare(
    specs: Sequence[ServerSpec],
    tasks: Sequence[Task],
    rounds: int,
    probe: LoadOptions,
    ready_seconds: float = 300.0,
    on_run: Callable[[CompareResult], None] = lambda so_far: None,
    logs: Path | None = None,
) -> CompareResult:
    """Run every task on every server, ``rounds`` times, alternating between the servers.

    ``probe`` says how to ask for readiness; ``on_run`` hears of each run as it ends, the last of
    the result so far. What the servers print is kept in the folder ``logs``, a file for each run.
    """
    if rounds < 1:
        raise ValueError("--rounds must be at least 1")
    result = CompareResult(
        servers=[spec.setup for spec in specs],
        runs=[],
        environment=environment.describe(),
        command=environment.command_line(),
    )
    for task in tasks:
        for round_number in range(rounds):
            seeded, seed = _seeded(task, round_number)
            for spec in specs:
                name = task_name(task)
                log = logs / f"{name}-{round_number + 1}-{spec.name}.log" if logs else None
                measured, failure = await run_once(spec, seeded, probe, ready_seconds, log)
                run = ComparedRun(spec.name, name, round_number, seed, measured, failure)
                result.runs.append(run)
                on_run(result)
    return result


class Metric(msgspec.Struct, frozen=True):
    label: str
    path: tuple[str, ...]  # attributes from the result
    better: Literal["higher", "lower"]

    def of(self, result: object) -> float | None:
        value = result
        for name in self.path:
            value = getattr(value, name) if value is not None else None
        return float(value) if isinstance(value, (int, float)) else None


LOAD_METRICS = (
    Metric("output tokens/s", ("summary", "output_tokens_per_s"), "higher"),
    Metric("TTFT p50, ms", ("summary", "ttft_ms", "p50"), "lower"),
    Metric("TTFT p99, ms", ("summary", "ttft_ms", "p99"), "lower"),
    Metric("ITL p50, ms", ("summary", "itl_ms", "p50"), "lower"),
    Metric("ITL p99, ms", ("summary", "itl_ms", "p99"), "lower"),
    Metric("end to end p50, ms", ("summary", "e2e_ms", "p50"), "lower"),
)
STALL_METRICS = (
    Metric("longest gap, ms", ("longest_gap_ms",), "lower"),
    Metric("gap before p50, ms", ("gap_before_ms", "p50"), "lower"),
    Metric("long prompt TTFT, ms", ("long_ttft_ms",), "lower"),
)


class Comparison(msgspec.Struct, frozen=True):
    """One metric of one workload: medians over the rounds that did not fail, per server."""

    label: str
    medians: dict[str, float | None]
    ratio: float | None  # first server against the second; above 1 the first is better


def comparisons(result: CompareResult, workload: str) -> list[Comparison]:
    """All metrics of one workload, with the first server's ratio to the second."""
    runs = [run for run in result.runs if run.workload == workload]
    names = [setup.name for setup in result.servers]
    metrics = STALL_METRICS if workload == "stall" else LOAD_METRICS
    table = []
    for metric in metrics:
        medians = {name: _median(runs, name, metric) for name in names}
        ratio = None
        if len(names) == 2 and all(medians.values()):
            first, second = (medians[name] or 0.0 for name in names)
            ratio = first / second if metric.better == "higher" else second / first
        table.append(Comparison(metric.label, medians, ratio))
    return table


def _median(runs: Sequence[ComparedRun], server: str, metric: Metric) -> float | None:
    values = [
        value
        for run in runs
        if run.server == server and run.result is not None and run.failure is None
        if (value := metric.of(run.result)) is not None
    ]
    return statistics.median(values) if values else None


def identical_answers(result: CompareResult, workload: str) -> tuple[int, int]:
    """How many requests of the first turn all servers answered alike, and how many they share.

    Later turns are left out: their prompts contain the answers before them.
    """
    return _alike(result, workload, lambda record: record.answer_digest)


def equal_prompts(result: CompareResult, workload: str) -> tuple[int, int]:
    """The same of prompts that have as many tokens on all servers."""
    return _alike(result, workload, lambda record: record.prompt_tokens)


def _alike(
    result: CompareResult, workload: str, read: Callable[[RequestRecord], object]
) -> tuple[int, int]:
    found: dict[tuple[int, int], list[object]] = {}
    for run in result.runs:
        if run.workload != workload or not isinstance(run.result, LoadResult):
            continue
        for record in run.result.records:
            if record.turn == 0 and (value := read(record)) is not None:
                found.setdefault((run.round, record.index), []).append(value)
    shared = [values for values in found.values() if len(values) == len(result.servers)]
    return sum(len(set(values)) == 1 for values in shared), len(shared)
