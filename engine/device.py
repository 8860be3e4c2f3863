"""Which device to run on."""

from __future__ import annotations

import mlx.core as mx

from quire.engine.errors import EngineError
from quire.engine.memory.budget import DeviceName

_WITHOUT_GPU = (
    "MLX finds no GPU that Metal can use ({reason}): in a virtual machine, or on a Mac without "
    "one, run with --device cpu"
)


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
            "(pip install '.[cuda13]' in Quire's folder)"
        )
    device: DeviceName = "metal" if wanted == "metal" else "cuda" if wanted == "cuda" else "cpu"
    if device == "metal":
        # It counts as available wherever MLX was built for it.
        try:
            mx.device_info()
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise EngineError(_WITHOUT_GPU.format(reason=reason)) from error
    mx.set_default_device(mx.cpu if device == "cpu" else mx.gpu)
    return device
