"""Turns a step batch into inputs, one forward pass and one array of sampled tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from quire.engine.attention.backend import StepInputs
from quire.engine.attention.rows import Rows, round_rows
from quire.engine.grammar import Bitmask
from quire.engine.messages import TokenLogprobs
from quire.engine.model.paged_model import PagedModel
from quire.engine.model.recurring import DIRECT_RUNS, Recurring
from quire.engine.pooled import Float32Array
from quire.engine.step.logprobs import (
    LogprobInputs,
    logprobs_of,
    plan_logprobs,
    read_logprobs,
)
from quire.engine.step.pooling import plan_pooling
from quire.engine.step.sampler import SamplingInputs, plan_sampling, sample
from quire.engine.step.transfer import Form, HostTree, Transfer, Uploaded, received
from quire.engine.step_batch import StepBatch
from quire.kernels.bitmask import apply_bitmask
from quire.kernels.download import Download
from quire.kernels.draws import Draws
from quire.kernels.padding import pad_size, round_up_to_power_of_two

# MLX keeps smaller arrays in memory that host and GPU take turns to own.
_MIN_TOKENS = 4
# One launch for each shape, instead of one for each operation over the whole vocabulary.
_masked: Callable[[mx.array, mx.array], mx.array] = mx.compile(apply_bitmask)
_SMALL_LOGITS = 16  # rows, up to which their number is padded to powers of two


@dataclass(frozen=True, slots=True)
class HostStep:
    """A step before anything of it is on the device: plain numbers, which no MLX is needed for."""

    batch: StepBatch
    inputs: HostTree[StepInputs]
    sampling: HostTree[tuple[SamplingInputs, LogprobInputs | None]]
    draws: Draws | None  # None: all rows take their likeliest token
    num_drawn: int  # rows of logits from which tokens are drawn; others only score a prompt
    layers_at_once: int | None  # handed to the device while the rest is built; None: all


@dataclass(frozen=True, slots=True)
class Forward:
    """A step up to its logits, of which nothing has been sampled yet."""

    host: HostStep
    logits: mx.array  # (R, vocab), the first of them those of batch.sampled
    sums: mx.array | None  # (S, hidden_size) float32, the first of them those of batch.pooled
    previous: mx.array  # (n,) int32, the samples of the step before
    uploaded: Uploaded  # what sampling needs


@dataclass(slots=True)
class Step:
    """A step whose graph is built; ``tokens`` may still be on the device, or not even begun."""

    batch: StepBatch
    tokens: mx.array  # int32, one for each of batch.sampled; those behind mean nothing
    download: Download  # of the tokens, and of log-probabilities behind them
    num_top: int  # of the likeliest tokens beside each log-probability
    sums_shape: tuple[int, ...] = (0, 0)  # of sums of hidden states, which come last


class Results(NamedTuple):
    """What the host reads of a step.

    Attributes:
        tokens: one for each of batch.sampled.
        logprobs: one for each of batch.reported.
        sums: one for each of batch.pooled.
    """

    tokens: list[int]
    logprobs: list[TokenLogprobs]
    sums: list[Float32Array]


class ModelRunner:
    """Runs steps of one model, each as one graph.

    Where kernels write the pages a graph holds nothing that is ever replaced: graphs of forms that
    recur are compiled, and replayed instead of running the model's Python code again. At small
    batches the host decides how long a step takes.
    """

    def __init__(self, model: PagedModel, max_num_seqs: int) -> None:
        """``model`` has been given its pages; no step samples more than ``max_num_seqs`` tokens."""
        self._model = model
        self._transfer = Transfer()
        self._recurs = model.in_place
        self._run: Callable[..., list[mx.array]] = partial(_run, model)
        if self._recurs:
            self._run = Recurring(self._run, DIRECT_RUNS if model.is_standard else 1)
        # Samples of every step are as many: those of the one before are inputs of a graph.
        self._num_tokens = max(_MIN_TOKENS, _pad_logits(max_num_seqs))
        self._no_tokens = mx.zeros((self._num_tokens,), mx.int32)
        mx.eval(self._no_tokens)

    def compiling_at_once(self) -> AbstractContextManager[None]:
        """Context manager: within it, graphs of new forms are compiled at their first run, if this
        model's are compiled at all."""
        return self._run.at_once() if isinstance(self._run, Recurring) else nullcontext()

    def prepare(self, batch: StepBatch) -> HostStep:
        """Everything about a step that is decided without MLX, on any thread."""
        rows = self._model.lay_out(batch)
        logits_rows = self._logits_rows(rows)
        inputs = StepInputs(
            token_ids=rows.token_ids,
            token_places=rows.token_places,
            positions=rows.positions,
            slot_mapping=rows.full.slot_mapping,
            window_slots=None if rows.windowed is None else rows.windowed.slot_mapping,
            logits_rows=logits_rows,
            plans=self._model.plan(rows),
            pooled=plan_pooling(batch, rows),
        )
        num_drawn = len(rows) if logits_rows is None else len(logits_rows)
        vocab_size = self._model.vocab_size
        if batch.scored:
            count = max(1, len(batch.sampled))
            num_drawn = min(num_drawn, _pad_logits(count) if self._recurs else count)
        sampling, draws = plan_sampling(batch.sampled, num_drawn, vocab_size)
        logprobs = plan_logprobs(batch, vocab_size)
        sampled = HostTree.of((sampling, logprobs))
        at_once = None
        if batch.num_tokens > batch.num_decodes:
            prompts = batch.chunks[batch.num_decodes :]
            attended = sum(chunk.num_tokens * chunk.context_length for chunk in prompts)
            at_once = self._model.layers_at_once(len(rows), attended)
        return HostStep(batch, HostTree.of(inputs), sampled, draws, num_drawn, at_once)

    def build(self, host: HostStep, previous: Step | None) -> Step:
        """Build the graph of one step; nothing is computed yet.

        ``previous`` is the step before, whose samples are inputs of this one wherever a chunk names
        a source row; it need not have finished.
        """
        return self.sample(self.build_forward(host, previous))

    def build_forward(self, host: HostStep, previous: Step | None) -> Forward:
        """The first half of :meth:`build`, for steps whose masks are not known yet."""
        tokens = self._no_tokens if previous is None else previous.tokens
        outputs, uploaded = self._forward(host, tokens)
        sums = outputs[1] if len(outputs) > 1 else None
        return Forward(host, outputs[0], sums, tokens, uploaded)

    def sample(self, forward: Forward, masks: Bitmask | None = None) -> Step:
        """The second half of :meth:`build`.

        Args:
            masks: (batch.sampled, ceil(vocab / 32)) int32, the tokens that each row may draw; see
                :func:`quire.kernels.bitmask.apply_bitmask`.
        """
        host = forward.host
        logits = forward.logits[: host.num_drawn] if host.batch.scored else forward.logits
        if masks is not None:
            padding = logits.shape[0] - len(masks)
            bits = np.pad(masks, ((0, padding), (0, 0))) if padding else masks
            logits = _masked(logits, self._transfer.upload_one(bits))
        sampling, logprobs = received(host.sampling.form, forward.uploaded)
        tokens = sample(logits, sampling, host.draws, forward.previous)
        if self._recurs and tokens.size < self._num_tokens:
            tokens = mx.pad(tokens, (0, self._num_tokens - tokens.size))
        values, num_top = [tokens], 0
        sums_shape: tuple[int, ...] = (0, 0)
        if logprobs is not None:
            values.append(logprobs_of(forward.logits, tokens, logprobs))
            num_top = logprobs.num_top
        if (sums := forward.sums) is not None:
            values.append(sums.reshape(-1).view(mx.int32))
            sums_shape = sums.shape
        results = mx.concatenate(values) if len(values) > 1 else tokens
        download = self._transfer.download(results)
        return Step(host.batch, tokens, download, num_top, sums_shape)

    def forward(self, batch: StepBatch, previous: Step | None) -> mx.array:
        """(R, vocab) logits of each sampled row, or of the step's last row if R is 0."""
        forward = self.build_forward(self.prepare(batch), previous)
        return forward.logits[: max(1, len(batch.sampled))]

    def launch(self, step: Step) -> None:
        """Hand the step to the device."""
        mx.async_eval(step.tokens, step.download.pending)

    def launch_forward(self, forward: Forward) -> None:
        """Hand the first half of a step to the device."""
        mx.async_eval(forward.logits)

    def collect(self, step: Step) -> Results:
        """Wait for the step and read its samples: the one host read of a step.

        The step has been launched, by this thread or another one.
        """
        batch, size = step.batch, step.tokens.size
        if not batch.pooled:
            values = step.download.read()
            tokens, values = values[: len(batch.sampled)], values[size:]
            sums: list[Float32Array] = []
        else:
            array = step.download.read_array()
            first = array.size - math.prod(step.sums_shape)
            tokens, values = array[: len(batch.sampled)].tolist(), array[size:first].tolist()
            sums = [*array[first:].view(np.float32).reshape(step.sums_shape)[: len(batch.pooled)]]
        logprobs = read_logprobs(values, step.num_top, batch.reported) if values else []
        return Results(tokens, logprobs, sums)

    def _forward(self, host: HostStep, previous: mx.array) -> tuple[list[mx.array], Uploaded]:
        """What the model gives, and what is left of the upload for sampling."""
        self._transfer.begin_step()
        arrays = host.inputs.arrays
        uploaded = self._transfer.upload([*arrays, *host.sampling.arrays])
        count = sum(map(np.size, arrays)) if isinstance(uploaded, mx.array) else len(arrays)
        run = self._run
        if host.layers_at_once is not None:
            run = partial(_run, self._model, layers_at_once=host.layers_at_once)
        return run(host.inputs.form, uploaded[:count], previous), uploaded[count:]

    def _logits_rows(self, rows: Rows) -> npt.NDArray[np.int32] | None:
        """Padded with the last one, so that their number recurs; None: those of all rows."""
        # Something must be asked of a step that only stores keys and values, or MLX skips it.
        wanted = rows.logits_rows or [len(rows) - rows.num_padding_rows - 1]
        count = len(wanted)
        padded = pad_size(count) if self._recurs else count
        if len(rows) == padded and wanted == list(range(count)):
            return None
        if self._recurs:
            wanted = wanted + wanted[-1:] * (_pad_logits(count) - count)
        return np.array(wanted, np.int32)


def _run(
    model: PagedModel,
    form: Form[StepInputs],
    uploaded: Uploaded,
    previous: mx.array,
    layers_at_once: int | None = None,
) -> list[mx.array]:
    """What :meth:`PagedModel.__call__` gives for a step.

    Args:
        previous: (n,) int32, the samples of the step before. All attention of that step is behind
            them, so that writes in place have to wait for nothing else.
        layers_at_once: as in :class:`HostStep`.
    """
    step = received(form, uploaded)
    token_ids = mx.concatenate([step.token_ids, previous])[step.token_places]
    return model(token_ids, replace(step, fence=previous[:1]), layers_at_once)


def _pad_logits(count: int) -> int:
    return round_up_to_power_of_two(count) if count <= _SMALL_LOGITS else round_rows(count)
