"""``quire doctor --kernels --model``: what computes each layer of a model on this machine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quire.engine.errors import EngineError

if TYPE_CHECKING:
    from rich.console import Console

    from quire.engine.memory.budget import DeviceName
    from quire.engine.model.layer_report import LayerReport


def show_model(console: Console, device: DeviceName, args: argparse.Namespace) -> int:
    """0; 1 if the model cannot be served; 2 for bad usage."""
    from quire.engine.messages import WorkerConfig

    if not args.kernels:
        print("quire: error: --model goes with --kernels", file=sys.stderr)
        return 2
    try:
        show_layers(console, device, args.model, WorkerConfig("", "", "").block_size)
    except EngineError as error:
        print(f"quire: error: {error}", file=sys.stderr)
        return 1
    return 0


def show_layers(console: Console, device: DeviceName, folder: Path, block_size: int) -> None:
    """Load a model as `quire serve` does, and print what would run.

    Raises:
        EngineError: the model cannot be served; the message says why.
    """
    from rich.console import Console

    import quire.engine.startup.start as startup
    from quire.engine.memory.budget import Budget
    from quire.engine.memory.limits import limit_loading
    from quire.engine.memory.machine import usable_memory
    from quire.engine.model.layer_report import report_layers
    from quire.engine.startup.loader import load_model

    budget = Budget(device, usable_memory(device), None)
    limit_loading(budget)
    notes: list[str] = []
    with Console(stderr=True, highlight=False).status("loading") as status:

        def progress(stage: str, done: int, total: int) -> None:
            status.update(stage)

        loaded = load_model(folder, device, budget.limit, progress)
        paged = startup.page_loaded(loaded, block_size, device, None, notes, progress)
        paged.allocate(2, block_size)
    title = f"{loaded.name} on {device}"
    if paged.is_standard:
        title += ", its blocks by a forward pass of our own"
    _print_table(console, title, report_layers(paged, block_size))
    for note in notes:
        console.print(note, markup=False, soft_wrap=True)


def _print_table(console: Console, title: str, reports: Sequence[LayerReport]) -> None:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in ("layers", "attention or recurrence", "decodes", "prompts", "pages or states"):
        table.add_column(column, overflow="fold")
    for report in reports:
        pages = f"by MLX: {report.reason}" if report.reason else "in place, by kernels"
        table.add_row(ranges(report.layers), report.work, report.decodes, report.prompts, pages)
    console.print(table)


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers, those that follow each other as one: "0-4, 6"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
