"""A model that runs the rows of a step over the pages of its layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from quire.cache.pages import LayerPages
from quire.engine.attention.backend import AttentionBackend, Plans, StepInputs
from quire.engine.attention.decode_rows import Reach
from quire.engine.attention.kernel_pages import KernelPages
from quire.engine.attention.mlx_pages import MlxPages
from quire.engine.attention.rows import PaddedSizes, Rows
from quire.engine.errors import UnsupportedModel
from quire.engine.memory.budget import layers_at_once, whole_rows
from quire.engine.model.block_weights import standard_part
from quire.engine.model.pace import Pace
from quire.engine.model.seam import CurrentStep, FinalNorm, PagedLayer
from quire.engine.model.standard import StandardForward
from quire.engine.recurrent.states import RecurrentStates
from quire.engine.step.pooling import sum_rows
from quire.engine.step_batch import StepBatch
from quire.kernels.heads import Heads

# Tokens between states kept of a long prompt: without pages, and at least.
_STATE_SPACING, _LEAST_SPACING = 2048, 256
ON_CPU = "MLX computes on the CPU"  # why there are no kernels


def on_gpu() -> bool:
    """Whether MLX computes where the kernels run."""
    return mx.default_device() != mx.cpu


class PagedModel:
    """Made by :func:`quire.engine.model.paging.page_model`.

    Attributes:
        model: mlx-lm's.
        name: of its architecture.
        cache: what the model is called with; ``layers`` are in it.
        layers: those that store keys and values.
        states: of the recurrent layers, if there are any.
        vocab_size: width of the logits.
        block_size: tokens per block, once there are pages.
        num_dropped_kernels: that compute something wrong here, whether or not it would take them.
        allow_kernels: False where a kernel that writes or reads pages was found wrong here.
        allow_fused: False where one was that a standard block needs.
        is_standard: whether the forward pass is our own, of standard blocks.
    """

    vocab_size: int
    block_size: int

    def __init__(
        self,
        model: nn.Module,
        name: str,
        step: CurrentStep,
        cache: list[Any],
        layers: list[PagedLayer],
        final_norm: FinalNorm | None,
        states: RecurrentStates | None = None,
    ) -> None:
        """
        Args:
            step: whose inputs the layers and the norm look at.
            final_norm: drops the rows whose logits nobody wants.
        """
        self.model = model
        self.name = name
        self.layers = layers
        self.states = states
        self.num_dropped_kernels = 0
        self.allow_kernels = True
        self.allow_fused = True
        self.is_standard = False
        self._step = step
        self.cache = cache
        self._final_norm = final_norm
        self._standard: StandardForward | None = None
        self._mlx: MlxPages | None = None
        self._kernels: KernelPages | None = None

    def __call__(
        self, token_ids: mx.array, step: StepInputs, layers_at_once: int | None = None
    ) -> list[mx.array]:
        """(T,) int token ids -> (R, vocab) logits of the rows that ``step`` wants, and behind them
        sums of hidden states where it wants any: see :func:`sum_rows`.

        With ``layers_at_once`` all but the last layers have been handed to the device then.
        """
        pace = None if layers_at_once is None else Pace(layers_at_once)
        if self.is_standard:
            assert self._standard is not None, "standard blocks that nobody has read"
            return self._standard(token_ids, step, list(self._pages()), pace)
        with self._step.running(step, pace):
            logits: mx.array = self.model(token_ids[:, None], cache=self.cache)
            hidden = self._step.hidden
        rows = step.logits_rows
        if rows is not None and (self._final_norm is None or not self._final_norm.selects):
            logits = logits[rows]
        if self.states is not None:
            logits = self.states.stored_with(logits)
        if step.pooled is None:
            return [logits[:, 0]]
        assert hidden is not None, "a model without a norm in front of its head"
        return [logits[:, 0], sum_rows(hidden[:, 0], step.pooled)]

    @property
    def hidden_size(self) -> int:
        """Of the vectors that prompts can become; 0: hidden states cannot be reached, since no norm
        stands in front of the head, or it is called more than once."""
        norm = self._final_norm
        return norm.size if norm is not None and norm.selects else 0

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes in the pages of all layers that keep it."""
        return self._token_bytes(windowed=False)

    @property
    def bytes_per_window_token(self) -> int:
        """Bytes that one token takes, while it is seen, in layers with sliding windows."""
        return self._token_bytes(windowed=True)

    def _token_bytes(self, *, windowed: bool) -> int:
        shapes = [layer.shape for layer in self.layers if self.is_windowed(layer) is windowed]
        return sum(shape.bytes_per_token for shape in shapes if shape)

    @property
    def window(self) -> int | None:
        """Tokens that a row sees at most in layers with blocks of their own, which are freed behind
        it: of a window or of a chunk; None: there are no such layers."""
        seen = [windows for layer in self.layers if (windows := layer.windows)]
        if any(None in windows and len(windows) > 1 for windows in seen):
            return None  # a plan tells layers apart by their windows
        return max((w for windows in seen for w in windows if w is not None), default=None)

    @property
    def reach(self) -> Reach | None:
        """How far back rows see in layers with blocks of their own; None: there are none."""
        if self.window is None:
            return None
        return Reach(self.window, any(use.chunked for each in self.layers for use in each.uses))

    def is_windowed(self, layer: PagedLayer) -> bool:
        """Whether the layer has blocks of its own."""
        return self.window is not None and bool(layer.windows) and None not in layer.windows

    @property
    def page_bytes(self) -> int:
        """Bytes of all pages."""
        return sum(pages.nbytes for pages in self._pages())

    @property
    def bytes_per_state(self) -> int:
        """Bytes that a sequence's states take in all recurrent layers."""
        return 0 if self.states is None else self.states.bytes_per_slot

    @property
    def state_spacing(self) -> int:
        """Tokens between states kept of a long prompt: about as many as weigh as much in pages, so
        that states and pages of a prompt take the same memory."""
        size = self.block_size
        tokens = _STATE_SPACING
        if self.bytes_per_token:
            tokens = max(_LEAST_SPACING, round(self.bytes_per_state / self.bytes_per_token))
        return max(1, round(tokens / size)) * size

    @property
    def has_kernels(self) -> bool:
        """Whether kernels keep the pages of any layer."""
        return self._kernels is not None

    @property
    def in_place(self) -> bool:
        """Whether kernels write the pages, and there are no states that MLX writes.

        Then nothing that a step's graph refers to is ever replaced: the graph may be built while
        the step before runs, compiled, and replayed.
        """
        return self._mlx is None and (self.states is None or self.states.in_place)

    def fits_kernels(self, layer: PagedLayer, block_size: int) -> bool:
        """Whether the GPU kernels can serve a layer, as the probe showed it."""
        return not self.why_no_kernels(layer, block_size)

    def why_no_kernels(self, layer: PagedLayer, block_size: int) -> str:
        """Why the GPU kernels cannot serve a layer, in a few words; empty if they can."""
        if not on_gpu():
            return ON_CPU
        if not self.allow_kernels:
            return "a kernel for pages was found wrong on this machine"
        if layer.shape is None:
            return "it stores nothing"
        if not layer.shape.fits_kernels(block_size):
            return "no kernel takes heads of these sizes and types"
        if not all(use.is_plain or use.extra_dim for use in layer.uses):
            return "it attends to what it stores in a way of its own"
        return ""

    def allocate(
        self,
        num_blocks: int,
        block_size: int,
        num_state_slots: int = 0,
        num_window_blocks: int | None = None,
    ) -> None:
        """Give every layer its pages or states, in the shapes the probe showed.

        Args:
            num_window_blocks: of layers with sliding windows; None: as many as others have, so that
                a step may use the same ones in all layers.

        Raises:
            UnsupportedModel: chunks of the context do not begin with a block.
        """
        self.block_size = block_size
        reach = self.reach
        if reach is not None and reach.chunked and reach.size % block_size:
            reason = (
                f"its layers see chunks of {reach.size} tokens, which blocks of {block_size} cut"
            )
            raise UnsupportedModel(self.name, reason)
        if self.states is not None:
            self.states.allocate(num_state_slots)
        by_kernels = [layer for layer in self.layers if self.fits_kernels(layer, block_size)]
        kinds = {heads: None for layer in by_kernels for heads in layer_heads(layer)}
        self._kernels = KernelPages(list(kinds), block_size, reach) if by_kernels else None
        others = [layer for layer in self.layers if layer not in by_kernels]
        windows = {window for layer in others for window in layer.windows}
        self._mlx = None
        if others or not by_kernels:
            self._mlx = MlxPages(block_size, windows, reach)
        for layer in self.layers:
            assert layer.shape is not None, "a layer that the probe has not seen"
            layer.pages = None  # the old ones, before there are new ones
            windowed = self.is_windowed(layer)
            count = num_blocks
            if windowed and num_window_blocks is not None:
                count = num_window_blocks
            layer.pages = LayerPages(layer.shape, count, block_size, windowed=windowed)
            layer.backend = self._kernels if layer in by_kernels else self._mlx
            layer.rotated = self._rotated(layer) if layer in by_kernels else None
        self.is_standard = self.in_place and self.allow_fused and self._read_standard()

    def _rotated(self, layer: PagedLayer) -> Heads | None:
        """How attention is called on a layer, if kernels may rotate and write in front of it."""
        shape, found = layer.shape, layer_heads(layer)
        if not self.allow_fused or shape is None or len(found) != 1:
            return None
        keys = shape.key_heads, shape.key_dim, shape.key_dtype
        alike = keys == (shape.value_heads, shape.value_dim, shape.value_dtype)
        [heads] = found
        plain = not (heads.softcap or heads.extra_dim or heads.chunked)
        return heads if alike and plain else None

    def _read_standard(self) -> bool:
        """Whether all blocks are standard; their weights are joined once."""
        if self._standard is None:
            part = standard_part(self.model)
            heads = [layer_heads(layer) for layer in self.layers]
            if part is not None and all(len(found) == 1 for found in heads):
                self._standard = StandardForward(part, [found[0] for found in heads])
        return self._standard is not None

    def lay_out(self, batch: StepBatch) -> Rows:
        """The rows of a step in the order that suits attention; on any thread."""
        backend: AttentionBackend | None = self._mlx or self._kernels
        assert backend is not None, "a model without pages"
        return backend.lay_out(batch)

    def layers_at_once(self, num_rows: int, attended: int = 0) -> int | None:
        """Of a step of so many rows of prompts, ``attended`` being the sum of their contexts; None:
        all, as on the CPU, where MLX builds a few tens of operations ahead anyway."""
        if not on_gpu() or num_rows <= self.whole_rows:
            return None
        num_layers = len(self.layers)
        if self.states is not None:
            num_layers += len(self.states.layers)
        return layers_at_once(num_rows * self._row_bytes, num_layers, attended)

    @property
    def whole_rows(self) -> int:
        """Rows of the longest step of prompts that always goes whole."""
        if not on_gpu():
            return 0
        return whole_rows(self._row_bytes, "metal" if mx.metal.is_available() else "cuda")

    @property
    def _row_bytes(self) -> int:
        """Of the queries of a row, in the layer where they are largest; of a model without them,
        of what a recurrent layer convolves."""
        sizes = [
            use.heads * layer.shape.key_dim * layer.shape.key_dtype.size
            for layer in self.layers
            if layer.shape is not None
            for use in layer.uses
        ]
        if not sizes and self.states is not None:
            return self.states.row_bytes
        return max(sizes, default=0)

    def padded_sizes(self, max_decodes: int, max_rows: int) -> PaddedSizes:
        """What :meth:`lay_out` pads steps to; nothing where it does not pad."""
        if self._mlx is not None or self._kernels is None:
            return PaddedSizes([], [])
        return self._kernels.padded_sizes(max_decodes, max_rows)

    def plan(self, rows: Rows) -> Plans:
        """How attention of all layers sees ``rows``, on the host; on any thread."""
        kernels = None if self._kernels is None else self._kernels.plan(rows)
        prompts = [plan.prompts for plan in (kernels or {}).values() if plan.prompts is not None]
        return Plans(
            None if self._mlx is None else self._mlx.plan(rows),
            kernels,
            any(plan.needs_new_rows for plan in prompts),
            None if self.states is None else self.states.plan(rows),
        )

    def _pages(self) -> Iterator[LayerPages]:
        for layer in self.layers:
            assert layer.pages is not None, "a layer without pages"
            yield layer.pages


def layer_heads(layer: PagedLayer) -> list[Heads]:
    """How attention is called on a layer, each way once."""
    shape = layer.shape
    assert shape is not None, "a layer that the probe has not seen"
    return [
        Heads(
            use.heads,
            shape.key_heads,
            shape.key_dim,
            shape.key_dim if use.extra_dim else shape.value_dim,
            None if use.chunked else use.window,
            use.sinks,
            shape.key_dtype,
            use.softcap,
            use.extra_dim,
            use.chunked,
        )
        for use in layer.uses
    ]
