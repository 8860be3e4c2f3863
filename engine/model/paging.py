"""Puts a model over pages and slots: caches are replaced, and a probe shows what layers store."""

from __future__ import annotations

import logging
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    RotatingKVCache,
    make_prompt_cache,
)

from quire.cache.pages import LayerPages, PageShape
from quire.engine.attention.backend import AttentionBackend, MlxPlan, Plans, StepInputs
from quire.engine.attention.mlx_pages import MlxPages
from quire.engine.errors import UnsupportedModel
from quire.engine.model import gemma2, llama4
from quire.engine.model.paged_model import PagedModel
from quire.engine.model.seam import CannotPage, CurrentStep, FinalNorm, PagedLayer, install
from quire.engine.recurrent.plan import probe_plan
from quire.engine.recurrent.states import RecurrentStates, are_recurrent
from quire.kernels.ragged import DecodeGroup, RaggedBatch
from quire.kernels.tree import to_device

logger = logging.getLogger(__name__)

# What mlx-lm's model files call the norm between the last layer and the head.
_FINAL_NORMS = (
    "norm",
    "ln_f",
    "final_layernorm",
    "norm_f",
    "final_norm",
    "embedding_norm",
    "out_norm",
    "output_norm",
    "final_layer_norm",
    "ln_out",
    "ln_final",
)
_PROBE_BLOCK_SIZE = 8
# Tokens that show what recurrent layers keep: more than any convolution looks back.
_STATE_TOKENS = 8


def page_model(model: nn.Module, name: str) -> PagedModel:
    """Put ``model`` over pages and learn their shapes by running two tokens through it.

    Raises:
        UnsupportedModel: the architecture keeps other state than keys and values, or does something
            with them that attention over pages cannot follow.
    """
    install()
    gemma2.install()
    llama4.install()
    step = CurrentStep()
    cache, layers, states = _replace_caches(model, step, name)
    norm = _wrap_final_norm(model, step)
    paged = PagedModel(model, name, step, cache, layers, norm, states)
    backend = MlxPages(_PROBE_BLOCK_SIZE)

    def make_pages(shape: PageShape) -> tuple[LayerPages, AttentionBackend]:
        return LayerPages(shape, 3, _PROBE_BLOCK_SIZE), backend

    for layer in layers:
        layer.make_pages = make_pages
    if states is not None:
        states.allocate(3)
    try:
        [logits] = paged(mx.array([0, 0]), _probe_step())
        mx.eval(logits)
    except CannotPage as error:
        raise UnsupportedModel(name, str(error)) from error
    except Exception as error:  # whatever a model file does with a cache it does not know
        logger.debug("%s over pages", name, exc_info=True)
        reason = "its code computes with cached keys, values or positions in a way of its own"
        raise UnsupportedModel(name, f"{reason} ({type(error).__name__})") from error
    # A model that runs its layers more than once needs every row until the last time.
    if norm is not None:
        norm.selects = norm.calls_of_probe == 1
    for layer in layers:
        layer.make_pages = None
    # Models that share keys and values between layers leave some caches unused.
    paged.layers = [layer for layer in layers if layer.shape is not None]
    if not paged.layers and states is None:
        raise UnsupportedModel(name, "it computes attention without storing keys and values")
    paged.vocab_size = logits.shape[-1]
    return paged


def _probe_step() -> StepInputs:
    """Two rows of two sequences at different positions: a model that takes the offset for a single
    number fails at once, and not when it meets its first batch."""
    positions = np.array([0, 3], np.int32)
    tables = np.array([[1], [2]], np.int32)
    groups = [DecodeGroup(0, positions + 1, tables)]
    return to_device(
        StepInputs(
            token_ids=np.zeros(2, np.int32),
            token_places=np.arange(2, dtype=np.int32),
            positions=positions,
            slot_mapping=tables[:, 0] * _PROBE_BLOCK_SIZE + positions,
            logits_rows=None,
            plans=Plans(
                mlx=MlxPlan(RaggedBatch(groups, [])),
                states=probe_plan(),
            ),
            fence=mx.zeros((1,), mx.int32),
        )
    )


def _replace_caches(
    model: nn.Module, step: CurrentStep, name: str
) -> tuple[list[Any], list[PagedLayer], RecurrentStates | None]:
    """The model's cache list with every cache replaced, and the replacements in order."""
    layers: list[PagedLayer] = []
    caches = make_prompt_cache(model)
    states: RecurrentStates | None = None
    if are_recurrent(caches):
        mx.eval(model(mx.zeros((1, _STATE_TOKENS), mx.int32), cache=caches))
        states = RecurrentStates(model, step)

    def replace(cache: Any) -> Any:
        if cache is None:
            return None
        if type(cache) is CacheList:
            return CacheList(*(replace(part) for part in cache.caches))
        if type(cache) is ArraysCache and states is not None:
            return states.stand_in(cache)
        if type(cache) is KVCache:
            layer = PagedLayer(step, None)
        elif type(cache) is RotatingKVCache and cache.keep == 0:
            layer = PagedLayer(step, cache.max_size)
        elif type(cache) is ChunkedKVCache:
            layer = PagedLayer(step, None, cache.chunk_size)
        else:
            reason = f"its layers keep a {type(cache).__name__}, which has no paged form"
            raise UnsupportedModel(name, reason)
        layers.append(layer)
        return layer

    return [replace(cache) for cache in caches], layers, states


def _wrap_final_norm(model: nn.Module, step: CurrentStep) -> FinalNorm | None:
    """Wrap the norm that stands beside the model's layers, if it has one."""
    for _, module in model.named_modules():
        if not any(isinstance(module.get(name), list) for name in ("layers", "h", "blocks")):
            continue
        for name in _FINAL_NORMS:
            norm = module.get(name)
            if isinstance(norm, nn.Module):
                wrapped = FinalNorm(norm, step)
                setattr(module, name, wrapped)
                return wrapped
    return None
