"""Turns a step batch into arrays, one forward pass and one array of sampled tokens."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, islice

import mlx.core as mx
import numpy as np

from quire.cache.pages import PageShape
from quire.engine.model.paged_model import PagedModel
from quire.engine.model.seam import AttentionUse
from quire.engine.step.compiled_blocks import CompiledBlocks
from quire.engine.step.compiled_decode import CompiledDecode, DecodeInputs
from quire.engine.step.compiled_mixed import CompiledMixed, pad_wanted
from quire.engine.step.layout import Layout
from quire.engine.step.sampler import sample
from quire.engine.step_batch import Chunk, StepBatch
from quire.kernels.attention import plan_batch, prompt_variant
from quire.kernels.choice.selection import select
from quire.kernels.download import Download
from quire.kernels.kv_write import Slots
from quire.kernels.mixed_attention_spec import MIXED_ATTENTION, MixedShape, MixedVariant
from quire.kernels.paged_prompt import HostTiles, plan_tiles
from quire.kernels.prompt_attention import PromptVariant, is_aligned
from quire.kernels.prompt_attention_spec import PromptShape
from quire.kernels.ragged import PromptPlan, RaggedBatch
from quire.kernels.upload import begin_step, upload

_MIN_TOKENS = 4


@dataclass(frozen=True, slots=True)
class HostStep:
    """A step before anything of it is on the device: plain numbers, which no MLX is needed for."""

    batch: StepBatch
    layout: Layout
    decodes: DecodeInputs | None  # if it is one of decodes alone that a compiled step can take
    tiles: dict[int | None, HostTiles] | None  # by window, if one launch attends to all rows


@dataclass(slots=True)
class Step:
    """A step whose graph is built; ``tokens`` may still be on the device, or not even begun."""

    batch: StepBatch
    tokens: mx.array  # int32, one for each of batch.sampled; there may be more, which mean nothing
    download: Download  # of the tokens


class ModelRunner:
    def __init__(self, model: PagedModel) -> None:
        """``model`` has been given its pages."""
        self._model = model
        self._context = model.context
        in_place = model.context.in_place
        self._blocks = CompiledBlocks() if in_place and model.num_fused else None
        self._decode = CompiledDecode(model, self._blocks) if in_place else None
        self._mixed = None if self._blocks is None else CompiledMixed(model, self._blocks)
        self._prompts = {
            use.window: _prompt_layer(layer.shape, use, model.context.block_size)
            for layer in model.layers
            for use in layer.uses
            if layer.shape is not None
        }

    def build(self, host_step: HostStep, previous: Step | None) -> Step:
        """Build the graph of one step; nothing is computed yet.

        ``previous`` is the step before, whose samples are inputs of this one wherever a chunk names
        a source row; it need not have finished.
        """
        begin_step()
        batch, layout = host_step.batch, host_step.layout
        logits = self._forward(host_step, previous)
        if not layout.sampled:
            tokens = mx.argmax(logits, axis=-1).astype(mx.int32)
            return Step(batch, tokens, Download(tokens))
        tokens = sample(logits, layout.sampled)
        if layout.sampled != batch.sampled:
            row_of = {id(chunk): row for row, chunk in enumerate(layout.sampled)}
            order = np.array([row_of[id(chunk)] for chunk in batch.sampled], np.int32)
            tokens = tokens[upload([order])[0]]
        if self._decode is not None and tokens.size < _MIN_TOKENS:
            # MLX keeps smaller arrays in memory that host and GPU take turns to own.
            tokens = mx.pad(tokens, (0, _MIN_TOKENS - tokens.size))
        return Step(batch, tokens, Download(tokens))

    def forward(self, batch: StepBatch, previous: Step | None) -> mx.array:
        """(R, vocab) logits of each sampled row, or of the step's last row if R is 0."""
        begin_step()
        return self._forward(self.lay_out(batch), previous)

    def launch(self, step: Step) -> None:
        """Hand the step to the device."""
        mx.async_eval(step.tokens, step.download.pending)

    def collect(self, step: Step) -> list[int]:
        """Wait for the step and read its samples: the one host read of a step.

        The step has been launched, by this thread or another one.
        """
        return step.download.read()[: len(step.batch.sampled)]

    def lay_out(self, batch: StepBatch) -> HostStep:
        """Everything about a step that is decided without MLX, on any thread."""
        tiled = self._blocks is not None and self._is_tiled(batch)
        # The decode kernel takes rows of any lengths together.
        layout = Layout(
            batch,
            self._context.block_size,
            group_decodes=self._decode is None,
            share_decodes=self._decode is None or self._decode.may_share(batch.num_decodes),
            padded=tiled or (self._blocks is not None and self._can_compile(batch)),
            tiled=tiled,
        )
        decodes, tiles = None, None
        if self._decode is not None and _samples_every_row(layout) and not layout.prompts:
            decodes = self._decode.prepare(layout)
        if layout.tiled:
            tiles = {
                window: plan_tiles(
                    layout.prompts, window, layer.heads, layer.kv_heads, layout.num_after
                )
                for window, (layer, _) in self._prompts.items()
            }
        return HostStep(batch, layout, decodes, tiles)

    def _can_compile(self, batch: StepBatch) -> bool:
        """Whether prompts, if there are any, come in sizes that recur."""
        prompts = batch.chunks[batch.num_decodes :]
        return bool(prompts) and all(
            self._recurs(chunk, layer, dtype)
            for layer, dtype in self._prompts.values()
            for chunk in prompts
        )

    def _recurs(self, chunk: Chunk, layer: PromptShape, dtype: mx.Dtype) -> bool:
        variant = prompt_variant(chunk.num_tokens, chunk.context_length, layer, dtype)
        if variant is not PromptVariant.SDPA_PADDED:
            return variant is PromptVariant.PAGED_KERNEL
        return chunk.start == 0 or not is_aligned(chunk.start, chunk.num_tokens)

    def _is_tiled(self, batch: StepBatch) -> bool:
        """Whether there are prompts, all of them for the kernel, and decodes go with them.

        The sizes of such steps recur.
        """
        decodes, prompts = batch.chunks[: batch.num_decodes], batch.chunks[batch.num_decodes :]
        if not prompts:
            return False
        longest = max((chunk.context_length for chunk in decodes), default=0)
        for window, (layer, dtype) in self._prompts.items():
            for chunk in prompts:
                context = chunk.context_length
                variant = prompt_variant(chunk.num_tokens, context, layer, dtype)
                if variant is not PromptVariant.PAGED_KERNEL:
                    return False
            seen = longest if window is None else min(longest, window)
            shape = MixedShape(
                len(decodes), seen, *layer[2:7], window=layer.window, sinks=layer.sinks
            )
            if not decodes:
                continue
            if select(MIXED_ATTENTION, shape, dtype).variant is not MixedVariant.FUSED:
                return False
        return True

    def _forward(self, host_step: HostStep, previous: Step | None) -> mx.array:
        layout = host_step.layout
        tokens = previous.tokens if previous is not None else None
        context = self._context
        context.run_block = None
        if host_step.decodes is not None:
            assert self._decode is not None, "inputs of a compiled step that does not exist"
            return self._decode(host_step.decodes, tokens)
        # Something must be asked of a step that only stores keys and values, or MLX skips it.
        wanted = layout.sampled_rows or [len(layout.positions) - 1]
        pending = layout.source_rows >= 0
        arrays = [
            layout.positions,
            layout.slot_mapping,
            layout.token_ids,
            np.maximum(layout.source_rows, 0),
            pending.astype(np.int32),
            pad_wanted(wanted) if layout.padded else np.array(wanted, np.int32),
        ]
        tiles = host_step.tiles or {}
        uploaded = iter(upload([*arrays, *chain(*(each.arrays for each in tiles.values()))]))
        context.positions, slot_mapping, token_ids, source_rows, is_pending, wanted_rows = islice(
            uploaded, len(arrays)
        )
        context.batch = RaggedBatch(layout.groups, layout.prompts, num_after=layout.num_after)
        after = None
        if self._decode is not None:
            after = self._decode.order_after(tokens)
            context.batch.decodes = self._decode.rows(layout)
        context.slots = Slots(slot_mapping, context.block_size, after)
        context.wanted_rows = None if _samples_every_row(layout) else wanted_rows
        if pending.any():
            assert tokens is not None, "a token is awaited from a step that does not exist"
            sampled = tokens[source_rows]
            token_ids = sampled if pending.all() else mx.where(is_pending, sampled, token_ids)
        if self._mixed is None or not layout.padded:
            return self._model(token_ids)
        for window, (layer, dtype) in self._prompts.items():
            if tiles:
                plan = PromptPlan(tiles[window].on_device(uploaded), [], [], None)
            else:
                plan = plan_batch(context.batch, window, layer, dtype)
            context.batch.prompt_plans[window] = plan
        plans = context.batch.prompt_plans.values()
        context.batch.needs_new_rows = any(plan.needs_new_rows for plan in plans)
        return self._mixed(token_ids, context.rows, wanted_rows)[: len(wanted)]


def _samples_every_row(layout: Layout) -> bool:
    return len(layout.sampled_rows or [0]) == len(layout.positions)


def _prompt_layer(
    shape: PageShape, use: AttentionUse, block_size: int
) -> tuple[PromptShape, mx.Dtype]:
    """What prompt chunks have in common in a layer, and the type it computes in."""
    layer = PromptShape(
        rows=1,
        context=1,
        heads=use.heads,
        kv_heads=shape.key_heads,
        key_dim=shape.key_dim,
        value_dim=shape.value_dim,
        block_size=block_size,
        window=use.window is not None,
    )
    return layer, shape.key_dtype
