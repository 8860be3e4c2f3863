"""The README's table of machines, made of the reports that were shared.

`python -m quire.loadtest.machine_table` writes it anew between its two marks.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parent.parent
_RESULTS = _ROOT / "loadtest" / "results" / "machines"
_README = _ROOT / "README.md"
BEGIN, END = "<!-- machines: begin -->", "<!-- machines: end -->"
_NONE = "No report of a machine has been shared yet."
_HEAD = ("machine", "system", "MLX", "copy, GB/s", "kernels right", "model", "step ratios", "load")
_ABOUT = """\
Ratios are to mlx_lm in the same run, above 1 where Quire is faster: of decode steps at batch 1, 4
and 16, and of tokens/s over HTTP."""


def machine_table(folder: Path = _RESULTS) -> str:
    """The table in Markdown, or one line that says there is nothing to show.

    Raises:
        ValueError: a file in ``folder`` is not a report; the message names it.
    """
    rows = [row for path in sorted(folder.glob("*.json")) for row in _rows(path)]
    if not rows:
        return _NONE
    table = [_HEAD, ["---"] * len(_HEAD), *rows]
    return "\n".join([_ABOUT, "", *(f"| {' | '.join(row)} |" for row in table)])


def _rows(path: Path) -> Iterator[list[str]]:
    """One for each model whose steps were timed; a part that failed leaves its cells empty."""
    try:
        report = json.loads(path.read_bytes())
        environment, probe = report["environment"], report.get("probe", {})
        kernels = probe.get("kernels", [])
        device = probe.get("device", {})
        copy = probe.get("copy_gb_per_s")
        first = [
            f"[{_cell(device.get('chip') or path.stem)}](loadtest/results/machines/{path.name})",
            _cell(f"macOS {report['macos']}" if report["macos"] else environment["platform"]),
            _cell(environment["packages"].get("mlx", "")),
            "" if copy is None else f"{copy:,.0f}",
            f"{sum(each['agrees'] for each in kernels)} of {len(kernels)}" if kernels else "",
        ]
        steps = {"demo": report.get("steps")}
        if random := report.get("random_steps"):
            steps[random["model"]] = random
        for model, timed in steps.items():
            load = _load(report) if model == "demo" else ""
            yield [*first, _cell(model), _ratios(timed) if timed else "", load]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path.name} is not a report of `quire report`: {error!r}") from error


def _ratios(steps: dict[str, Any]) -> str:
    medians = steps["median_ms"]
    return ", ".join(f"{medians['bare'][name] / ms:.2f}" for name, ms in medians["engine"].items())


def _load(report: dict[str, Any]) -> str:
    rates = report.get("load", {}).get("metrics", {}).get("output tokens/s", {})
    quire, other = rates.get("quire"), rates.get("mlx_lm")
    return f"{quire / other:.2f}" if quire and other else ""


def _cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


def with_table(readme: str, table: str) -> str:
    """``readme`` with ``table`` between its marks. Raises ValueError where they are missing."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the README has no {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--readme", type=Path, default=_README)
    path = parser.parse_args().readme
    path.write_text(with_table(path.read_text(encoding="utf-8"), machine_table()), encoding="utf-8")


if __name__ == "__main__":
    main()
