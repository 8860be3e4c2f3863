"""Runs unmodified mlx-lm models over KV pages.

Every scheduled token is a batch row of its own: a model sees inputs of shape (T, 1). Each attention
layer is given a :class:`PagedLayer` where it expects its cache: `offset` is the position of each
row, and `update_and_fetch` writes the rows' keys and values to their slots and returns handles
instead of arrays. `mx.fast.scaled_dot_product_attention` is wrapped once; where it meets a handle,
the call goes to attention over pages. mlx-lm looks the function up at each call, so this one seam
covers every architecture that uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from quire.cache.pages import LayerPages, PageShape
from quire.engine.attention.backend import AttentionBackend, Query, StepInputs
from quire.engine.attention.rotated import Rotation, rotate_and_attend
from quire.engine.model.pace import Pace
from quire.kernels.activation import rational_sigmoid
from quire.kernels.cpu_rope import RowRope
from quire.kernels.heads import Heads, Scoring
from quire.kernels.page_arrays import ExtraScores, PageArrays

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
    window: int | None  # or the size of chunks
    sinks: bool
    is_plain: bool  # stored keys against stored values, no further scores
    softcap: bool = False
    # Of MLA: keys are values too, and what is stored as values are this many more dimensions of the
    # keys.
    extra_dim: int = 0
    chunked: bool = False


class CurrentStep:
    """The step that a model is running: its files look for nothing but their caches."""

    def __init__(self) -> None:
        self._inputs: StepInputs | None = None
        self.pace: Pace | None = None  # of a step that is handed over in pieces
        self.written: dict[PagedLayer, PageArrays] = {}
        self.hidden: mx.array | None = None  # behind the final norm, of rows that are pooled

    @property
    def inputs(self) -> StepInputs:
        assert self._inputs is not None, "a paged layer was asked for its place outside of a step"
        return self._inputs

    @property
    def logits_rows(self) -> mx.array | None:
        """Rows whose logits are wanted; None: all, or no step is running."""
        return None if self._inputs is None else self._inputs.logits_rows

    @property
    def pooled_rows(self) -> mx.array | None:
        """Rows whose hidden states are wanted; None: none."""
        pooled = None if self._inputs is None else self._inputs.pooled
        return None if pooled is None else pooled.rows

    @contextmanager
    def running(self, inputs: StepInputs, pace: Pace | None = None) -> Iterator[None]:
        assert self._inputs is None, "one step at a time"
        self._inputs, self.pace = inputs, pace
        try:
            yield
        finally:
            self._inputs = self.pace = self.hidden = None
            self.written.clear()


class FinalNorm(nn.Module):
    """A model's final norm that drops unwanted rows first, and so in front of the head.

    Attributes:
        selects: whether it does; None while the probe counts how often it is called.
        size: of a hidden state, as the probe showed it.
    """

    def __init__(self, norm: nn.Module, step: CurrentStep) -> None:
        super().__init__()
        # Kept out of the module tree, so that parameters keep their names.
        object.__setattr__(self, "wrapped", norm)
        object.__setattr__(self, "_step", step)
        object.__setattr__(self, "calls_of_probe", 0)
        object.__setattr__(self, "selects", None)
        object.__setattr__(self, "size", 0)

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def __call__(self, hidden: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        if self.selects is None:
            self.calls_of_probe += 1
        rows = self._step.logits_rows if self.selects else None
        output: mx.array = self.wrapped(hidden if rows is None else hidden[rows], *args, **kwargs)
        if self.selects is None:
            self.size = output.shape[-1]
        elif (pooled := self._step.pooled_rows) is not None:
            self._step.hidden = self.wrapped(hidden[pooled], *args, **kwargs)
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "wrapped"), name)


class PagedLayer:
    """Stands in for the KV cache of one attention layer.

    Attributes:
        shape: what the layer stores for a token, as the probe showed it.
        uses: how attention was called on it, as the probe showed it.
        chunk: tokens of a chunk, if a row sees those of its own only.
        pages, backend: where and how keys and values are stored, once there is memory for them.
        rotated: how attention is called, where kernels may take over behind a layer's projections.
    """

    def __init__(self, step: CurrentStep, window: int | None, chunk: int | None = None) -> None:
        self._step = step
        self.window = window
        self.chunk = chunk
        self.shape: PageShape | None = None
        self.uses: set[AttentionUse] = set()
        self.pages: LayerPages | None = None
        self.backend: AttentionBackend | None = None
        self.rotated: Heads | None = None
        self.make_pages: Callable[[PageShape], tuple[LayerPages, AttentionBackend]] | None = None

    def __bool__(self) -> bool:
        return True  # mlx-lm asks `if cache`

    @property
    def windows(self) -> set[int | None]:
        """With which, or which chunks, attention was called, as the probe showed it; None among
        them: without."""
        return {use.window for use in self.uses}

    @property
    def offset(self) -> mx.array:
        positions: mx.array = self._step.inputs.positions
        return positions

    def make_mask(
        self, num_tokens: int, return_array: bool = False, window_size: int | None = None
    ) -> WindowMask | None:
        """What the layer hands on to attention; models that compute with it cannot be paged."""
        window = window_size or self.window
        return None if window is None else WindowMask(window)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[PageHandle, PageHandle]:
        """Write (T, heads, 1, dim) rows to their slots and return handles to all pages."""
        if self.pages is None and self.make_pages is not None:
            # The first row ever seen is the probe's: learn the shapes from it.
            self.shape = PageShape(
                keys.shape[1],
                keys.shape[3],
                values.shape[1],
                values.shape[3],
                keys.dtype,
                values.dtype,
            )
            self.pages, self.backend = self.make_pages(self.shape)
        assert self.pages is not None, "a layer without pages"
        assert self.backend is not None, "pages without a backend"
        self._step.written[self] = self.backend.write(self.pages, self._step.inputs, keys, values)
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[PageHandle, PageHandle]:
        """Handles again, for layers that have no keys and values but those of this one."""
        arrays = self._step.written[self]
        return PageHandle(self, arrays, is_keys=True), PageHandle(self, arrays, is_keys=False)

    def attend(self, query: Query, keys: PageHandle, values: PageHandle) -> mx.array:
        """Attention to what ``keys`` and ``values`` stand for."""
        if self._step.pace is not None:
            # Queries depend on all layers before.
            self._step.pace.passed(query.rows)
        is_plain = query.extra is None and keys.is_keys and not values.is_keys
        arrays = keys.arrays
        extra_dim = 0
        if not is_plain:
            arrays = arrays._replace(keys=keys.pages, values=values.pages)
            if query.extra is not None and keys.is_keys and values.is_keys:
                extra_dim = query.extra.queries.shape[3]
        scoring = query.scoring
        scoring = scoring._replace(window=scoring.window or self.window)
        query = query._replace(scoring=scoring, chunked=self.chunk is not None)
        if self.make_pages is not None:
            self.uses.add(
                AttentionUse(
                    query.rows.shape[1],
                    scoring.window or self.chunk,
                    scoring.sinks is not None,
                    is_plain,
                    scoring.softcap is not None,
                    extra_dim,
                    query.chunked,
                )
            )
        assert self.backend is not None, "pages without a backend"
        return self.backend.attend(arrays, self._step.inputs, query)

    def rotate_and_attend(
        self, qkv: mx.array, rotation: Rotation, scale: float, sinks: mx.array | None
    ) -> mx.array:
        """As :func:`quire.engine.attention.rotated.rotate_and_attend`, where :attr:`rotated` is
        there."""
        assert self.rotated is not None, "a layer that kernels do not rotate"
        assert self.pages is not None, "a layer without pages"
        if self._step.pace is not None:
            self._step.pace.passed(qkv)
        step = self._step.inputs
        pages = PageArrays(self.pages.keys, self.pages.values, step.fence)
        scoring = Scoring(scale, self.rotated.window, sinks)
        return rotate_and_attend(qkv, rotation, self.rotated, pages, step, scoring)


class PageHandle:
    """The pages of one layer, seen by the model as its keys or values.

    Not an array: any use but attention fails loudly.
    """

    __slots__ = ("arrays", "is_keys", "layer")

    def __init__(self, layer: PagedLayer, arrays: PageArrays, *, is_keys: bool) -> None:
        self.layer = layer
        self.arrays = arrays
        self.is_keys = is_keys

    @property
    def pages(self) -> mx.array:
        return self.arrays.keys if self.is_keys else self.arrays.values

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
    query = Query(queries, Scoring(scale, window, sinks), extra)
    return keys.layer.attend(query, keys, values)


def install() -> None:
    """Wrap MLX's attention; calls without page handles are unchanged. Idempotent.

    On the CPU, two functions that its backend composes or computes slowly are replaced in the same
    way: together they are a fifth of a decode step.
    """
    mx.fast.scaled_dot_product_attention = _dispatch  # type: ignore[assignment]
    if mx.default_device() == mx.cpu:
        mx.fast.rope = _row_rope
        mx.sigmoid = rational_sigmoid  # type: ignore[assignment]
