"""The report of a machine as a page to read, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any


def page(report: dict[str, Any]) -> str:
    sections = (_machine, _kernels, _speeds, _steps, _load, _failures)
    return "\n".join(line for section in sections for line in section(report)) + "\n"


def _machine(report: dict[str, Any]) -> Iterator[str]:
    environment = report["environment"]
    probe = report.get("probe", {})
    device = probe.get("device", {})
    yield "# Quire on this machine"
    yield ""
    versions = ", ".join(f"{name} {v}" for name, v in environment["packages"].items())
    rows = [
        ("system", environment["platform"]),
        ("macOS", report["macos"]),
        ("versions", f"Python {environment['python']}, {versions}"),
        ("cores", environment["cpu_count"]),
        ("GPUs", ", ".join(environment["gpus"])),
        ("device", device.get("name") or device.get("problem")),
        ("chip", device.get("chip")),
        ("BLAS", device.get("blas")),
        ("usable memory", _gib(device.get("usable_bytes"))),
        ("large copy", _bandwidth(probe.get("copy_gb_per_s"), device.get("published_gb_per_s"))),
        ("time", environment["time"]),
    ]
    yield from _table(("", ""), [(name, text) for name, text in rows if text])


def _kernels(report: dict[str, Any]) -> Iterator[str]:
    probe = report.get("probe")
    if not probe:
        return
    kernels = probe["kernels"]
    wrong = [kernel for kernel in kernels if not kernel["agrees"]]
    yield ""
    yield "## Kernels"
    yield ""
    yield f"{len(kernels)} checked against float64, {len(wrong)} disagree or fail."
    if probe.get("ended"):
        yield f"The check ended early: {_cell(probe['ended'])}"
    yield ""
    rows = [
        (
            *(kernel["operation"], kernel["shape"], kernel["dtype"], kernel["variant"]),
            "" if kernel["error"] is None else f"{kernel['error']:.1e}",
            "ok" if kernel["agrees"] else kernel["problem"] or "disagrees",
        )
        for kernel in sorted(kernels, key=lambda kernel: kernel["agrees"])
    ]
    yield from _table(("operation", "shape", "dtype", "variant", "error", ""), rows)
    gaps = probe.get("gaps", [])
    yield ""
    yield f"Gaps: {len(gaps) or 'none'}"
    yield from (f"- {_cell(gap)}" for gap in gaps)


def _speeds(report: dict[str, Any]) -> Iterator[str]:
    speeds = report.get("speeds")
    if not speeds:
        return
    yield ""
    yield "## Kernels beside MLX's own operations"
    yield ""
    yield f"Shares are of a large copy's {speeds['copy_gb_per_s']:,.0f} GB/s. What fits a cache,"
    yield "or uses more cores than a copy, may have more. A ratio above 1: Quire is faster."
    yield ""
    rows = [
        (
            *(case["operation"], case["shape"], case["variant"], f"{case['us']:,.0f}"),
            f"{case['share_of_copy']:.0%}",
            *(other, f"{its['share_of_copy']:.0%}", f"{its['ratio']:.2f}"),
        )
        for case in speeds["cases"]
        for other, its in case["against"].items()
    ]
    head = ("operation", "shape", "variant", "us", "of copy", "MLX's way", "of copy", "ratio")
    yield from _table(head, rows)
    notes = [f"- failed: {_cell(failure)}" for failure in speeds["failures"]]
    notes += [f"- left out, too large: {_cell(case)}" for case in speeds["skipped"]]
    yield from ["", *notes] if notes else []


def _steps(report: dict[str, Any]) -> Iterator[str]:
    if steps := report.get("steps"):
        yield from _steps_of("the demo model", steps)
    if steps := report.get("random_steps"):
        yield from _steps_of(f"a random model, {steps['model']}", steps)


def _steps_of(model: str, steps: dict[str, Any]) -> Iterator[str]:
    yield ""
    yield f"## Decode steps of {model}, batch x context"
    yield ""
    medians = steps["median_ms"]
    rows = [
        (name, f"{quire:.2f} ms", f"{bare:.2f} ms", f"{bare / quire:.2f}")
        for name, quire in medians["engine"].items()
        for bare in [medians["bare"][name]]
    ]
    yield from _table(("", "Quire", "mlx_lm", "mlx_lm / Quire"), rows)
    yield ""
    memory = [(name, _gib(size)) for name, size in steps["memory_bytes"].items()]
    yield from _table(("memory", ""), memory)


def _load(report: dict[str, Any]) -> Iterator[str]:
    load = report.get("load")
    if not load:
        return
    yield ""
    yield "## The demo model over HTTP"
    yield ""
    servers = list(next(iter(load["metrics"].values())))
    rows = [
        (label, *("" if medians[s] is None else f"{medians[s]:,.1f}" for s in servers))
        for label, medians in load["metrics"].items()
    ]
    yield from _table(("", *servers), rows)
    yield ""
    yield f"Load: `{load['workload']}`"
    for server, failure in load["failures"].items():
        yield f"{server} failed: {_cell(failure)}"
    if load["log"]:
        yield ""
        yield "The end of Quire's log:"
        yield ""
        yield from _block("\n".join(load["log"]))


def _failures(report: dict[str, Any]) -> Iterator[str]:
    for name, why in report["failed"].items():
        yield ""
        yield f"## {name} failed"
        yield ""
        yield from _block(why)


def _block(text: str) -> Iterator[str]:
    """As it is printed; it cannot end its own block."""
    yield "```"
    yield text.replace("```", "'''")
    yield "```"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(map(_cell, row))} |"


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def _gib(size: int | None) -> str:
    return "" if size is None else f"{size / 2**30:.2f} GiB"


def _bandwidth(measured: float | None, published: float | None) -> str:
    if measured is None:
        return ""
    share = f", {measured / published:.0%} of the published {published:g}" if published else ""
    return f"{measured:,.0f} GB/s{share}"
