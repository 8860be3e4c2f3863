"""``quire doctor``: what this machine is, and whether its kernels compute the right thing."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

from quire.engine.command_device import add_device_argument, start_device
from quire.engine.errors import EngineError

if TYPE_CHECKING:
    from rich.console import Console

    from quire.engine.device import DeviceName
    from quire.kernels.choice.record import Verdict

# Without a terminal lines are for a file or a report: none is cut.
_WIDTH_WITHOUT_TERMINAL = 200
_DTYPES = ("float32", "float16", "bfloat16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_device_argument(parser)
    parser.add_argument(
        "--kernels",
        action="store_true",
        help="run every variant of every operation and compare it with float64",
    )
    parser.add_argument(
        "--dtype",
        action="append",
        choices=_DTYPES,
        help="with --kernels, check this type only; repeatable",
    )


def run(args: argparse.Namespace) -> int:
    """0 if all is well; 1 if a variant in use computes something else than the reference."""
    try:
        device, blas = start_device(args.device)
    except EngineError as error:
        print(f"quire: error: {error}", file=sys.stderr)
        return 1
    from rich.console import Console

    console = Console(
        width=None if sys.stdout.isatty() else _WIDTH_WITHOUT_TERMINAL, highlight=False
    )
    if args.kernels:
        # On the CPU models in half precision are computed in float32.
        return _show_kernels(
            console, device, args.dtype or (_DTYPES[:1] if device == "cpu" else _DTYPES)
        )
    for name, value in _machine(device, blas):
        console.print(f"{name:10} {value}", markup=False, soft_wrap=True)
    return 0


def _machine(device: DeviceName, blas: str | None) -> Iterable[tuple[str, str]]:
    from quire.engine.device import usable_memory
    from quire.kernels.choice.chips import current_chip

    chip = current_chip()
    system = f"{platform.system()} {platform.release()}, {platform.machine()}"
    yield "quire", f"{version('quire')}, Python {platform.python_version()}"
    yield "mlx", f"{version('mlx')}, mlx-lm {version('mlx-lm')}"
    yield "machine", f"{system}, {os.cpu_count()} CPU cores"
    yield "device", device
    yield "chip", chip.name if chip.is_known or device == "cpu" else f"{chip.name} (not known)"
    if chip.is_known:
        yield "gpu cores", " or ".join(map(str, chip.cores))
    yield "bandwidth", f"{chip.bandwidth:g} GB/s (published)" if chip.bandwidth else "not known"
    try:
        yield "memory", f"{usable_memory(device) / 2**30:.1f} GiB usable"
    except EngineError as error:
        yield "memory", str(error)
    if blas is not None:
        yield "blas", blas
    yield "tuning", _tuning(device)


def _tuning(device: DeviceName) -> str:
    from quire.kernels.choice.record import load_record, record_path

    record = load_record(device)
    path = record_path(record.key)
    if not record.timings and not record.verdicts:
        return f"nothing measured yet (`quire tune`); it will be kept in {path}"
    text = f"{len(record.timings)} shapes measured, {len(record.verdicts)} kernels checked"
    if dropped := record.dropped():
        names = sorted(f"{operation}.{variant} {dtype}" for operation, variant, dtype in dropped)
        text += f", not used: {', '.join(names)}"
    return f"{text}: {path}"


def _show_kernels(console: Console, device: DeviceName, dtypes: Sequence[str]) -> int:
    from rich.table import Table

    from quire.kernels.choice.survey import in_use, survey_gaps
    from quire.kernels.choice.verify import check_all

    table = Table(title=f"In use on {device}", title_justify="left")
    for column in ("operation", "shape", "dtype", "variant", "settings", "why", "error", ""):
        table.add_column(column, overflow="fold")
    wrong = 0
    # Compilers of GPU kernels take up to three seconds for each text.
    with console.status("checking what is in use") as status:
        for use in in_use(device, dtypes):
            status.update(f"checking what is in use, {table.row_count} done: {use.operation}")
            wrong += not use.agrees
            settings = ", ".join(f"{name} {value}" for name, value in use.settings.items())
            table.add_row(
                use.operation,
                use.shape,
                use.dtype,
                use.variant,
                settings,
                use.why,
                _error(use.error),
                "ok" if use.agrees else use.problem or "disagrees",
            )
    console.print(table)
    table = Table(title="All variants", title_justify="left")
    for column in ("operation", "variant", "dtype", "largest error", ""):
        table.add_column(column, overflow="fold")
    with console.status("checking all variants") as status:
        for verdict in check_all(device, dtypes):
            status.update(f"checking all variants, {table.row_count} done: {verdict.operation}")
            table.add_row(
                verdict.operation,
                verdict.variant,
                verdict.dtype,
                _error(verdict.error),
                _state(verdict),
            )
    console.print(table)
    gaps = survey_gaps(device, dtypes)
    console.print(f"Gaps: {len(gaps) or 'none'}", markup=False)
    for gap in gaps:
        console.print(f"  {gap}", markup=False, soft_wrap=True)
    if wrong:
        console.print(f"{wrong} of the variants in use disagree with the reference.", markup=False)
    return 1 if wrong else 0


def _error(error: float | None) -> str:
    return "-" if error is None else f"{error:.1e}"


def _state(verdict: Verdict) -> str:
    return f"not used: {verdict.reason}" if verdict.reason else "ok"
