"""Kernel benchmarks as one picture."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from quire.loadtest.kernels.results import CaseResult, KernelsResult
from quire.loadtest.kernels.table import baselines

# Okabe and Ito's colours, which people with any colour vision can tell apart.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
_MARKERS = "osD^vPX"


def require_matplotlib() -> None:
    """Raises ValueError if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install '.[bench]' in Quire's folder")


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
            _ratio_points(ax, cases)
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


def _ratio_points(ax: Any, cases: list[CaseResult]) -> None:
    """How many times as fast as the first baseline every other variant is."""
    from matplotlib.ticker import LogLocator, NullLocator

    first = baselines(cases)[0]
    names = dict.fromkeys(v.name for case in cases for v in case.variants if v.name != first)
    for place, name in enumerate(names):
        found = [(x, case.variant(name)) for x, case in enumerate(cases)]
        ratios = [(x, cases[x].speed_against(first, v)) for x, v in found if v]
        points = [(x, ratio) for x, ratio in ratios if ratio is not None]
        if points:
            ax.plot(
                *zip(*points, strict=True),
                marker=_MARKERS[place % len(_MARKERS)],
                color=_COLOURS[place % len(_COLOURS)],
                linestyle="",
                label=name,
            )
    ax.axhline(1, color="grey", linewidth=1, linestyle="--", label=first)
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, 0.5), max(high, 2))
    ax.set_ylabel(f"times as fast as {first}")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7, 9)))
    ax.yaxis.set_major_formatter("{x:g}x")
    ax.yaxis.set_minor_locator(NullLocator())


def _label_cases(ax: Any, cases: list[CaseResult]) -> None:
    """Each case by the labels in which cases differ; what they share stands below."""
    described = [{k: v for k, v in case.labels.items() if k != "quire"} for case in cases]
    names = list(dict.fromkeys(name for labels in described for name in labels))
    varying = [k for k in names if len({labels.get(k) for labels in described}) > 1]
    values = [[labels.get(k, "") for k in varying] for labels in described]
    # A flag by its name.
    ticks = [
        "\n".join(k if v == "yes" else str(v) for k, v in zip(varying, each, strict=True) if v)
        for each in values
    ]
    ax.set_xticks(range(len(cases)), ticks, fontsize=7)
    shared = [f"{k} {described[0][k]}" for k in names if k not in varying]
    ax.set_xlabel("; ".join([", ".join(varying), *shared]).strip("; "), fontsize=8)
