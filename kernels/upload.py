"""Small host arrays on their way to the device, all of a step in one piece."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]

_PAGE = 4096  # int32 values in MLX's allocation unit on CUDA


def upload(arrays: Sequence[Int32Array]) -> list[mx.array]:
    """The arrays on the device, in their shapes."""
    if mx.default_device() == mx.cpu:
        return [mx.array(array) for array in arrays]
    packed = upload_packed(arrays)
    parts, start = [], 0
    for array in arrays:
        parts.append(packed[start : start + array.size].reshape(array.shape))
        start += array.size
    return parts


def upload_packed(arrays: Sequence[Int32Array]) -> mx.array:
    """All values in a row, as one (n,) int32 array in the device's own memory.

    On CUDA what the host writes lies in managed memory, whose pages travel to the device when a
    kernel first asks for them, and back while the host writes the next step's. One copy on the
    device spares all later kernels that; a page more on the host keeps MLX from giving the copy a
    buffer that the host has used.
    """
    size = sum(array.size for array in arrays)
    host = np.zeros((size // _PAGE + 2) * _PAGE if mx.cuda.is_available() else size, np.int32)
    np.concatenate([array.reshape(-1) for array in arrays], out=host[:size])
    return mx.array(host)[:size] + mx.array(0, mx.int32)
