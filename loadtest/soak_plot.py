"""A soak as one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quire.loadtest.soak_samples import ProcessSample, Sample

# Okabe and Ito's colours, which people with any colour vision can tell apart.
_COLOURS = {"front end": "#0072B2", "worker": "#E69F00", "helper": "#009E73"}


def save_plot(path: Path, samples: list[Sample], title: str) -> None:
    """Write an SVG: memory, threads and descriptors by process, the time of steps, the load.

    Raises ImportError if matplotlib is not installed.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 10), layout="constrained")
    memory, counts, steps, load = figure.subplots(4, 1, sharex=True)
    for role in _COLOURS:
        _lines(memory, samples, role, "anonymous", 1024)
        _lines(counts, samples, role, "threads", 1)
        _lines(counts, samples, role, "descriptors", 1, style=":")
    times = [sample.seconds / 60 for sample in samples]
    steps.plot(times, [sample.step_ms for sample in samples], color="#D55E00", linewidth=0.8)
    for name, colour in (("running", "#000000"), ("waiting", "#CC79A7")):
        values = [sample.series[f"quire_requests_{name}"] for sample in samples]
        load.plot(times, values, color=colour, linewidth=0.8, label=name)
    memory.set_ylabel("anonymous memory, MiB")
    counts.set_ylabel("threads, descriptors (dotted)")
    counts.set_yscale("log")
    steps.set_ylabel("mean step, ms")
    load.set_ylabel("requests")
    load.set_xlabel("minutes")
    for axes in (memory, counts, steps, load):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    memory.legend(fontsize=8, frameon=False)
    load.legend(fontsize=8, frameon=False)
    memory.set_ylim(bottom=0)
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.hashsalt": "quire"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _lines(
    axes: Any, samples: list[Sample], role: str, field: str, unit: int, style: str = "-"
) -> None:
    """The sum over the processes of a role; a gap where there is none."""

    def total(own: list[ProcessSample]) -> float:
        return sum(getattr(process, field) for process in own) / unit if own else float("nan")

    axes.plot(
        [sample.seconds / 60 for sample in samples],
        [total(sample.of(role)) for sample in samples],
        color=_COLOURS[role],
        linestyle=style,
        linewidth=0.9,
        label=role,
    )
