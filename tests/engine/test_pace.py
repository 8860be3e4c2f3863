"""Long steps are handed over in pieces: in order, at most two at a time, and to no other tokens."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from unittest import mock

import mlx.core as mx
import pytest
from metal_sim import simulated_kernels
from model_zoo import build, reference_generate

from quire.engine.config import EngineConfig
from quire.engine.device_thread import DeviceThread
from quire.engine.engine import Engine
from quire.engine.memory import budget
from quire.engine.memory.budget import layers_at_once, whole_rows
from quire.engine.messages import GenerateRequest, SamplingParams
from quire.engine.model import pace
from quire.engine.model.pace import Pace
from quire.engine.model.paging import page_model
from quire.kernels.choice.selection import Selector, selecting

GREEDY = SamplingParams(temperature=0)


def test_two_pieces_are_on_their_way(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []
    monkeypatch.setattr(pace.mx, "async_eval", lambda *a: calls.append(("hand over", int(a[0]))))
    monkeypatch.setattr(pace.mx, "eval", lambda *a: calls.append(("wait for", int(a[0]))))
    steps = Pace(2)
    for layer in range(7):
        steps.passed(mx.array(layer), mx.array(0))
    handed = [("hand over", 1), ("hand over", 3), ("wait for", 1), ("hand over", 5)]
    assert calls == [*handed, ("wait for", 3)]


@pytest.mark.parametrize(
    ("rows", "query_size", "layers", "expected"),
    [
        (2048, 4096, 36, 1),  # an 8B model in half precision
        (8192, 4096, 36, 1),
        (512, 4096, 36, 4),
        (64, 4096, 36, None),
        (2048, 2048, 28, 2),  # 0.6B
        (512, 2048, 28, 8),
        (128, 2048, 28, None),
        (512, 384, 6, None),  # the demo
    ],
)
def test_pieces_are_as_large_as_they_may_be(
    rows: int, query_size: int, layers: int, expected: int | None
) -> None:
    assert layers_at_once(rows * query_size * 2, layers) == expected


def test_steps_of_a_few_hundred_rows_go_whole_on_cuda() -> None:
    row = 2 * 4096  # an 8B model in half precision
    assert whole_rows(row, "cuda") == 512
    assert whole_rows(row, "metal") == 0
    model = page_model(build("qwen3", 0), "qwen3")
    with mock.patch("quire.engine.model.paged_model.on_gpu", return_value=True):
        rows = model.whole_rows
        assert model.layers_at_once(rows, attended=1 << 40) is None
        assert model.layers_at_once(rows + 1, attended=1 << 40) == 1


@pytest.fixture(params=["gpu", "mlx pages"])
def paced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Every layer is a piece; how many were passed in the steps that were."""
    monkeypatch.setattr(budget, "_PIECE_BYTES", 1)
    monkeypatch.setattr(budget, "PIECES_AHEAD", 1)
    monkeypatch.setitem(budget._WHOLE_BYTES, "cuda", 0)
    passed: list[int] = []
    run = Pace.passed

    def counted(self: Pace, *hidden: mx.array) -> None:
        passed.append(hidden[0].shape[0])
        run(self, *hidden)

    monkeypatch.setattr(Pace, "passed", counted)
    with ExitStack() as stack:
        gpu = mock.patch("quire.engine.model.paged_model.on_gpu", return_value=True)
        stack.enter_context(gpu)
        if request.param == "gpu":
            stack.enter_context(simulated_kernels(orders=1))
            stack.enter_context(selecting(Selector("metal", None)))
        else:
            fits = "quire.engine.model.paged_model.PagedModel.fits_kernels"
            stack.enter_context(mock.patch(fits, return_value=False))
        yield passed


@pytest.mark.parametrize(
    "family", ["qwen3", "gemma3_text", "deepseek_v3", "qwen3_next", "mamba2", "rwkv7"]
)
@pytest.mark.parametrize("beside", [False, True], ids=["one thread", "two threads"])
def test_tokens_stay_those_of_mlx_lm(family: str, beside: bool, paced: list[int]) -> None:
    draw = random.Random(0)
    model = page_model(build(family, 0), family)
    settings: dict[str, Any] = {"num_blocks": 60, "block_size": 8, "max_num_seqs": 4}
    engine = Engine(model, EngineConfig(max_num_batched_tokens=24, **settings))
    prompts = [[draw.randrange(3, 90) for _ in range(n)] for n in (60, 5, 31, 1)]
    tokens: dict[int, list[int]] = {i: [] for i in range(len(prompts))}

    def serve() -> None:
        for i, prompt in enumerate(prompts):
            engine.submit(GenerateRequest(i, prompt, 5, GREEDY))
            for output in engine.step():
                tokens[output.request_id] += output.token_ids
        while engine.has_work:
            for output in engine.step():
                tokens[output.request_id] += output.token_ids

    if beside and engine.encodes_ahead:
        device = DeviceThread()
        engine.encode_on(device)
        device.run_beside(serve)
    else:
        serve()
    for i, prompt in enumerate(prompts):
        assert tokens[i] == reference_generate(build(family, 0), prompt, 5)[0]
    assert paced, "no step was handed over in pieces"
    recurrent = [] if model.states is None else model.states.layers
    assert len(paced) % (len(model.layers) + len(recurrent)) == 0, "not every layer passed"
    if model.in_place:
        # Steps of decodes alone, which are compiled, are not; with padding they have up to 4 rows.
        assert min(paced) > 4
