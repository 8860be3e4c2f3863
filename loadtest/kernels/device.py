"""The device a benchmark runs on, and the bandwidth its figures are held against."""

from __future__ import annotations

import os
import statistics
from typing import Any

import mlx.core as mx

from quire.kernels.choice.chips import DeviceName, current_device
from quire.kernels.choice.timing import RUNS, measure

# Larger than caches (a CPU's are shared by its cores, and one of them copies), and no more than a
# small machine has.
_COPY_BYTES = {"cpu": 1 << 26, "metal": 1 << 28, "cuda": 1 << 30}


def use_device(name: str) -> DeviceName:
    """Make ``name`` MLX's default device; "auto" keeps the one it has.

    Raises ValueError if this machine has no such device.
    """
    if name != "auto":
        available = {"cpu": True, "metal": mx.metal.is_available(), "cuda": mx.cuda.is_available()}
        if not available[name]:
            raise ValueError(f"--device: MLX finds no {name} device here")
        mx.set_default_device(mx.cpu if name == "cpu" else mx.gpu)
    return current_device()


def memory_size() -> int:
    """Bytes the default device can use."""
    info: dict[str, Any] = mx.device_info()
    for key in ("max_recommended_working_set_size", "free_memory", "total_memory", "memory_size"):
        if key in info:
            return int(info[key])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def copy_bandwidth(device: DeviceName) -> float:
    """Bytes per second of a large copy on the device, reads and writes counted.

    Timed on a negation, which moves what a copy does. The CPU backend runs it on one thread.
    """
    size = _COPY_BYTES[device]
    source = mx.random.uniform(shape=(size // 4,))
    mx.eval(source)
    timing = measure({"copy": mx.negative}, [source], RUNS, lambda _, copied: copied)["copy"]
    return 2 * size / statistics.median(timing.throughput_us) * 1e6


def fastest_plausible(device: DeviceName, copy: float) -> float:
    """Bytes per second that no real operation on data beyond the caches reaches.

    Pure reads are somewhat faster than a copy, and matrix products on the CPU use all cores.
    """
    return 1.5 * copy * ((os.cpu_count() or 1) if device == "cpu" else 1)
