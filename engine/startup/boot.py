"""What happens before MLX is imported, in one place; importing this module does not import MLX."""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
from importlib.metadata import version
from typing import TYPE_CHECKING

from quire.engine.startup.openblas import load_openblas
from quire.kernels.cache_folder import FOLDER_VARIABLE, cache_folder

if TYPE_CHECKING:
    from quire.engine.memory.budget import DeviceName

_CHOICES = ("auto", "metal", "cuda", "cpu")

# MLX closes a command buffer (a graph on CUDA) when its inputs add up to some size, and counts a
# layer's whole pages each time a kernel is given them: a step would fall into hundreds of pieces.
_SETTINGS = {"MLX_MAX_MB_PER_BUFFER": str(1 << 30)}
# On Metal the count of kernels alone would then end a buffer, each 40 or 50: eight to a step of
# decodes, whose commits cost more than they start early. A step of some 330 kernels fits this one;
# long prompt steps are handed over in pieces that say themselves where a buffer ends.
if sys.platform == "darwin":
    _SETTINGS["MLX_MAX_OPS_PER_BUFFER"] = "512"
# On CUDA it keeps some hundred graphs, and plans of attention by the shapes of prompts. It counts
# what it did not find, from the start of the process on, and raises an error once that is twice as
# many as it keeps, however long that took: a daemon may get there.
_SETTINGS["MLX_ENABLE_CACHE_THRASHING_CHECK"] = "0"
_CAPABILITY = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


def prepare_mlx(wanted: str = "auto", *, settings: bool = True) -> str | None:
    """Give MLX its environment and, on Linux, OpenBLAS, which decides how fast a CPU is.

    Args:
        wanted: the device that will compute; no BLAS is loaded for a GPU.
        settings: whether MLX runs with a worker's settings; what the user has set stays.

    Returns:
        A line that says which BLAS the CPU uses; None where that is not known or not used.

    Raises:
        RuntimeError: MLX has been imported already.
    """
    if settings:
        for name, value in _SETTINGS.items():
            os.environ.setdefault(name, value)
        if sys.platform == "linux" and wanted in ("auto", "cuda"):
            _keep_kernels()
    if sys.platform == "linux" and wanted in ("auto", "cpu"):
        return load_openblas()
    return None


def _keep_kernels() -> None:
    """Tell MLX where to keep compiled kernels on CUDA: by itself it knows them by their names only,
    whatever the GPU, until the machine is booted again."""
    capability = compute_capability()
    if capability is not None:
        folder = cache_folder() / "cuda" / f"mlx-{version('mlx')}-sm{capability}"
        os.environ.setdefault(FOLDER_VARIABLE, str(folder))


def compute_capability() -> str | None:
    """That of the NVIDIA GPU that MLX will take, such as "90"; None if there is none."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, number = ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0):
        return None
    digits = ""
    for attribute in _CAPABILITY:
        if cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, device):
            return None
        digits += str(number.value)
    return digits


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        choices=_CHOICES,
        default="auto",
        help="where to compute (default: the GPU if there is one)",
    )


def start_device(wanted: str) -> tuple[DeviceName, str | None]:
    """Make ``wanted`` MLX's default device, as a worker does; returns it and a line about BLAS.

    Raises:
        EngineError: this machine does not have the device.
    """
    note = prepare_mlx(wanted)
    from quire.engine.device import select_device

    device = select_device(wanted)
    return device, note if device == "cpu" else None
