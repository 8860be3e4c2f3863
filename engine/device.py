"""Which device to run on, and how much memory it has."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

from quire.engine.errors import EngineError

DeviceName = Literal["metal", "cuda", "cpu"]


def select_device(wanted: str) -> DeviceName:
    """Make ``wanted`` ("auto", "metal", "cuda" or "cpu") MLX's default device.

    Raises:
        EngineError: this machine, or this build of MLX, does not have it.
    """
    has_metal, has_cuda = mx.metal.is_available(), mx.cuda.is_available()
    if wanted == "auto":
        wanted = "metal" if has_metal else "cuda" if has_cuda else "cpu"
    if wanted == "metal" and not has_metal:
        raise EngineError("device metal is not available: it needs a Mac with Apple silicon")
    if wanted == "cuda" and not has_cuda:
        raise EngineError(
            "device cuda is not available: it needs an NVIDIA GPU and MLX's CUDA build "
            "(pip install 'quire[cuda13]')"
        )
    mx.set_default_device(mx.cpu if wanted == "cpu" else mx.gpu)
    device: DeviceName = "metal" if wanted == "metal" else "cuda" if wanted == "cuda" else "cpu"
    return device


def usable_memory(device: DeviceName) -> int:
    """Bytes that weights, KV pages and activations may take together.

    On Metal this is what the system recommends as working set; going beyond it risks a panic. On
    CUDA and the CPU it is what can be had now, a container's limit included.
    """
    if device == "cpu":
        return _spare_memory() + mx.get_active_memory()
    info: dict[str, Any] = mx.device_info()
    if device == "cuda" and "free_memory" in info:
        return int(info["free_memory"]) + mx.get_active_memory() + mx.get_cache_memory()
    if "max_recommended_working_set_size" in info:
        return int(info["max_recommended_working_set_size"])
    raise EngineError(
        f"MLX does not tell how much memory the {device} device has: set --kv-cache-memory"
    )


def _spare_memory() -> int:
    if sys.platform != "linux":
        return int(os.sysconf("SC_PHYS_PAGES")) * int(os.sysconf("SC_PAGE_SIZE")) // 2
    fields = dict(
        line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line
    )
    spare = int(fields["MemAvailable"].split()[0]) * 1024
    limit = Path("/sys/fs/cgroup/memory.max")
    used = Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        spare = min(spare, int(text) - int(used.read_text()))
    return spare
