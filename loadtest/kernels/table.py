"""Kernel benchmarks as tables on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from quire.loadtest.kernels.results import CaseResult, KernelsResult
from quire.loadtest.stats import number

LEGEND = (
    "us per call: latency, each call evaluated alone; chained, each call on the result of the one\n"
    "before, in a graph built before the clock starts, as a compiled step of the engine is; host,\n"
    "building one call and handing it over. GB/s, of copy, FLOP/s and the ratios (above 1: faster\n"
    "than that variant) are of chained calls. In all variants those of sample also write the\n"
    "logits, and those of most products run one more small kernel."
)


def print_case(console: Console, case: CaseResult) -> None:
    """One line as each case ends."""
    times = []
    for variant in case.variants:
        value = "FAILED" if variant.failure else f"{number(variant.throughput)} us"
        times.append(f"{variant.name} {value}")
    console.print(
        f"{case.operation} {case.name}: {', '.join(times)}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def print_kernels(console: Console, result: KernelsResult) -> None:
    """One table per operation, then what went wrong."""
    mlx = result.environment.packages.get("mlx", "?")
    console.print(
        f"{result.chip} ({result.device}), MLX {mlx}: a copy moves "
        f"{number(result.copy_gb_per_s)} GB/s; medians of {result.runs}"
        + (f"; BLAS: {result.blas or 'that of MLX'}" if result.device == "cpu" else ""),
        highlight=False,
        markup=False,
    )
    for operation in dict.fromkeys(case.operation for case in result.cases):
        cases = [case for case in result.cases if case.operation == operation]
        console.print()
        console.print(_table(operation, cases, result.copy_gb_per_s, result.device))
    console.print()
    console.print(LEGEND, highlight=False, markup=False)
    for line in result.skipped:
        console.print(f"left out: {line}", highlight=False, markup=False, soft_wrap=True)
    for line in result.failures:
        console.print(f"FAILED: {line}", style="red", markup=False, highlight=False, soft_wrap=True)


def baselines(cases: list[CaseResult]) -> list[str]:
    """Names of the variants to compare with, in the order they first come up."""
    return list(dict.fromkeys(v.name for case in cases for v in case.variants if v.is_baseline))


def _table(operation: str, cases: list[CaseResult], copy: float, device: str) -> Table:
    with_flops = any(case.flops for case in cases)
    unit, per_us = ("TFLOP/s", 1e6) if device != "cpu" else ("GFLOP/s", 1e3)
    against = baselines(cases)
    columns = ["latency", "chained", "host", "GB/s", "of copy"]
    columns += [unit] if with_flops else []
    columns += [f"vs {name}" for name in against]
    table = Table(operation, "", *columns, box=None, pad_edge=False)
    for column in table.columns:
        column.no_wrap = True
    for column in table.columns[2:]:
        column.justify = "right"
    for case in cases:
        for row, variant in enumerate(case.variants):
            label = case.name if row == 0 else ""
            if variant.failure:
                table.add_row(label, variant.name, "FAILED", style="red")
                continue
            cells = [
                number(variant.latency),
                number(variant.throughput),
                number(variant.host),
                number(variant.gb_per_s),
                f"{variant.gb_per_s / copy:.0%}",
            ]
            if with_flops:
                cells.append(number(case.flops / variant.throughput / per_us))
            for name in against:
                ratio = None if name == variant.name else case.speed_against(name, variant)
                cells.append("" if name == variant.name else number(ratio))
            table.add_row(label, variant.name, *cells)
    return table
