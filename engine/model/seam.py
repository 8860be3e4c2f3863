"""Runs unmodified mlx-lm models over KV pages.

Every scheduled token is a batch row of its own: a model sees inputs of shape (T, 1). Each attention
layer is given a :class:`PagedLayer` where it expects its cache: `offset` is the position of each
row, and `update_and_fetch` writes the rows' keys and values to their slots and returns handles
instead of arrays. `mx.fast.scaled_dot_product_attention` is wrapped once; where it meets a handle,
the call goes to attention over pages. mlx-lm looks the function up at each call, so this one seam
covers every architecture that uses it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx

from quire.cache.pages import LayerPages, PageShape
from quire.kernels.activation import rational_sigmoid
from quire.kernels.attention import attend
from quire.kernels.cpu_rope import RowRope
from quire.kernels.kv_write import Slots
from quire.kernels.paged_attention import ExtraScores
from quire.kernels.ragged import RaggedBatch

_sdpa: Callable[..., mx.array] = mx.fast.scaled_dot_product_attention
_row_rope = RowRope()


class CannotPage(Exception):
    """A model asks of attention what pages cannot give; the message says what, in a few words."""


class WindowMask(NamedTuple):
    """Stands in for the mask of a sliding-window layer."""

    size: int  # tokens a row sees, itself included


class AttentionUse(NamedTuple):
    """How a model called attention on one layer's pages."""

    heads: int
    window: int | None
    is_plain: bool  # stored keys against stored values, no further scores


class PendingSum(NamedTuple):
    """A sum that may be computed together with what follows it."""

    output: mx.array  # residual + delta, in the model's shape
    residual: mx.array  # (T, dim)
    delta: mx.array  # (T, dim)


class StepRows(NamedTuple):
    """The rows of a step, as every layer needs them."""

    positions: mx.array  # (T,) int32
    slots: Slots
    batch: RaggedBatch


class StepContext:
    """The arrays of the step being built, shared by all layers."""

    num_blocks: int
    block_size: int
    allow_kernels: bool = True  # False: one of those below was found wrong on this machine
    allow_fused: bool = True
    in_place: bool = False  # pages are written and read by kernels
    positions: mx.array  # (T,) int32
    slots: Slots
    batch: RaggedBatch
    wanted_rows: mx.array | None = None  # rows whose logits are wanted; None: all
    pending_sum: PendingSum | None = None  # of the block that has just run, if it is fused
    run_block: Callable[..., tuple[mx.array, mx.array]] | None = None  # fused ones, in this step

    @property
    def rows(self) -> StepRows:
        return StepRows(self.positions, self.slots, self.batch)


class PagedLayer:
    """Stands in for the KV cache of one attention layer."""

    def __init__(self, context: StepContext, window: int | None) -> None:
        self.context = context
        self.window = window
        self.pages: LayerPages | None = None
        self.shape: PageShape | None = None
        self.uses: set[AttentionUse] = set()  # as the probe showed them

    def __bool__(self) -> bool:
        return True  # mlx-lm asks `if cache`

    @property
    def offset(self) -> mx.array:
        return self.context.positions

    @property
    def in_place(self) -> bool:
        """Whether kernels write and read the pages."""
        return self.context.in_place

    def make_mask(
        self, num_tokens: int, return_array: bool = False, window_size: int | None = None
    ) -> WindowMask | None:
        """What the layer hands on to attention; models that compute with it cannot be paged."""
        window = window_size or self.window
        return None if window is None else WindowMask(window)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[PageHandle, PageHandle]:
        """Write (T, heads, 1, dim) rows to their slots and return handles to all pages."""
        if self.pages is None:
            self.shape = PageShape(
                keys.shape[1],
                keys.shape[3],
                values.shape[1],
                values.shape[3],
                keys.dtype,
                values.dtype,
            )
            # The first row ever seen is the probe's: learn the shapes from it.
            self.pages = LayerPages(self.shape, self.context.num_blocks, self.context.block_size)
        keep_rows = self.context.batch.needs_new_rows
        self.pages.write(self.context.slots, keys, values, keep_rows=keep_rows)
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[PageHandle, PageHandle]:
        return PageHandle(self, is_keys=True), PageHandle(self, is_keys=False)

    def attend(
        self,
        queries: mx.array,
        handles: tuple[PageHandle, PageHandle],
        scale: float,
        window: int | None,
        sinks: mx.array | None,
        extra: ExtraScores | None,
    ) -> mx.array:
        assert self.pages is not None
        keys, values = handles
        window = window or self.window
        is_plain = extra is None and keys.is_keys and not values.is_keys
        self.uses.add(AttentionUse(queries.shape[1], window, is_plain))
        arrays = self.pages.arrays
        if not is_plain:
            arrays = arrays._replace(keys=keys.pages, values=values.pages)
        return attend(
            queries,
            arrays,
            self.context.batch,
            scale=scale,
            window=window,
            sinks=sinks,
            extra=extra,
        )


class PageHandle:
    """The pages of one layer, seen by the model as its keys or values.

    Not an array: any use but attention fails loudly.
    """

    __slots__ = ("is_keys", "layer")

    def __init__(self, layer: PagedLayer, *, is_keys: bool) -> None:
        self.layer = layer
        self.is_keys = is_keys

    @property
    def pages(self) -> mx.array:
        assert self.layer.pages is not None
        return self.layer.pages.keys if self.is_keys else self.layer.pages.values

    @property
    def dtype(self) -> mx.Dtype:
        return self.pages.dtype

    def astype(self, dtype: mx.Dtype) -> PageHandle:
        return self  # models upcast keys for precision; attention over pages sees to that itself

    def swapaxes(self, first: int, second: int) -> _TransposedHandle:
        return _TransposedHandle(self)


# MLA adds the scores of a rotary part, `q_pe @ k_pe.swapaxes(-1, -2)`, to those of the latent part
# through attention's mask. The two classes below carry that product as far as attention. They
# derive from mx.array because Python tries a subclass's __rmatmul__ before array.__matmul__.


class _TransposedHandle(mx.array):
    def __init__(self, handle: PageHandle) -> None:
        super().__init__(0)
        self.handle = handle

    def __rmatmul__(self, queries: mx.array) -> _HandleScores:
        return _HandleScores(queries, self.handle)


class _HandleScores(mx.array):
    def __init__(self, queries: mx.array, handle: PageHandle) -> None:
        super().__init__(0)
        self.queries = queries
        self.handle = handle


def _dispatch(
    queries: mx.array,
    keys: Any,
    values: Any,
    *,
    scale: float,
    mask: Any = None,
    sinks: mx.array | None = None,
    **options: Any,
) -> mx.array:
    if type(keys) is not PageHandle:
        return _sdpa(queries, keys, values, scale=scale, mask=mask, sinks=sinks, **options)
    window, extra = None, None
    if type(mask) is WindowMask:
        window = mask.size
    elif type(mask) is _HandleScores:
        extra = ExtraScores(mask.queries, mask.handle.pages)
    elif mask is not None:
        raise CannotPage("it gives attention a mask of its own, which KV pages cannot apply")
    return keys.layer.attend(queries, (keys, values), scale, window, sinks, extra)


def install() -> None:
    """Wrap MLX's attention; calls without page handles are unchanged. Idempotent.

    On the CPU, two functions that its backend composes or computes slowly are replaced in the same
    way: together they are a fifth of a decode step.
    """
    mx.fast.scaled_dot_product_attention = _dispatch  # type: ignore[assignment]
    if mx.default_device() == mx.cpu:
        mx.fast.rope = _row_rope
        mx.sigmoid = rational_sigmoid  # type: ignore[assignment]
