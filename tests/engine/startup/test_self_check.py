"""Models that compute something else over pages are noticed before they serve anybody."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3_moe
from model_zoo import build

from quire.engine.errors import UnsupportedModel
from quire.engine.model.flat_linear import FlatQuantizedLinear, flatten_linears
from quire.engine.model.paged_model import PagedModel
from quire.engine.model.paging import page_model
from quire.engine.startup import self_check
from quire.engine.startup.self_check import check_against_plain_forward

NUM_BLOCKS = 16


def paged(name: str) -> PagedModel:
    model = page_model(build(name), name)
    model.allocate(NUM_BLOCKS, 8)
    return model


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "deepseek_v3", "nanbeige"])
def test_a_model_that_agrees_passes(name: str) -> None:
    assert check_against_plain_forward(paged(name), NUM_BLOCKS) < 1e-4


def test_a_model_that_sees_too_little_context_is_refused() -> None:
    model = paged("llama")
    for layer in model.layers:
        layer.window = 3
    with pytest.raises(UnsupportedModel, match=r"llama.*off by"):
        check_against_plain_forward(model, NUM_BLOCKS)


class Rounding(nn.Module):
    """An embedding whose rows depend a little on how many tokens come at once, as products do on a
    GPU."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding

    def __call__(self, token_ids: mx.array) -> mx.array:
        rows: mx.array = self.embedding(token_ids)
        noise = mx.cos(mx.arange(rows.shape[-1]) * (1.0 + token_ids.shape[-1]))
        return rows * (1 + noise / 512)


def untrained(num_experts: int) -> PagedModel:
    """Sixteen layers whose weights are as mlx-lm's classes draw them."""
    config = {
        "model_type": "qwen3_moe",
        "hidden_size": 64,
        "num_hidden_layers": 16,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": num_experts,
        "num_experts_per_tok": max(1, num_experts // 16),
        "decoder_sparse_step": 1 if num_experts else 99,
        "mlp_only_layers": [],
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "rms_norm_eps": 1e-6,
        "vocab_size": 256,
        "rope_theta": 10_000,
        "tie_word_embeddings": False,
        "max_position_embeddings": 512,
    }
    mx.random.seed(0)
    model = qwen3_moe.Model(qwen3_moe.ModelArgs.from_dict(config))
    model.model.embed_tokens = Rounding(model.model.embed_tokens)
    model.eval()
    found = page_model(model, "qwen3_moe")
    found.allocate(NUM_BLOCKS, 8)
    return found


def test_experts_chosen_by_rounding_are_no_mistake(caplog: pytest.LogCaptureFixture) -> None:
    assert check_against_plain_forward(untrained(num_experts=128), NUM_BLOCKS) > 0.01
    assert "which rounding changes by" in caplog.text


class RoundedOverPages(nn.Module):
    """An embedding that a step over pages rounds once more, as kernels do that keep intermediate
    results in registers or do not."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding

    def __call__(self, token_ids: mx.array) -> mx.array:
        rows: mx.array = self.embedding(token_ids)
        return rows * (257 / 256) if token_ids.shape[0] > 1 else rows


def untrained_bfloat16() -> PagedModel:
    model = untrained(num_experts=0).model
    model.model.embed_tokens = RoundedOverPages(model.model.embed_tokens.embedding)
    model.set_dtype(mx.bfloat16)
    found = page_model(model, "qwen3_moe")
    found.allocate(NUM_BLOCKS, 8)
    return found


def test_rounding_to_half_precision_is_no_mistake(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not even where mlx-lm rounds alike in every piece, so that it agrees with itself."""
    monkeypatch.setattr(self_check, "_HALF_PRECISION_TOLERANCE", 0.001)
    model = untrained_bfloat16()
    assert check_against_plain_forward(model, NUM_BLOCKS) > 0.001
    assert "which rounding changes by" in caplog.text
    dtypes = {array.dtype for _, array in tree_flatten(model.model.parameters())}
    assert dtypes == {mx.bfloat16}

    for layer in model.layers:
        layer.window = 3
    with pytest.raises(UnsupportedModel, match=r"off by .*, which rounding changes by"):
        check_against_plain_forward(model, NUM_BLOCKS)


def test_rounding_excuses_no_mistake_where_it_changes_little() -> None:
    model = untrained(num_experts=0)
    for layer in model.layers:
        layer.window = 3
    with pytest.raises(UnsupportedModel, match="off by"):
        check_against_plain_forward(model, NUM_BLOCKS)


def test_flattened_quantized_linears_give_the_same_rows() -> None:
    layer = nn.Sequential(nn.QuantizedLinear(64, 32, bias=True, group_size=32, bits=4))
    rows = mx.random.normal((9, 1, 64))
    expected = layer(rows)
    flatten_linears(layer)
    assert type(layer.layers[0]) is FlatQuantizedLinear
    got = layer(rows)
    assert got.shape == expected.shape
    assert mx.allclose(got, expected, atol=1e-5)
