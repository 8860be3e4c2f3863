"""Kernel benchmarks as one picture."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

from quire.loadtest.kernels.results import CaseResult, KernelsResult
from quire.loadtest.kernels.table import baselines

# Okabe and Ito's colours, which people with any colour vision can tell apart.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
_MARKERS = "osD^vPX"
_MOST_LETTERS = 130  # that fit side by side


def require_matplotlib() -> None:
    """Raises ValueError if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: install quire[bench]")


def save_plot(path: Path, result: KernelsResult) -> None:
    """Write a PNG: bars of memory bandwidth for decode attention, speed ratios for the rest.

    Raises ValueError if matplotlib is not installed, or there is nothing to draw.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    if not result.cases:
        raise ValueError("--plot: no case was measured")
    groups: dict[str, list[CaseResult]] = {}
    for case in result.cases:
        groups.setdefault(case.operation, []).append(case)
    figure = Figure(figsize=(13, 3.4 * len(groups) + 0.6), layout="constrained")
    axes = figure.subplots(len(groups), 1, squeeze=False)[:, 0]
    for ax, (operation, cases) in zip(axes, groups.items(), strict=True):
        if operation == "paged_decode":
            _bandwidth_bars(ax, cases, result.copy_gb_per_s)
        else:
            _ratio_lines(ax, cases)
        ax.set_title(f"{operation}, chained calls", loc="left", fontweight="bold")
        ax.set_xlim(-0.6, len(cases) - 0.4)
        _label_cases(ax, cases)
        ax.grid(axis="y", alpha=0.3)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    mlx = result.environment.packages.get("mlx", "?")
    figure.suptitle(
        f"{result.chip} ({result.device}), MLX {mlx}, {result.environment.time[:10]}: "
        f"medians of {result.runs}"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, format="png")


def _bandwidth_bars(ax: Any, cases: list[CaseResult], copy: float) -> None:
    names = list(dict.fromkeys(v.name for case in cases for v in case.variants))
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        found = [case.variant(name) for case in cases]
        shares = [100 * v.gb_per_s / copy if v else 0.0 for v in found]
        at = [x + (place - (len(names) - 1) / 2) * width for x in range(len(cases))]
        bars = ax.bar(at, shares, width, label=name, color=_COLOURS[place % len(_COLOURS)])
        ax.bar_label(bars, fmt="%.0f", fontsize=7, padding=1)
    ax.axhline(100, color="grey", linewidth=1, linestyle="--")
    ax.set_ylabel(f"% of copy bandwidth ({copy:,.0f} GB/s)")
    ax.set_xlabel("rows x context, tokens")


def _ratio_lines(ax: Any, cases: list[CaseResult]) -> None:
    """How many times as fast as the first baseline every other variant is."""
    first = baselines(cases)[0]
    names = dict.fromkeys(v.name for case in cases for v in case.variants if v.name != first)
    for place, name in enumerate(names):
        ratios = [
            case.speed_against(first, variant) if (variant := case.variant(name)) else None
            for case in cases
        ]
        label: str | None = name
        for series in _series(cases):
            points = [(x, ratio) for x in series if (ratio := ratios[x]) is not None]
            if points:
                ax.plot(
                    *zip(*points, strict=True),
                    marker=_MARKERS[place % len(_MARKERS)],
                    color=_COLOURS[place % len(_COLOURS)],
                    linestyle=":" if any(c.is_baseline(name) for c in cases) else "-",
                    label=label,
                )
                label = None
    if not names:
        times = [v.throughput if (v := case.variant(first)) else math.nan for case in cases]
        ax.plot(range(len(cases)), times, marker="o", color=_COLOURS[0], label=first)
        ax.set_ylim(bottom=0)
        ax.set_ylabel("us per call")
        return
    ax.axhline(1, color="grey", linewidth=1, linestyle="--", label=first)
    ax.set_yscale("log")
    ax.set_ylabel(f"times as fast as {first}")
    from matplotlib.ticker import LogLocator, NullLocator

    ax.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    ax.yaxis.set_major_formatter("{x:g}x")
    ax.yaxis.set_minor_locator(NullLocator())


def _label_cases(ax: Any, cases: list[CaseResult]) -> None:
    """Each case by its name; of many, the label that varies and below it what they share. A case
    that shares nothing with its neighbours has its name there, upright."""
    if sum(len(case.name) for case in cases) <= _MOST_LETTERS:
        ax.set_xticks(range(len(cases)), [case.name for case in cases], fontsize=8)
        return
    first = [next(iter(case.labels.items())) for case in cases]
    ax.set_xticks(range(len(cases)), [str(value) for _, value in first], fontsize=7)
    ax.tick_params(axis="x", length=2)
    for series in _series(cases):
        case, is_single = cases[series[0]], len(series) == 1
        shared = [f"{key} {value}" for key, value in list(case.labels.items())[1:]]
        ax.annotate(
            case.name if is_single else "\n".join(shared),
            xy=((series[0] + series[-1]) / 2, 0),
            xycoords=("data", "axes fraction"),
            xytext=(0, -18),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=7,
            rotation=90 if is_single else 0,
        )
    ax.annotate(
        first[0][0],
        xy=(1, 0),
        xycoords="axes fraction",
        xytext=(6, -6),
        textcoords="offset points",
        va="top",
        fontsize=8,
    )


def _series(cases: list[CaseResult]) -> list[list[int]]:
    """Places of consecutive cases that differ in their first label only: a line joins them."""
    series: list[list[int]] = []
    previous: object = None
    for place, case in enumerate(cases):
        rest = list(case.labels.items())[1:]
        if place == 0 or rest != previous:
            series.append([])
        series[-1].append(place)
        previous = rest
    return series
