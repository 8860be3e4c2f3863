"""A mixture of experts as on a GPU: few rows by kernels, which are simulated."""

from __future__ import annotations

from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import pytest
from metal_sim import simulated_kernels
from mlx_lm.models.switch_layers import SwitchLinear
from model_zoo import build, reference_generate

from quire.engine.config import EngineConfig
from quire.engine.engine import Engine
from quire.engine.messages import GenerateRequest, SamplingParams
from quire.engine.model import experts
from quire.engine.startup import start
from quire.engine.startup.loader import LoadedModel
from quire.engine.startup.start import page_loaded
from quire.kernels.choice.selection import Selector, selecting
from quire.kernels.experts_spec import QuantizedExpertVariant, run_experts


def quantized() -> nn.Module:
    """Experts in 4 bits, all else in float16."""
    model = build("qwen3_moe")
    nn.quantize(model, 32, 4, class_predicate=lambda _, m: isinstance(m, SwitchLinear))
    model.apply(lambda array: array.astype(mx.float16) if array.dtype == mx.float32 else array)
    return model


@pytest.mark.parametrize("variant", ["by_expert", "sorted"])
def test_tokens_equal_those_of_mlx_lm(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = LoadedModel(quantized(), "qwen3_moe", 512, "4-bit", 1, widened=False)
    prompts = [[3 + i for i in range(9)], [7, 8, 9], [40 - i for i in range(12)], [5] * 6]
    tokens: dict[int, list[int]] = {}
    ran: list[str] = []

    def noted(chosen: Any, *args: Any) -> mx.array:
        ran.append(chosen.value)
        return run_experts(chosen, *args)

    if variant == "sorted":
        choice = mock.Mock(variant=QuantizedExpertVariant.SORTED, settings={})
        monkeypatch.setattr(experts, "_choice", lambda *_: choice)
    monkeypatch.setattr(experts, "run_experts", noted)
    with (
        mock.patch.object(start, "check_kernels"),
        mock.patch.object(start, "avoid_dropped", return_value=[]),
        mock.patch("quire.engine.model.paged_model.on_gpu", return_value=True),
        simulated_kernels(orders=1),
        selecting(Selector("cuda", None)),
    ):
        paged = page_loaded(loaded, 8, "cuda", None, [], lambda *_: None)
        config = EngineConfig(
            num_blocks=40, block_size=8, max_num_seqs=4, max_num_batched_tokens=24
        )
        engine = Engine(paged, config)
        for index, prompt in enumerate(prompts):
            engine.submit(GenerateRequest(index, prompt, 6, SamplingParams(temperature=0)))
        while engine.has_work:
            for output in engine.step():
                tokens.setdefault(output.request_id, []).extend(output.token_ids)
    assert set(ran) == {variant}
    reference = quantized()
    for index, prompt in enumerate(prompts):
        assert tokens[index] == reference_generate(reference, prompt, 6)[0], index
