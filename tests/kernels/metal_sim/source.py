"""A kernel whose Metal source is given as it is, for testing the simulator itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, cast

import mlx.core as mx

from quire.kernels.gpu_kernel import GpuKernel


class MetalKernel(GpuKernel):
    """``source`` is a kernel body in Metal, ``header`` stands in front of the kernel."""

    def __init__(
        self, source: str, inputs: Sequence[str], outputs: Sequence[str], header: str = ""
    ) -> None:
        super().__init__("probe", inputs, outputs)
        self._source = source
        self._header = header

    @cached_property
    def metal(self) -> Callable[..., Any]:
        kernel: Any = mx.fast.metal_kernel(
            name=self.name,
            input_names=self.inputs,
            output_names=self.outputs,
            header=self._header,
            source=self._source,
        )
        return cast(Callable[..., Any], kernel)
