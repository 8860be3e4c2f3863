"""A step's graph holds every kernel launched for it: MLX leaves out what no result depends on.

Page writes are side effects that MLX does not know of, so this is not given.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import mlx.core as mx
import pytest
from model_zoo import build

from quire.engine.messages import SamplingParams
from quire.engine.model.paging import page_model
from quire.engine.step.runner import ModelRunner
from quire.engine.step_batch import Chunk, StepBatch
from quire.kernels.choice.chips import DeviceName
from quire.kernels.choice.selection import Selector, selecting
from quire.kernels.gpu_kernel import GpuKernel, TemplateValue

_BAD = -(1 << 31)  # what an int32 output holds instead of NaN


class Launches:
    """Stands in for all kernels: outputs are 1, or NaN after NaN and in the marked launch."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.marked: int | None = None

    def call(
        self,
        kernel: GpuKernel,
        inputs: Sequence[mx.array],
        *,
        template: dict[str, TemplateValue],
        groups: tuple[int, int, int],
        threads: int,
        output_shapes: Sequence[tuple[int, ...]],
        output_dtypes: Sequence[mx.Dtype],
    ) -> list[mx.array]:
        state = mx.array(float("nan") if self.marked == len(self.names) else 0.0)
        self.names.append(kernel.name)
        for one in inputs:
            bad = one == _BAD if one.dtype == mx.int32 else mx.isnan(one)
            state = state + mx.where(bad.any(), mx.nan, 0.0)
        return [
            mx.broadcast_to(
                mx.where(mx.isnan(state), _BAD, 1) if dtype == mx.int32 else 1 + state, shape
            ).astype(dtype)
            for shape, dtype in zip(output_shapes, output_dtypes, strict=True)
        ]


@pytest.fixture
def launches() -> Iterator[Launches]:
    """Take the GPU's paths on the CPU."""

    stand_in = Launches()

    def call(kernel: GpuKernel, *args: object, **options: object) -> list[mx.array]:
        return stand_in.call(kernel, *args, **options)  # type: ignore[arg-type]

    mx.disable_compile()
    with (
        mock.patch("quire.engine.model.paged_model.on_gpu", return_value=True),
        mock.patch.object(GpuKernel, "launch", call),
    ):
        yield stand_in
    mx.enable_compile()


def chunk(start: int, num_tokens: int, blocks: list[int], samples: bool = True) -> Chunk:
    tokens = list(range(5, 5 + num_tokens))
    params = SamplingParams(temperature=0)
    sequence: Any = SimpleNamespace(request=SimpleNamespace(logprobs=None))
    return Chunk(
        sequence, 0, start, num_tokens, tokens, -1, array("i", blocks), samples, params, 0, 0, []
    )


FRESH = chunk(0, 12, [1, 2])
UNFINISHED = chunk(0, 8, [3], samples=False)
CONTINUED = chunk(8, 5, [4, 5])
DECODES = [chunk(11, 1, [6, 7]), chunk(3, 1, [8])]
STEPS = {
    "fresh": StepBatch(0, [FRESH], 0),
    "unfinished": StepBatch(0, [UNFINISHED], 0),
    "continued": StepBatch(0, [CONTINUED], 0),
    "decodes": StepBatch(0, DECODES, 2),
    "mixed": StepBatch(0, [*DECODES, FRESH, UNFINISHED, CONTINUED], 2),
}


@pytest.mark.parametrize("device", ["metal", "cuda"])
@pytest.mark.parametrize("family", ["qwen3", "mixtral", "gemma3_text", "gpt_oss"])
def test_no_launch_is_left_out(family: str, device: DeviceName, launches: Launches) -> None:
    with selecting(Selector(device, None)):
        model = page_model(build(family, 0), family)
        model.allocate(10, 8)
        runner = ModelRunner(model, max_num_seqs=8)

        def is_finite(batch: StepBatch) -> bool:
            launches.names.clear()
            return bool(mx.isfinite(runner.forward(batch, None)).all())

        for name, batch in STEPS.items():
            launches.marked = None
            assert is_finite(batch), name
            names = list(launches.names)
            assert len(names) >= len(model.layers)
            for index, launched in enumerate(names):
                launches.marked = index
                assert not is_finite(batch), f"{launched} is not part of a step of {name}"
