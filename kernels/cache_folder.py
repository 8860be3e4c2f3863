"""Where Quire keeps what it can find out again."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Where MLX keeps compiled kernels on CUDA; its own choice does not outlive a boot of the machine.
FOLDER_VARIABLE = "MLX_PTX_CACHE_DIR"


def cache_folder() -> Path:
    """Of this user."""
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "quire"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "quire"
    return Path.home() / ".cache" / "quire"
