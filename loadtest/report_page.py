"""The report of a machine as a page to read, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any


def page(report: dict[str, Any]) -> str:
    sections = (_machine, _kernels, _steps, _load, _failures)
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


def _steps(report: dict[str, Any]) -> Iterator[str]:
    steps = report.get("steps")
    if not steps:
        return
    yield ""
    yield "## Decode steps of the demo model, batch x context"
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


def _failures(report: dict[str, Any]) -> Iterator[str]:
    for name, why in report["failed"].items():
        yield ""
        yield f"## {name} failed"
        yield ""
        yield "```"
        yield why.replace("```", "'''")
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
