"""Settings that MLX reads from the environment, once, when it first uses a device."""

from __future__ import annotations

import os

_SETTINGS = {
    # MLX closes a command buffer when its inputs add up to some size, and counts a layer's whole
    # pages each time a kernel is given them: a step would fall into hundreds of pieces.
    "MLX_MAX_MB_PER_BUFFER": str(1 << 30),
    # On CUDA MLX collects a step's kernels in graphs: it captures every matrix product in one of
    # its own, and compares each graph with those of earlier steps. That costs the host more than
    # to launch the kernels one by one, and decode steps wait for the host.
    "MLX_USE_CUDA_GRAPHS": "0",
}


def apply_mlx_settings() -> None:
    """Set what the user has not set. Call it before MLX computes anything on a GPU."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
