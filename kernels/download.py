"""A step's few results on their way to the host.

On CUDA, MLX moves an array that the host reads into managed memory, which it allocates at that
moment and whose pages travel: the host waits, and MLX uses such memory again for results of
kernels. So there a small kernel writes the results where the host reads them.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from quire.kernels.gpu_kernel import GpuKernel
from quire.kernels.upload import HostSlot, Int32Array, Staging

_THREADS = 128

_to_host = GpuKernel("to_host", inputs=("values", "place"), outputs=("done",))


class Download:
    """Results that the host will read, until two more steps have begun (see :mod:`upload`).

    Attributes:
        pending: what is to be evaluated before.
    """

    def __init__(self, values: mx.array, staging: Staging) -> None:
        """``values`` is (n,) int32; ``staging`` is the step's."""
        self._slot: HostSlot | None = None
        if mx.cuda.is_available():
            self._slot = staging.take(values.size)
            self.pending = copy_to_host(values, self._slot.array)
        else:
            # An array of its own: one thread may wait for it while another works with the values.
            self.pending = mx.stop_gradient(values)
        self._size = values.size

    def read(self) -> list[int]:
        """Wait for the values; ``pending`` is being evaluated."""
        if self._slot is None:
            values: list[int] = self.pending.tolist()  # type: ignore[assignment]
            return values
        read: list[int] = self.read_array().tolist()
        return read

    def read_array(self) -> Int32Array:
        """The same as an array, for results that are many."""
        mx.eval(self.pending)
        if self._slot is None:
            return np.array(self.pending)
        return self._slot.view[: self._size].copy()


def copy_to_host(values: mx.array, place: mx.array) -> mx.array:
    """Write (n,) int32 ``values`` over the first of ``place``; done when the result is there."""
    (done,) = _to_host(
        [values, place],
        template={"THREADS": _THREADS},
        groups=(-(-values.size // _THREADS), 1, 1),
        threads=_THREADS,
        output_shapes=[(4,)],  # smaller ones lie in memory that host and GPU take turns to own
        output_dtypes=[mx.int32],
    )
    return done
