"""The engine as it runs on a GPU, its Metal kernels simulated: fused, in place, one step ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import pytest
from metal_sim import simulated_kernels
from model_zoo import build
from model_zoo_traffic import reference_generate

from quire.engine.attention.kernel_pages import KernelPages
from quire.engine.attention.mlx_pages import MlxPages
from quire.engine.config import EngineConfig
from quire.engine.engine import Engine
from quire.engine.messages import GenerateRequest, SamplingParams
from quire.engine.model.paged_model import PagedModel
from quire.engine.model.paging import page_model
from quire.engine.model.seam import PagedLayer
from quire.engine.startup.warm_up import Load, run_every_kernel
from quire.engine.step.runner import HostStep, ModelRunner
from quire.kernels.choice.chips import DeviceName
from quire.kernels.choice.selection import Selector, selecting
from quire.kernels.paged_decode import Partials
from quire.kernels.paged_prompt import paged_prompt
from quire.kernels.prompt_attention import prompt_attention
from quire.kernels.shared_context import attend_shared

ChooseAs = Callable[[DeviceName], Selector]


@pytest.fixture(autouse=True)
def gpu_paths() -> Iterator[None]:
    """Take the GPU's paths on the CPU."""
    with (
        mock.patch("quire.engine.model.paged_model.on_gpu", return_value=True),
        simulated_kernels(orders=1),
    ):
        yield


@pytest.fixture
def choose_as() -> Iterator[ChooseAs]:
    """Choose variants as on a device where nothing has been tuned."""
    with ExitStack() as stack:
        yield lambda device: stack.enter_context(selecting(Selector(device, None)))


def generated(engine: Engine, prompts: list[list[int]], max_tokens: int) -> dict[int, list[int]]:
    """Greedy tokens, by the prompt's index."""
    for index, prompt in enumerate(prompts):
        sampling = SamplingParams(temperature=0)
        engine.submit(GenerateRequest(index, prompt, max_tokens, sampling))
    tokens: dict[int, list[int]] = {}
    while engine.has_work:
        for output in engine.step():
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
    return tokens


@pytest.mark.parametrize("pad", [False, True], ids=["alone", "padded"])
@pytest.mark.parametrize(
    "family",
    [
        *("qwen3", "llama", "gemma2", "gemma3_text", "gemma4_text", "glm4_moe_lite", "gpt_oss"),
        *("llama_sliding", "llama4"),
    ],
)
def test_tokens_equal_those_of_mlx_lm(family: str, pad: bool, choose_as: ChooseAs) -> None:
    # As a GPU would choose: its name says how prompt chunks are brought to attention.
    device: DeviceName = "cuda" if pad else "metal"
    choose_as(device)
    model = page_model(build(family, 0), family)
    engine = Engine(
        model,
        EngineConfig(
            num_blocks=40,
            block_size=8,
            max_num_seqs=4,
            max_num_batched_tokens=24,
            # Of windows of 24 tokens, so few that blocks behind them are given to others.
            num_window_blocks=11,
            encode_ahead=True,
        ),
    )
    assert model.in_place
    assert model.is_standard == (family in ("qwen3", "llama", "llama_sliding"))
    # Prompts of one chunk and of several, one of them with the prefix of another.
    prompts = [[5 + i for i in range(37)], [3, 4, 5], [5 + i for i in range(20)] + [9, 9]]
    tokens = generated(engine, prompts, 5)
    reference = build(family, 0)
    for index, prompt in enumerate(prompts):
        assert tokens[index] == reference_generate(reference, prompt, 5)[0]


def with_norms(model: nn.Module, dtype: mx.Dtype) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.RMSNorm):
            module.weight = module.weight.astype(dtype)
    return model


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_norms_may_be_of_another_type(family: str, choose_as: ChooseAs) -> None:
    """Kernels read packs of one type: read as that, other norms would mean nothing."""
    choose_as("cuda")
    model = page_model(with_norms(build(family, 0), mx.bfloat16), family)
    engine = Engine(model, EngineConfig(num_blocks=40, block_size=8, max_num_batched_tokens=80))
    assert model.is_standard
    prompts = [[5 + i for i in range(37)], [3, 4, 5]]
    tokens = generated(engine, prompts, 6)
    reference = with_norms(build(family, 0), mx.bfloat16)
    for index, prompt in enumerate(prompts):
        assert tokens[index] == reference_generate(reference, prompt, 6)[0]


def test_norms_of_float32_between_half_precision(choose_as: ChooseAs) -> None:
    """Keys are float32 then, as mlx-lm's are."""
    choose_as("cuda")
    halves = build("qwen3", 0)
    halves.apply(lambda array: array.astype(mx.bfloat16))
    model = page_model(with_norms(halves, mx.float32), "qwen3")
    engine = Engine(model, EngineConfig(num_blocks=40, block_size=8, max_num_batched_tokens=80))
    assert model.is_standard
    assert model.layers[0].shape is not None
    assert model.layers[0].shape.key_dtype == mx.float32
    prompt = [5 + i for i in range(37)]
    engine.submit(GenerateRequest(0, prompt, 1, SamplingParams(temperature=0), logprobs=5))
    (output,) = [output for _ in range(4) for output in engine.step()]
    expected = nn.log_softmax(halves(mx.array([prompt]))[0, -1].astype(mx.float32))
    (found,) = output.logprobs
    for token, logprob in zip(found.top_ids, found.top_logprobs, strict=True):
        assert logprob == pytest.approx(float(expected[token]), abs=0.05)


@pytest.mark.parametrize(("family", "rounding"), [("qwen3", 0.03), ("llama4_dense", 0.03)])
def test_prompts_over_pages_in_half_precision(
    family: str, rounding: float, monkeypatch: pytest.MonkeyPatch, choose_as: ChooseAs
) -> None:
    """The kernel for prompts, which takes no float32, after everything a start runs.

    As on CUDA decodes beside prompts go with them, as on Metal by themselves. The tokens of so
    small a model hardly tell contexts apart, but its logits do.
    """
    launched: list[int] = []
    beside: list[bool] = []  # whether there are decodes by themselves

    def counted(queries: mx.array, *args: Any, **options: Any) -> mx.array:
        launched.append(queries.shape[0])
        return paged_prompt(queries, *args, **options)

    def noted(*args: Any, before: mx.array | None, **options: Any) -> mx.array:
        beside.append(before is not None)
        return prompt_attention(*args, before=before, **options)

    logits: dict[tuple[int, int], mx.array] = {}  # by request and place in its output

    forward = ModelRunner._forward

    def noted_forward(
        runner: ModelRunner, host: HostStep, previous: mx.array
    ) -> tuple[list[mx.array], Any]:
        outputs, uploaded = forward(runner, host, previous)
        for row, chunk in enumerate(host.batch.sampled):
            place = chunk.sequence.request.request_id, chunk.output_index
            logits[place] = outputs[0][row].astype(mx.float32)
        return outputs, uploaded

    monkeypatch.setattr(ModelRunner, "_forward", noted_forward)
    monkeypatch.setattr("quire.kernels.prompt_attention.paged_prompt", counted)
    monkeypatch.setattr("quire.kernels.attention.prompt_attention", noted)
    prompts = [[6 + i for i in range(37)], [3, 4, 5], [5 + i for i in range(20)] + [9, 9]]
    found: dict[DeviceName, dict[tuple[int, int], mx.array]] = {}
    devices: tuple[DeviceName, ...] = ("cuda", "metal")
    for device in devices:
        choose_as(device)
        model = build(family, 0)
        model.apply(lambda array: array.astype(mx.bfloat16))
        config = EngineConfig(
            num_blocks=20, block_size=16, max_num_seqs=4, max_num_batched_tokens=24
        )
        engine = Engine(page_model(model, family), config)
        if device == "cuda":
            run_every_kernel(Load(engine, vocab_size=50), 20)
        assert not engine.has_work
        assert engine.stats().blocks_used == 0
        beside.clear()
        logits.clear()
        for index, prompt in enumerate(prompts):
            engine.submit(GenerateRequest(index, prompt, 5, SamplingParams(temperature=0)))
        while engine.has_work:
            engine.step()
        assert bool(launched) == (device == "cuda")
        assert beside
        assert any(beside) == (device == "metal")
        launched.clear()
        found[device] = dict(logits)
    assert len(found["metal"]) == 5 * len(prompts)
    for place, expected in found["metal"].items():
        error = mx.abs(found["cuda"][place] - expected).max() / mx.abs(expected).max()
        assert error.item() < rounding


def test_decodes_that_share_a_prefix_read_it_together(
    monkeypatch: pytest.MonkeyPatch, choose_as: ChooseAs
) -> None:
    prefixes = [[3 + i % 40 for i in range(150)], [45 - i % 30 for i in range(130)]]
    prompts = [prefixes[i % 2] + [4 + i, 9 + i, *range(5, 5 + 3 * i)] for i in range(5)]
    prompts.append([7, 8, 9])
    shared: list[int] = []

    def counted(*args: Any, **options: Any) -> Partials | None:
        partials = attend_shared(*args, **options)
        shared.append(0 if partials is None else partials.stats.shape[0])
        return partials

    monkeypatch.setattr("quire.kernels.attention.attend_shared", counted)
    choose_as("cuda")
    generated: list[dict[int, list[int]]] = []
    for together in (False, True):
        monkeypatch.setattr(KernelPages, "_reads_together", lambda *_, chosen=together: chosen)
        model = build("qwen3", 0)
        model.apply(lambda array: array.astype(mx.bfloat16))
        config = EngineConfig(num_blocks=80, block_size=16, max_num_seqs=8)
        engine = Engine(page_model(model, "qwen3"), config)
        generated.append({})
        # The first two leave their prefixes in the cache, and finish with the others.
        for index, prompt in enumerate(prompts):
            sampling = SamplingParams(temperature=0)
            engine.submit(GenerateRequest(index, prompt, 8 if index < 2 else 4, sampling))
            for output in engine.step() + (engine.step() if index < 2 else []):
                generated[-1].setdefault(output.request_id, []).extend(output.token_ids)
        while engine.has_work:
            for output in engine.step():
                generated[-1].setdefault(output.request_id, []).extend(output.token_ids)
        assert any(shared) == together
        shared.clear()
    assert generated[0] == generated[1]


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_layers_that_no_kernel_takes_stand_beside_others(
    family: str, monkeypatch: pytest.MonkeyPatch, choose_as: ChooseAs
) -> None:
    choose_as("cuda")
    fits = PagedModel.fits_kernels

    def fits_if_odd(model: PagedModel, layer: PagedLayer, block_size: int) -> bool:
        return bool(model.layers.index(layer) % 2) and fits(model, layer, block_size)

    monkeypatch.setattr(PagedModel, "fits_kernels", fits_if_odd)
    model = page_model(build(family, 0), family)
    config = EngineConfig(num_blocks=40, block_size=8, max_num_seqs=4, max_num_batched_tokens=24)
    engine = Engine(model, config)
    backends = {type(layer.backend) for layer in model.layers}
    assert backends == {KernelPages, MlxPages}
    assert not engine.encodes_ahead
    prompts = [[5 + i for i in range(37)], [3, 4, 5], [5 + i for i in range(20)] + [9, 9]]
    tokens = generated(engine, prompts, 5)
    reference = build(family, 0)
    for index, prompt in enumerate(prompts):
        assert tokens[index] == reference_generate(reference, prompt, 5)[0]


def test_pages_of_another_size_may_be_for_other_operations() -> None:
    """Block sizes that no kernel takes run mlx-lm's own forward pass, also after others did not."""
    model = page_model(build("qwen3", 0), "qwen3")
    prompt = list(range(3, 22))
    expected = reference_generate(build("qwen3", 0), prompt, 3)[0]
    for block_size, in_place in ((8, True), (12, False), (16, True)):
        engine = Engine(model, EngineConfig(num_blocks=20, block_size=block_size, max_num_seqs=2))
        assert model.in_place == model.is_standard == in_place
        engine.submit(GenerateRequest(0, prompt, 3, SamplingParams(temperature=0)))
        tokens: list[int] = []
        while engine.has_work:
            for output in engine.step():
                tokens += output.token_ids
        assert tokens == expected
