"""What this machine is, as the doctor says it."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING

from quire.deploy.launchd import service_advice

if TYPE_CHECKING:
    from quire.engine.memory.budget import DeviceName


def machine_lines(device: DeviceName, blas: str | None) -> Iterator[tuple[str, str]]:
    """Names and values."""
    from quire.engine.memory.report import memory_lines
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
    yield from memory_lines(device)
    if blas is not None:
        yield "blas", blas
    yield "tuning", _tuning(device)
    yield from service_advice()


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
