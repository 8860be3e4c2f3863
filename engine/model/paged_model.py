"""A model made ready for pages: caches replaced, shapes probed, unwanted rows dropped."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import CacheList, KVCache, RotatingKVCache, make_prompt_cache

from quire.cache.pages import LayerPages
from quire.engine.errors import UnsupportedModel
from quire.engine.model.fused_blocks import add_and_norm, can_fuse_norm, fuse_blocks
from quire.engine.model.seam import CannotPage, PagedLayer, StepContext, install
from quire.kernels.kv_write import Slots
from quire.kernels.ragged import DecodeGroup, RaggedBatch

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


def on_gpu() -> bool:
    """Whether MLX computes where the kernels run."""
    return mx.default_device() != mx.cpu


@dataclass(frozen=True)
class PagedModel:
    """Runs (T,) token ids over the pages that ``context`` describes."""

    model: nn.Module
    name: str
    context: StepContext
    layers: list[PagedLayer]  # those that store keys and values
    vocab_size: int  # width of the logits
    _cache: list[Any]
    _final_norm: _FinalNorm | None
    _fused: list[int] = field(default_factory=list)  # how many blocks, once that is known

    def __call__(self, token_ids: mx.array) -> mx.array:
        """(T,) int token ids -> (R, vocab) logits of the wanted rows."""
        logits: mx.array = self.model(token_ids[:, None], cache=self._cache)
        rows = self.context.wanted_rows
        if rows is not None and (self._final_norm is None or not self._final_norm.selects):
            logits = logits[rows]
        return logits[:, 0]

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes in the pages of all layers."""
        return sum(layer.shape.bytes_per_token for layer in self.layers if layer.shape)

    @property
    def num_fused(self) -> int:
        """Blocks that run fused, once there are pages."""
        return sum(self._fused)

    @property
    def windows(self) -> set[int | None]:
        """Sizes of the windows its layers see; None where they see everything."""
        return {use.window for layer in self.layers for use in layer.uses}

    def fits_kernels(self, block_size: int) -> bool:
        """Whether the GPU kernels can serve every layer, as the probe showed them."""
        return on_gpu() and all(
            layer.shape is not None
            and layer.shape.fits_kernels(block_size)
            and all(use.is_plain for use in layer.uses)
            for layer in self.layers
        )

    def allocate(self, num_blocks: int, block_size: int) -> None:
        """Give every layer its pages, in the shapes the probe showed."""
        self.context.num_blocks = num_blocks
        self.context.block_size = block_size
        self.context.in_place = self.context.allow_kernels and self.fits_kernels(block_size)
        if self.context.in_place and self.context.allow_fused and not self._fused:
            self._fused.append(fuse_blocks(self.model))
        for layer in self.layers:
            assert layer.shape is not None
            layer.pages = None  # the old ones, before there are new ones
            layer.pages = LayerPages(
                layer.shape, num_blocks, block_size, in_place=self.context.in_place
            )


def page_model(model: nn.Module, name: str) -> PagedModel:
    """Put ``model`` over pages and learn their shapes by running two tokens through it.

    Raises:
        UnsupportedModel: the architecture keeps other state than keys and values, or does something
            with them that attention over pages cannot follow.
    """
    install()
    context = StepContext()
    cache, layers = _replace_caches(model, context, name)
    # Two rows of two sequences at different positions: a model that takes the offset for a single
    # number fails here, and not when it meets its first batch.
    context.num_blocks, context.block_size = 3, _PROBE_BLOCK_SIZE
    context.positions = mx.array([0, 3], mx.int32)
    # Blocks 1 and 2, at the positions above.
    mapping = mx.array([1, 2], mx.int32) * _PROBE_BLOCK_SIZE + context.positions
    context.slots = Slots(mapping, _PROBE_BLOCK_SIZE)
    tables = np.array([[1], [2]], np.int32)
    context.batch = RaggedBatch([DecodeGroup(0, np.array([1, 4], np.int32), tables)], [])
    norm = _wrap_final_norm(model, context)
    paged = PagedModel(model, name, context, layers, 0, cache, norm)
    try:
        logits = paged(mx.array([0, 0]))
        mx.eval(logits)
    except CannotPage as error:
        raise UnsupportedModel(name, str(error)) from error
    except Exception as error:  # whatever a model file does with a cache it does not know
        logger.debug("%s over pages", name, exc_info=True)
        reason = "its code computes with cached keys, values or positions in a way of its own"
        raise UnsupportedModel(name, f"{reason} ({type(error).__name__})") from error
    # A model that runs its layers more than once needs every row until the last time.
    if norm is not None:
        norm.selects = norm.calls == 1
    # Models that share keys and values between layers leave some caches unused.
    layers[:] = [layer for layer in layers if layer.shape is not None]
    if not layers:
        raise UnsupportedModel(name, "it computes attention without storing keys and values")
    return replace(paged, vocab_size=logits.shape[-1])


def _replace_caches(
    model: nn.Module, context: StepContext, name: str
) -> tuple[list[Any], list[PagedLayer]]:
    """The model's cache list with every KV cache replaced, and the replacements in order."""
    layers: list[PagedLayer] = []

    def replace(cache: Any) -> Any:
        if cache is None:
            return None
        if type(cache) is CacheList:
            return CacheList(*(replace(part) for part in cache.caches))
        if type(cache) is KVCache:
            window = None
        elif type(cache) is RotatingKVCache and cache.keep == 0:
            window = cache.max_size
        else:
            raise UnsupportedModel(name, _why_not(type(cache).__name__))
        layers.append(PagedLayer(context, window))
        return layers[-1]

    return [replace(cache) for cache in make_prompt_cache(model)], layers


def _why_not(cache_type: str) -> str:
    if cache_type == "ArraysCache":
        return "it has recurrent layers, whose state cannot be kept in KV pages"
    return f"its layers keep a {cache_type}, which has no paged form"


class _FinalNorm(nn.Module):
    """A model's final norm that drops unwanted rows first, and so in front of the head."""

    def __init__(self, norm: nn.Module, context: StepContext) -> None:
        super().__init__()
        # Kept out of the module tree, so that parameters keep their names.
        object.__setattr__(self, "_norm", norm)
        object.__setattr__(self, "_context", context)
        object.__setattr__(self, "calls", 0)
        object.__setattr__(self, "selects", False)

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def __call__(self, hidden: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        self.calls += 1
        rows = self._context.wanted_rows if self.selects else None
        if rows is None and self._context.pending_sum is not None and can_fuse_norm(self._norm):
            return add_and_norm(self._context, hidden, self._norm)[1].reshape(hidden.shape)
        self._context.pending_sum = None
        output: mx.array = self._norm(hidden if rows is None else hidden[rows], *args, **kwargs)
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_norm"), name)


def _wrap_final_norm(model: nn.Module, context: StepContext) -> _FinalNorm | None:
    """Wrap the norm that stands beside the model's layers, if it has one."""
    for _, module in model.named_modules():
        if not any(isinstance(module.get(name), list) for name in ("layers", "h", "blocks")):
            continue
        for name in _FINAL_NORMS:
            norm = module.get(name)
            if isinstance(norm, nn.Module):
                wrapped = _FinalNorm(norm, context)
                setattr(module, name, wrapped)
                return wrapped
    return None
