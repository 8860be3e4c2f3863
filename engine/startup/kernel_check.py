"""Keeps a model from kernels that compute something wrong on this machine."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from quire.engine.memory.budget import DeviceName
from quire.engine.model.paged_model import PagedModel
from quire.engine.startup.model_shapes import check_own_shapes, model_shapes
from quire.kernels.choice.check import checked_variants
from quire.kernels.choice.selection import selector_for
from quire.kernels.choice.spec import DTYPES, Group, dtype_name
from quire.kernels.cuda_cache import KernelCache

_REASON_LENGTH = 200


def check_kernels(device: DeviceName, model: Any, cache: KernelCache | None = None) -> None:
    """Check the kernels of a GPU for what a loaded model computes in, before it computes anything.

    A machine is checked once; later starts read what was found.
    """
    if device == "cpu":
        return
    floating = [a for _, a in tree_flatten(model.parameters()) if dtype_name(a.dtype) in DTYPES]
    dtype = dtype_name(max(floating, key=lambda array: array.size).dtype)
    checked_variants(device, [dtype], collecting=cache.collecting() if cache else None)
    mx.clear_cache()


def avoid_dropped(device: DeviceName, paged: PagedModel, block_size: int) -> list[str]:
    """Tell ``paged``, before it allocates pages, what it must not use.

    On Metal kernels are checked at the model's own shapes too; not on CUDA, where each of these
    takes seconds to compile.

    Args:
        block_size: tokens, of the pages to come.

    Returns:
        One line for each kernel that is not used, with the reason.
    """
    if device == "cpu":
        return []
    shapes = [layer.shape for layer in paged.layers if layer.shape is not None]
    dtypes = {dtype_name(dtype) for s in shapes for dtype in (s.key_dtype, s.value_dtype)}
    if paged.states is not None:
        dtypes |= {dtype_name(use.dtype) for use in paged.states.uses}
    checked = sorted(dtypes & set(DTYPES))
    record = checked_variants(device, checked)
    if device == "metal":
        record = check_own_shapes(device, record, checked, model_shapes(paged, block_size))
        mx.clear_cache()
    wrong = [v for v in record.verdicts if v.reason and v.dtype in dtypes]
    selector = selector_for(device)
    paged.num_dropped_kernels = len(wrong)
    paged.allow_kernels = all(selector.runs(Group.PAGES, dtype) for dtype in dtypes)
    paged.allow_fused = all(selector.runs(Group.BLOCKS, dtype) for dtype in dtypes)
    if paged.states is not None:
        paged.states.choose(selector)
    return [
        f"{verdict.operation}.{verdict.variant} is not used for {verdict.dtype}: "
        + " ".join(verdict.reason.split())[:_REASON_LENGTH]
        for verdict in wrong
    ]
