"""Steps on their way to the device."""

from __future__ import annotations

import contextlib
from concurrent.futures import Future
from contextlib import AbstractContextManager
from functools import partial

import mlx.core as mx

from quire.engine.capacity import Capacity
from quire.engine.device_thread import Submit, do_later, do_now
from quire.engine.errors import is_out_of_memory
from quire.engine.grammar import Bitmask
from quire.engine.model.paged_model import PagedModel
from quire.engine.step.runner import Forward, HostStep, ModelRunner, Results, Step
from quire.engine.step_batch import StepBatch


class Encoder:
    """Builds the graphs of steps and hands them to the device.

    Attributes:
        ahead: whether a step is handed over as soon as its graph is built, while the step before it
            runs; else by :meth:`launch`.
        submit: has a job done by the thread that needs MLX for it.
    """

    def __init__(self, model: PagedModel, max_num_seqs: int, ahead: bool | None = None) -> None:
        """``model`` has been given its pages. ``ahead`` is None: wherever a step may be."""
        self.ahead = model.in_place if ahead is None else ahead
        self.submit: Submit = do_now
        self._model = model
        self._max_num_seqs = max_num_seqs
        self._runner = ModelRunner(model, max_num_seqs)

    def compiling_at_once(self) -> AbstractContextManager[None]:
        """Context manager: within it, steps of a new form are compiled at their first run."""
        return self._runner.compiling_at_once()

    def prepare(self, batch: StepBatch) -> HostStep:
        """As :meth:`ModelRunner.prepare`, on the calling thread."""
        return self._runner.prepare(batch)

    def is_late(self, host_step: HostStep) -> bool:
        """Whether the step is built only when the result of its future is asked for.

        It is long, and its first layers run while it is built: they must not run beside the step
        before.
        """
        return host_step.layers_at_once is not None and not self.ahead

    def encode(self, host_step: HostStep, previous: Future[Step] | None) -> Future[Step]:
        """A step behind the ``previous`` one, which need not be built yet."""

        def build() -> Step:
            before = None if previous is None else previous.result()
            return self._launched(self._runner.build(host_step, before))

        return self._submit_for(host_step)(build)

    def encode_forward(self, host_step: HostStep, previous: Future[Step] | None) -> Future[Forward]:
        """The first half of a step with grammars."""

        def build() -> Forward:
            before = None if previous is None else previous.result()
            forward = self._runner.build_forward(host_step, before)
            if self.ahead:
                self._runner.launch_forward(forward)
            return forward

        return self._submit_for(host_step)(build)

    def encode_samples(self, forward: Future[Forward], masks: Bitmask) -> Future[Step]:
        """The second half."""
        return self.submit(lambda: self._launched(self._runner.sample(forward.result(), masks)))

    def launch(self, step: Step) -> None:
        self._runner.launch(step)

    def collect(self, step: Step) -> Results:
        """Wait for a step that has been launched."""
        return self._runner.collect(step)

    # ---- after errors, and under pressure

    def clear_cache(self) -> None:
        """Give back what MLX keeps for reuse."""
        self.submit(mx.clear_cache).result()

    def clear_device(self, capacity: Capacity) -> None:
        """Let nothing be left of steps for which there was no memory."""
        self.submit(partial(self._clear_device, capacity)).result()

    def replace_pages(self, capacity: Capacity) -> None:
        """Take the model's pages away and give it those of ``capacity``.

        Raises:
            RuntimeError: of MLX, if there is no memory for them.
        """
        self.submit(partial(self._replace_pages, capacity)).result()

    def _clear_device(self, capacity: Capacity) -> None:
        # What is still running may report the same error once more.
        with contextlib.suppress(RuntimeError):
            mx.synchronize()
        if not self._model.in_place:
            # Some arrays are results of steps that will never be computed.
            capacity.allocate()
        mx.clear_cache()

    def _replace_pages(self, capacity: Capacity) -> None:
        try:
            mx.synchronize()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # Graphs that were compiled hold the old ones.
        self._runner = ModelRunner(self._model, self._max_num_seqs)
        capacity.allocate()
        mx.clear_cache()

    def _submit_for(self, host_step: HostStep) -> Submit:
        return do_later if self.is_late(host_step) else self.submit

    def _launched(self, step: Step) -> Step:
        if self.ahead:
            self._runner.launch(step)
        return step
