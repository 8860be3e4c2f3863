"""Which layers of a family kernels serve on a GPU, at the sizes that published models have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import mlx.core as mx
from model_zoo import build

from quire.engine.model.paged_model import PagedModel, layer_heads
from quire.engine.model.paging import page_model
from quire.engine.model.seam import PagedLayer
from quire.engine.recurrent.layer import StateLayer
from quire.kernels.choice.selection import Selector, selecting
from quire.kernels.choice.spec import Kind
from quire.kernels.heads import Heads
from quire.kernels.prompt_attention_spec import PROMPT_ATTENTION, PromptShape
from quire.kernels.recurrent import Use

BLOCK_SIZE = 16


def obstacles(name: str) -> list[str]:
    """Why MLX's operations compute some layers of ``name`` on an NVIDIA GPU; empty if none."""
    paged = page_model(build(name, 0), name)
    for layer in paged.layers:
        assert layer.shape is not None
        even = -(-layer.shape.value_dim // 8) * 8  # as all published ones are
        layer.shape = replace(layer.shape, value_dim=even)
    with (
        mock.patch("quire.engine.model.paged_model.on_gpu", return_value=True),
        selecting(Selector("cuda", None)) as selector,
    ):
        return list(dict.fromkeys(_obstacles(paged, selector)))


def _obstacles(paged: PagedModel, selector: Selector) -> Iterator[str]:
    for cache in paged.cache:
        parts: list[Any] = getattr(cache, "caches", [cache])
        for part in parts:
            if isinstance(part, PagedLayer) and part.shape is not None:
                if reason := paged.why_no_kernels(part, BLOCK_SIZE):
                    yield f"attention: {reason}"
                elif not all(_takes_prompts(heads, selector) for heads in layer_heads(part)):
                    yield "prompts of latent attention: MLX's products, which are faster"
            elif isinstance(part, StateLayer):
                yield from (
                    "recurrence: no kernel knows it"
                    for item in part.items
                    if item.use is None or not _takes(item.use, selector)
                )


def _takes_prompts(heads: Heads, selector: Selector) -> bool:
    """Whether a kernel attends to prompts, or MLX's fused attention. The zoo has float32."""
    flags = heads.window is not None, heads.sinks, heads.softcap, heads.extra_dim
    shape = PromptShape(512, 4096, *heads[:4], BLOCK_SIZE, False, *flags)
    variant = selector.select(PROMPT_ATTENTION, shape, mx.bfloat16).variant
    return not heads.extra_dim or PROMPT_ATTENTION.variants[variant].kind is Kind.KERNEL


def _takes(use: Use, selector: Selector) -> bool:
    """Whether a kernel computes the operation; the zoo's heads are narrower than any model's."""
    published = next(iter(use.spec.surveyed.values()))
    kept = {k: v for k, v in use.shape._asdict().items() if isinstance(v, bool)}
    variant = selector.select(use.spec, published._replace(**kept), use.dtype).variant
    return use.spec.variants[variant].kind is Kind.KERNEL
