"""How much memory a device can give."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from quire.engine.errors import EngineError
from quire.engine.memory.budget import DeviceName
from quire.engine.memory.host import available_memory


def usable_memory(device: DeviceName) -> int:
    """Bytes that this process may take in all, what it holds already included.

    On Metal this is what the system recommends as working set; going beyond it risks a panic. On
    CUDA and the CPU it is what can be had now, a container's limit included.

    Raises:
        EngineError: MLX does not tell.
    """
    if device == "cpu":
        return available_memory() + mx.get_active_memory() + mx.get_cache_memory()
    info: dict[str, Any] = mx.device_info()
    if device == "cuda" and "free_memory" in info:
        return int(info["free_memory"]) + mx.get_active_memory() + mx.get_cache_memory()
    if "max_recommended_working_set_size" in info:
        return int(info["max_recommended_working_set_size"])
    raise EngineError(f"MLX does not tell how much memory the {device} device has")
