"""Which kernels are launched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import mlx.core as mx

from quire.kernels.gpu_kernel import GpuKernel


@contextmanager
def launches() -> Iterator[Counter[str]]:
    """How often each kernel is launched."""
    found: Counter[str] = Counter()
    launch = GpuKernel.launch

    def counted(kernel: GpuKernel, *args: Any, **kwargs: Any) -> list[mx.array]:
        found[kernel.name] += 1
        return launch(kernel, *args, **kwargs)

    with mock.patch.object(GpuKernel, "launch", counted):
        yield found
