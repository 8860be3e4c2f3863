"""What computes each layer of a model on this machine, and why no kernel does if none does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from quire.engine.model.paged_model import ON_CPU, PagedModel, layer_heads, on_gpu
from quire.engine.model.seam import PagedLayer
from quire.engine.recurrent.layer import StateItem, StateLayer
from quire.kernels.choice.selection import selector_for
from quire.kernels.choice.spec import dtype_name
from quire.kernels.heads import Heads
from quire.kernels.paged_decode_spec import PAGED_DECODE, DecodeShape
from quire.kernels.prompt_attention_spec import PROMPT_ATTENTION, PromptShape

Row = tuple[str, str, str, str]  # a report without its layers

# A decode with some context, the first chunk of a prompt, and one behind as much context.
_CONTEXT, _ROWS = 4096, 512


class LayerReport(NamedTuple):
    """Layers alike.

    Attributes:
        layers: their places among those that keep something of a sequence.
        work: "32 heads over 8 of 128, float16", or the operation on states and its sizes.
        decodes, prompts: the variants that compute them, of a prompt's first chunk and of a later
            one.
        reason: why no kernel reads and writes the pages or states; empty if they do.
    """

    layers: list[int]
    work: str
    decodes: str
    prompts: str
    reason: str


def report_layers(paged: PagedModel, block_size: int) -> list[LayerReport]:
    """One report for all layers alike, in the order of their first layers."""
    found: dict[tuple[str, ...], list[int]] = {}
    for index, cache in enumerate(paged.cache):
        for part in getattr(cache, "caches", [cache]):
            for row in _part(paged, part, block_size):
                found.setdefault(row, []).append(index)
    return [LayerReport(layers, *row) for row, layers in found.items()]


def _part(paged: PagedModel, part: object, block_size: int) -> Iterator[Row]:
    if isinstance(part, StateLayer):
        yield from map(_state, part.items)
    elif isinstance(part, PagedLayer) and part.shape is not None:
        yield from _rows(paged, part, block_size)


def _state(item: StateItem) -> Row:
    if item.use is None:
        size = "x".join(map(str, item.shape.shape))
        reason = "no kernel knows this recurrence"
        return f"state of {size}", "MLX's operations", "MLX's operations", reason
    spec, shape, dtype = item.use
    sizes = [f"{k} {v:d}" for k, v in shape._asdict().items() if k not in ("rows", "sequences")]
    variant = selector_for().select(spec, shape, dtype).variant.value
    reason = ""
    if not item.in_place:
        refused = "no kernel can be used for states of these sizes and types"
        reason = refused if on_gpu() else ON_CPU
    return f"{spec.name}: {', '.join(sizes)}, {dtype_name(dtype)}", variant, variant, reason


def _rows(paged: PagedModel, layer: PagedLayer, block_size: int) -> Iterator[Row]:
    reason = paged.why_no_kernels(layer, block_size)
    for heads in layer_heads(layer):
        if reason:
            yield _describe(heads), "MLX's operations", "MLX's operations", reason
        else:
            yield _describe(heads), _decodes(heads, block_size), _prompts(heads, block_size), ""


def _describe(heads: Heads) -> str:
    dims = f"{heads.key_dim}"
    if heads.value_dim != heads.key_dim:
        dims += f" and {heads.value_dim}"
    text = f"{heads.heads} heads over {heads.kv_heads} of {dims}, {dtype_name(heads.dtype)}"
    text += "" if heads.window is None else f", window of {heads.window}"
    text += ", chunks" if heads.chunked else ""
    text += f", {heads.extra_dim} of keys alone" if heads.extra_dim else ""
    return text + (", sinks" if heads.sinks else "") + (", soft-cap" if heads.softcap else "")


def _decodes(heads: Heads, block_size: int) -> str:
    shape = DecodeShape(
        1,
        _CONTEXT,
        *heads[:4],
        block_size,
        window=heads.window is not None,
        sinks=heads.sinks,
        softcap=heads.softcap,
        extra_dim=heads.extra_dim,
    )
    variant: str = selector_for().select(PAGED_DECODE, shape, heads.dtype).variant.value
    return variant


def _prompts(heads: Heads, block_size: int) -> str:
    names = []
    for context in (_ROWS, _CONTEXT):
        shape = PromptShape(
            _ROWS,
            context,
            *heads[:4],
            block_size,
            from_start=context == _ROWS,
            window=heads.window is not None,
            sinks=heads.sinks,
            softcap=heads.softcap,
            extra_dim=heads.extra_dim,
        )
        names.append(selector_for().select(PROMPT_ATTENTION, shape, heads.dtype).variant.value)
    return " and ".join(dict.fromkeys(names))
