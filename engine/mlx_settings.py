"""Settings that MLX reads from the environment, once, when it is first used."""

from __future__ import annotations

import os

# MLX closes a command buffer (a graph on CUDA) when its inputs add up to some size, and counts a
# layer's whole pages each time a kernel is given them: a step would fall into hundreds of pieces.
_SETTINGS = {"MLX_MAX_MB_PER_BUFFER": str(1 << 30)}


def apply_mlx_settings() -> None:
    """Set what the user has not set. Call it before mlx is imported."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
