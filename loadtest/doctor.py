"""``quire doctor``: what this machine is, and whether its kernels compute the right thing."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from quire.engine.errors import EngineError
from quire.engine.startup.boot import add_device_argument, start_device
from quire.loadtest.machine_lines import machine_lines

if TYPE_CHECKING:
    from rich.console import Console

    from quire.engine.memory.budget import DeviceName
    from quire.kernels.choice.check import Use
    from quire.kernels.choice.record import Verdict
    from quire.kernels.choice.spec import AnySpec

    Checked = TypeVar("Checked", Use, Verdict)

# Without a terminal lines are for a file or a report: none is cut.
_WIDTH_WITHOUT_TERMINAL = 200
_DTYPES = ("float32", "float16", "bfloat16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_device_argument(parser)
    parser.add_argument(
        "--kernels",
        nargs="?",
        choices=("used", "all"),
        const="used",
        help="run what computes each operation and compare it with float64; "
        "with all, every other variant too. "
        "On CUDA each kernel takes two or three seconds to compile: two minutes for each type, "
        "half as long again with all",
    )
    parser.add_argument(
        "--model",
        type=Path,
        metavar="FOLDER",
        help="with --kernels, show instead what computes each layer of this model",
    )
    parser.add_argument(
        "--dtype",
        action="append",
        choices=_DTYPES,
        help="with --kernels, check this type only; repeatable",
    )


def run(args: argparse.Namespace) -> int:
    """0 if all is well; 1 if a variant in use computes something else than the reference."""
    if args.dtype and not args.kernels:
        print("quire: error: --dtype says which --kernels are shown", file=sys.stderr)
        return 2
    try:
        device, blas = start_device(args.device)
    except EngineError as error:
        print(f"quire: error: {error}", file=sys.stderr)
        return 1
    from rich.console import Console

    from quire.loadtest.doctor_model import show_model

    console = Console(
        width=None if sys.stdout.isatty() else _WIDTH_WITHOUT_TERMINAL, highlight=False
    )
    if args.model is not None:
        return show_model(console, device, args)
    if args.kernels:
        # On the CPU models in half precision are computed in float32.
        dtypes = args.dtype or (_DTYPES[:1] if device == "cpu" else _DTYPES)
        wrong = _show_used(console, device, dtypes)
        if args.kernels == "all":
            _show_all(console, device, dtypes)
        return 1 if wrong else 0
    for name, value in machine_lines(device, blas):
        console.print(f"{name:10} {value}", markup=False, soft_wrap=True)
    return 0


def _show_used(console: Console, device: DeviceName, dtypes: Sequence[str]) -> int:
    """Print what is in use and what is missing; returns how many in use disagree."""
    from rich.table import Table

    from quire.kernels.choice.check import in_use, list_gaps
    from quire.kernels.choice.spec import describe_settings
    from quire.kernels.cuda_cache import open_cache

    table = Table(title=f"In use on {device}", title_justify="left")
    for column in ("operation", "shape", "dtype", "variant", "settings", "why", "error", ""):
        table.add_column(column, overflow="fold")
    wrong = 0
    cache = open_cache()
    used = in_use(device, dtypes, cache.collecting() if cache else None)
    for use in _with_progress("what is in use", used):
        wrong += not use.agrees
        table.add_row(
            use.operation,
            use.shape,
            use.dtype,
            use.variant,
            describe_settings(use.settings),
            use.why,
            _error(use.error),
            "ok" if use.agrees else use.problem or "disagrees",
        )
    console.print(table)
    gaps = list_gaps(device, dtypes)
    console.print(f"Gaps: {len(gaps) or 'none'}", markup=False)
    for gap in gaps:
        console.print(f"  {gap}", markup=False, soft_wrap=True)
    if wrong:
        console.print(f"{wrong} of the variants in use disagree with the reference.", markup=False)
    return wrong


def _show_all(console: Console, device: DeviceName, dtypes: Sequence[str]) -> None:
    from rich.table import Table

    from quire.kernels.choice.check import check_all
    from quire.kernels.specs import find_spec

    table = Table(title="All variants", title_justify="left")
    for column in ("operation", "variant", "takes", "dtype", "largest error", ""):
        table.add_column(column, overflow="fold")
    for verdict in _with_progress("all variants", check_all(device, dtypes)):
        table.add_row(
            verdict.operation,
            verdict.variant,
            _limits(find_spec(verdict.operation), verdict.variant),
            verdict.dtype,
            _error(verdict.error),
            _state(verdict),
        )
    console.print(table)


def _limits(spec: AnySpec, variant: str) -> str:
    """What a variant supports, where that is not everything."""
    limits = spec.variants[spec.variant(variant)].limits
    return "; ".join(f"{name} {limit}" for name, limit in limits.items())


def _with_progress(what: str, checks: Iterable[Checked]) -> Iterator[Checked]:
    """Pass ``checks`` on, and say on standard error how far they are.

    On a terminal that is one line that changes, else one line for each operation.
    """
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    start = time.monotonic()
    done, operation = 0, ""
    with console.status(f"checking {what}") as status:
        for done, check in enumerate(checks, 1):
            if check.operation != operation:
                operation = check.operation
                if not console.is_terminal:
                    console.print(f"checking {what}: {operation}, {time.monotonic() - start:.0f} s")
            status.update(f"checking {what}: {operation}, {done} done")
            yield check
    console.print(f"checked {what}: {done} in {time.monotonic() - start:.0f} s")


def _error(error: float | None) -> str:
    return "-" if error is None else f"{error:.1e}"


def _state(verdict: Verdict) -> str:
    return f"not used: {verdict.reason}" if verdict.reason else "ok"
