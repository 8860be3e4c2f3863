"""Results as tables on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from quire.loadtest.records import RequestRecord
from quire.loadtest.results import LoadResult
from quire.loadtest.stats import Distribution

_LATENCIES = (
    ("time to first token", "ttft_ms"),
    ("inter-token latency", "itl_ms"),
    ("time per output token", "tpot_ms"),
    ("end to end", "e2e_ms"),
)


def number(value: float | None) -> str:
    """Three significant digits or a whole number; a dash for a figure that is missing."""
    if value is None:
        return "-"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _latency_table(result: LoadResult) -> Table:
    table = Table("ms", "p50", "p90", "p99", "max", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for label, field in _LATENCIES:
        values: Distribution | None = getattr(result.summary, field)
        cells = (values.p50, values.p90, values.p99, values.max) if values else (None,) * 4
        table.add_row(label, *map(number, cells))
    return table


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
        console.print(
            f"{summary.prompt_tokens:,} prompt tokens, of them cached: {known}", highlight=False
        )
    console.print(_latency_table(result))
    for label, count in summary.errors.items():
        console.print(f"errors: {count} x {label}", style="red", highlight=False)
    for line in _first_errors(result.records):
        console.print(f"  first {line}", style="red", highlight=False, markup=False)
