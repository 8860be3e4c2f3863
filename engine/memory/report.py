"""What the doctor says of memory."""

from __future__ import annotations

from collections.abc import Iterator

from quire.engine.errors import EngineError
from quire.engine.memory.budget import Budget, DeviceName
from quire.engine.memory.machine import usable_memory
from quire.engine.memory.pressure import Pressure, system_pressure


def memory_lines(device: DeviceName) -> Iterator[tuple[str, str]]:
    """Names and values: what there is, what a worker takes of it, and whether it is short now."""
    try:
        usable = usable_memory(device)
        limit = Budget(device, usable, None).limit
        yield "memory", f"{usable / 2**30:.1f} GiB usable"
        yield "limit", f"{limit / 2**30:.1f} GiB for a worker unless --memory-fraction says"
    except EngineError as error:
        yield "memory", str(error)
    pressure = system_pressure()
    if pressure is not Pressure.NONE:
        yield "pressure", f"{pressure.name.lower()}: close programs, or lower --memory-fraction"
