"""The chip this process runs on, and how fast its memory is said to be.

Figures are the makers' own: Apple's technical specifications and NVIDIA's data sheets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx

DeviceName = Literal["metal", "cuda", "cpu"]


@dataclass(frozen=True)
class Chip:
    """What is known of a chip.

    ``cores`` are the numbers of GPU cores it is sold with (NVIDIA: streaming multiprocessors),
    ``bandwidth`` is GB/s (10**9 bytes). Of an unknown chip only the name is known.
    """

    name: str
    cores: tuple[int, ...] = ()
    bandwidth: float | None = None

    @property
    def is_known(self) -> bool:
        return bool(self.cores)


_CHIPS = (
    Chip("Apple M1", (7, 8), 68),
    Chip("Apple M1 Pro", (14, 16), 200),
    Chip("Apple M1 Max", (24, 32), 400),
    Chip("Apple M1 Ultra", (48, 64), 800),
    Chip("Apple M2", (8, 10), 100),
    Chip("Apple M2 Pro", (16, 19), 200),
    Chip("Apple M2 Max", (30, 38), 400),
    Chip("Apple M2 Ultra", (60, 76), 800),
    Chip("Apple M3", (8, 10), 100),
    Chip("Apple M3 Pro", (14, 18), 150),
    Chip("Apple M3 Max", (40,), 400),
    Chip("Apple M3 Ultra", (60, 80), 819),
    Chip("Apple M4", (8, 10), 120),
    Chip("Apple M4 Pro", (16, 20), 273),
    Chip("Apple M4 Max", (40,), 546),
    Chip("Apple M5", (8, 10), 153),
    Chip("Apple M5 Pro", (16, 20), 307),
    Chip("Apple M5 Max", (40,), 614),
    Chip("Apple M5 Ultra", (80,), 1200),
    Chip("NVIDIA H100 80GB HBM3", (132,), 3350),
    Chip("NVIDIA H100 PCIe", (114,), 2000),
    Chip("NVIDIA H100 NVL", (132,), 3900),
    Chip("NVIDIA H200", (132,), 4800),
    Chip("NVIDIA H200 NVL", (132,), 4800),
)
_BY_NAME = {chip.name: chip for chip in _CHIPS}

# The smaller Max chips go by the same name as the full ones; only they come with so much memory.
_SMALLER_MAX = {
    ("Apple M3 Max", 36): Chip("Apple M3 Max", (30,), 300),
    ("Apple M3 Max", 96): Chip("Apple M3 Max", (30,), 300),
    ("Apple M4 Max", 36): Chip("Apple M4 Max", (32,), 410),
    ("Apple M5 Max", 36): Chip("Apple M5 Max", (32,), 460),
}


def chip_for(name: str, memory_bytes: int | None = None) -> Chip:
    """The chip that MLX calls ``name``, by its whole name.

    Args:
        name: ``device_name`` of :func:`mx.device_info`, such as "Apple M4 Max".
        memory_bytes: the machine's memory, which tells the two sizes of a Max chip apart.
    """
    name = " ".join(name.split())
    memory = None if memory_bytes is None else round(memory_bytes / 2**30)
    if memory is not None and (smaller := _SMALLER_MAX.get((name, memory))):
        return smaller
    return _BY_NAME.get(name, Chip(name))


def current_device() -> DeviceName:
    """Where MLX runs by default now."""
    if mx.default_device() == mx.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def current_chip() -> Chip:
    """The chip of MLX's default device.

    A CPU's bandwidth is known where the CPU shares its memory with a known GPU, on a Mac.
    """
    device = mx.default_device()
    info: dict[str, Any] = mx.device_info(device)
    if device == mx.cpu and mx.metal.is_available():
        info = mx.device_info(mx.Device(mx.gpu)) | info
    return chip_for(str(info["device_name"]), info.get("memory_size"))
