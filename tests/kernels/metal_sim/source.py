"""A kernel whose Metal source is given as it is, for testing the simulator itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, cast

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from metal_sim.run import simulate
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


def run_source(
    kernel: MetalKernel,
    inputs: list[npt.NDArray[np.generic] | mx.array],
    outputs: Sequence[tuple[tuple[int, ...], mx.Dtype]],
    groups: tuple[int, int, int] = (1, 1, 1),
    threads: int = 64,
    mutation: tuple[str, str] | None = None,
    **template: int | bool | mx.Dtype,
) -> list[mx.array]:
    """The outputs, given by shape and dtype; ``mutation`` replaces text by other text."""
    return simulate(
        kernel,
        inputs,
        template=template,
        groups=groups,
        threads=threads,
        output_shapes=[shape for shape, _ in outputs],
        output_dtypes=[dtype for _, dtype in outputs],
        mutate=None if mutation is None else lambda text: text.replace(*mutation),
    ).outputs
