"""How commands that compute come to their device; importing this does not import MLX."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from quire.engine.mlx_settings import apply_mlx_settings

if TYPE_CHECKING:
    from quire.engine.device import DeviceName

_CHOICES = ("auto", "metal", "cuda", "cpu")


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        choices=_CHOICES,
        default="auto",
        help="where to compute (default: the GPU if there is one)",
    )


def start_device(wanted: str) -> tuple[DeviceName, str | None]:
    """Make ``wanted`` MLX's default device; returns it and what is to say of BLAS.

    As in a worker, MLX is given its settings, and OpenBLAS is loaded before MLX, which decides how
    fast a Linux CPU is.

    Raises:
        EngineError: this machine does not have the device.
    """
    apply_mlx_settings()
    note = None
    if sys.platform == "linux" and wanted in ("auto", "cpu"):
        from quire.engine.openblas import load_openblas

        note = load_openblas()
    from quire.engine.device import select_device

    device = select_device(wanted)
    return device, note if device == "cpu" else None
