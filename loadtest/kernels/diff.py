"""Two kernel benchmarks side by side: what became slower, beyond what chance explains."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from rich.console import Console
from rich.table import Table

from quire.kernels.choice.timing import Samples, is_faster
from quire.loadtest.kernels.results import KernelsResult, VariantResult
from quire.loadtest.stats import number

# A change counts if the medians are this far apart, and more than noise explains.
THRESHOLD = 1.10

Verdict = Literal["slower", "faster", "unclear", "same"]


class Change(NamedTuple):
    """One variant of one case, before and after."""

    name: str
    old_us: float  # median of the throughput samples
    new_us: float
    noise_us: float  # standard error of the difference
    verdict: Verdict

    @property
    def ratio(self) -> float:
        """Above 1 the new one is slower."""
        return self.new_us / self.old_us


class Comparison(NamedTuple):
    changes: list[Change]
    only_old: list[str]  # variants without figures in the other file
    only_new: list[str]

    @property
    def regressions(self) -> list[Change]:
        return [change for change in self.changes if change.verdict == "slower"]


def compare_kernels(old: KernelsResult, new: KernelsResult) -> Comparison:
    """Compare every variant of every case that has figures in both, measured in the same way."""
    before, after = _variants(old), _variants(new)
    changes = [
        _change(name, variant.throughput_us, after[name].throughput_us)
        for name, variant in before.items()
        if name in after
    ]
    return Comparison(
        changes,
        [name for name in before if name not in after],
        [name for name in after if name not in before],
    )


def print_comparison(
    console: Console, old: KernelsResult, new: KernelsResult, comparison: Comparison
) -> None:
    """Everything that is not the same, and how much is."""
    for label, one, other in (
        ("chip", old.chip, new.chip),
        ("device", old.device, new.device),
        ("MLX", old.environment.packages.get("mlx"), new.environment.packages.get("mlx")),
    ):
        if one != other:
            _line(console, f"not the same {label}: {one} and {other}", "yellow")
    _line(
        console,
        f"copy: {number(old.copy_gb_per_s)} GB/s, then {number(new.copy_gb_per_s)} GB/s",
    )
    shown = [change for change in comparison.changes if change.verdict != "same"]
    if shown:
        table = Table("us per call", "old", "new", "ratio", "noise", "", box=None)
        for column in table.columns[1:5]:
            column.justify = "right"
        for change in shown:
            table.add_row(
                change.name,
                number(change.old_us),
                number(change.new_us),
                f"{change.ratio:.2f}",
                number(change.noise_us),
                change.verdict,
                style="red" if change.verdict == "slower" else "",
            )
        console.print(table)
    same = len(comparison.changes) - len(shown)
    _line(console, f"{same} of {len(comparison.changes)} within 10 %")
    for title, names in (("only old", comparison.only_old), ("only new", comparison.only_new)):
        for name in names:
            _line(console, f"{title}: {name}")
    count = len(comparison.regressions)
    _line(
        console,
        f"{count} slower by more than 10 % (and by more than three standard errors)",
        "red" if count else "",
    )


def _line(console: Console, text: str, style: str = "") -> None:
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


def _change(name: str, old: list[float], new: list[float]) -> Change:
    before, after = Samples(tuple(old)), Samples(tuple(new))
    ratio = after.median / before.median
    noise = math.hypot(before.noise, after.noise)
    verdict: Verdict = "same"
    if is_faster(after, before, 1 - 1 / THRESHOLD):
        verdict = "faster"
    elif is_faster(before, after, 1 - 1 / THRESHOLD):
        verdict = "slower"
    elif not 1 / THRESHOLD <= ratio <= THRESHOLD:
        verdict = "unclear"
    return Change(name, before.median, after.median, noise, verdict)


def _variants(result: KernelsResult) -> dict[str, VariantResult]:
    return {
        f"{case.operation} {case.name}: {variant.name}{' (chained)' * case.chained}": variant
        for case in result.cases
        for variant in case.variants
        if not variant.failure
    }
