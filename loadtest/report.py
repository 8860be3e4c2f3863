"""Results as tables on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from quire.loadtest.compare import comparisons, equal_prompts, identical_answers
from quire.loadtest.records import RequestRecord
from quire.loadtest.results import ComparedRun, CompareResult, LoadResult, StallResult
from quire.loadtest.stats import Distribution, number

_LATENCIES = (
    ("time to first token", "ttft_ms"),
    ("inter-token latency", "itl_ms"),
    ("time per output token", "tpot_ms"),
    ("end to end", "e2e_ms"),
)


def _latency_table(result: LoadResult) -> Table:
    table = Table("ms", "p50", "p90", "p99", "max", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for label, field in _LATENCIES:
        values: Distribution | None = getattr(result.summary, field)
        cells = (values.p50, values.p90, values.p99, values.max) if values else (None,) * 4
        table.add_row(label, *map(number, cells))
    return table


def _by_turn(records: list[RequestRecord]) -> str:
    """Empty where conversations have one turn."""
    turns: dict[int, list[float]] = {}
    for record in records:
        if record.error is None and record.ttft_ms is not None:
            turns.setdefault(record.turn, []).append(record.ttft_ms)
    if len(turns) < 2:
        return ""
    medians = (Distribution.of(turns[turn]) for turn in sorted(turns))
    return ", ".join(number(each.p50) for each in medians if each is not None)


def _first_errors(records: list[RequestRecord]) -> list[str]:
    first: dict[str, str] = {}
    for record in records:
        if record.error is not None:
            first.setdefault(record.error.label, record.error.message)
    return [f"{label}: {message}" for label, message in first.items()]


def print_load(console: Console, result: LoadResult) -> None:
    summary = result.summary
    spec = result.workload
    console.print(
        f"{spec.name}: {summary.requests_completed} of {summary.requests_planned} requests, "
        f"{result.clients} clients, max_tokens {spec.max_tokens}, seed {spec.seed}, "
        f"{summary.wall_s:.1f} s",
        highlight=False,
    )
    rates = [
        f"{number(summary.output_tokens_per_s)} output tokens/s "
        f"(from {summary.tokens_counted_from})",
        f"{number(summary.requests_per_s)} requests/s",
    ]
    if summary.total_tokens_per_s is not None:
        rates.insert(1, f"{number(summary.total_tokens_per_s)} total tokens/s")
    console.print(", ".join(rates), highlight=False)
    if summary.prompt_tokens is not None:
        cached = summary.cached_prompt_tokens
        known = "not reported" if cached is None else f"{cached:,}"
        repeated = summary.repeated_prompt_tokens
        told = f", sent in the turn before: {repeated:,}" if repeated else ""
        if summary.cacheable_prompt_tokens is not None:
            told += f", computed before: {summary.cacheable_prompt_tokens:,}"
        console.print(
            f"{summary.prompt_tokens:,} prompt tokens, of them cached: {known}{told}",
            highlight=False,
        )
    console.print(_latency_table(result))
    if by_turn := _by_turn(result.records):
        console.print(f"time to first token by turn, p50: {by_turn} ms", highlight=False)
    for label, count in summary.errors.items():
        console.print(f"errors: {count} x {label}", style="red", highlight=False)
    for line in _first_errors(result.records):
        console.print(f"  first {line}", style="red", highlight=False, markup=False, soft_wrap=True)


def print_stall(console: Console, result: StallResult) -> None:
    console.print(
        f"{result.streams} running streams, a prompt of {result.prompt_tokens or '?'} tokens: "
        f"longest gap {number(result.longest_gap_ms)} ms "
        f"(before: p50 {number(result.gap_before_ms.p50)}, max {number(result.gap_before_ms.max)}"
        f" ms); its first token after {number(result.long_ttft_ms)} ms",
        highlight=False,
    )


def print_run(console: Console, run: ComparedRun) -> None:
    """One line as each run of a comparison ends."""
    line = f"{run.workload} round {run.round + 1} {run.server}: "
    if run.failure is not None:
        console.print(
            line + f"FAILED: {run.failure}",
            style="red",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    elif isinstance(run.result, StallResult):
        console.print(line + f"longest gap {number(run.result.longest_gap_ms)} ms", highlight=False)
    elif run.result is not None:
        summary = run.result.summary
        errors = sum(summary.errors.values())
        console.print(
            line + f"{number(summary.output_tokens_per_s)} output tokens/s, {errors} errors",
            style="red" if errors else "",
            highlight=False,
        )


def print_comparison(console: Console, result: CompareResult) -> None:
    names = [setup.name for setup in result.servers]
    for setup in result.servers:
        environment = f"LD_PRELOAD={setup.preload} " if setup.preload else ""
        if setup.blas_core:
            environment += f"OPENBLAS_CORETYPE={setup.blas_core} "
        console.print(
            f"{setup.name}: {environment}{setup.command}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    table = Table("workload", "median of rounds", *names, "ratio", box=None, pad_edge=False)
    for column in table.columns[2:]:
        column.justify = "right"
    for workload in dict.fromkeys(run.workload for run in result.runs):
        for row, comparison in enumerate(comparisons(result, workload)):
            medians = (number(comparison.medians[name]) for name in names)
            label = workload if row == 0 else ""
            table.add_row(label, comparison.label, *medians, number(comparison.ratio))
        same, shared = identical_answers(result, workload)
        if shared:
            table.add_row("", "identical answers", f"{same} of {shared}")
    console.print(table)
    console.print(f"ratio: above 1, {names[0]} is better", highlight=False)
    for workload in dict.fromkeys(run.workload for run in result.runs):
        equal, shared = equal_prompts(result, workload)
        if equal < shared:
            console.print(
                f"warning: {workload}: of {shared - equal} of {shared} prompts the servers count "
                "different numbers of tokens, so neither answers nor times can be compared; are "
                "their chat templates given the same switches?",
                style="yellow",
                highlight=False,
                soft_wrap=True,
            )
    failed = [f"{r.server} {r.workload} round {r.round + 1}" for r in result.runs if r.failure]
    if failed:
        console.print(f"failed, left out of the medians: {', '.join(failed)}", style="red")
