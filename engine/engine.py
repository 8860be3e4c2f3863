"""The engine's loop: schedule a step, run it, hand out its tokens."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx

from quire.engine.capacity import Capacity
from quire.engine.config import EngineConfig
from quire.engine.device_thread import DeviceThread, Submit, do_now
from quire.engine.encoder import Encoder
from quire.engine.errors import EngineError, is_out_of_memory
from quire.engine.grammar import GrammarCompiler
from quire.engine.grammar_queue import GrammarQueue, Masks
from quire.engine.memory.faults import MemoryFaults
from quire.engine.memory.pressure import Pressure, Relief
from quire.engine.messages import GenerateRequest, TokenOutput, WorkerStats
from quire.engine.model.paged_model import PagedModel
from quire.engine.model.paging import page_model
from quire.engine.pool_stats import cache_stats, pool_stats
from quire.engine.scheduler import Scheduler
from quire.engine.step.runner import Forward, Step
from quire.engine.step_batch import StepBatch
from quire.engine.step_clock import StepClock
from quire.engine.step_limits import StepLimits

logger = logging.getLogger(__name__)

_REASON_LENGTH = 200


@dataclass(slots=True)
class InFlight:
    """A step that has been scheduled and not committed."""

    batch: StepBatch
    encoded: Future[Any] | None = None  # its step, or the first half of it


class Unsampled(NamedTuple):
    """A step whose forward pass has been handed to the device, and whose masks are being filled."""

    flight: InFlight
    forward: Future[Forward]
    masks: Future[Masks]


class Engine:
    """Continuous batching of one model over paged KV.

    Each :meth:`step` works one step ahead: while a step runs on the device, the next one is
    scheduled and its graph is built from tokens that are not known yet. One thread does it all,
    unless :meth:`encode_on` makes them two.
    """

    def __init__(
        self,
        model: Any,
        config: EngineConfig,
        name: str | None = None,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        """``model`` is an mlx-lm model, or one that has been paged already.

        Without ``grammars`` no request may have one.

        Raises:
            UnsupportedModel: the architecture cannot run over pages.
        """
        if not isinstance(model, PagedModel):
            model = page_model(model, name or model.model_type)
        self.config = config
        self.model = model
        self._capacity = Capacity(config, model)
        self._capacity.allocate()
        self._encoder = Encoder(model, config.max_num_seqs, config.encode_ahead)
        self._relief: Relief | None = None
        if config.least_blocks is not None:
            self._relief = Relief(config.num_blocks, config.least_blocks)
        self._next: Future[Step] | None = None
        self._unsampled: Unsampled | None = None  # becomes the next one when it is sampled
        self._in_flight: deque[InFlight] = deque()
        self._outputs: list[TokenOutput] = []
        self._unconfirmed: list[TokenOutput] = []  # of a step whose success is not known yet
        self._fill: Submit = do_now
        self._grammars = GrammarQueue(grammars)
        self.forget(None)

    def forget(self, mixed_prompt_tokens: int | None) -> None:
        """Begin anew, with nothing cached and nothing counted; graphs that are compiled stay.

        Args:
            mixed_prompt_tokens: as in :class:`StepLimits`.
        """
        assert not self._in_flight, "a step that is still running"
        config = self.config
        self._pools = self._capacity.make_pools()
        limits = StepLimits(
            config.max_num_seqs,
            config.max_num_batched_tokens,
            mixed_prompt_tokens,
            config.max_attended,
        )
        self.scheduler = Scheduler(self._pools, limits, self.model.name)
        self._faults = MemoryFaults(config.max_num_batched_tokens)
        self._num_steps = 0
        self._clock = StepClock()

    def compiling_at_once(self) -> AbstractContextManager[None]:
        """Context manager: within it, steps of a new form are compiled at their first run."""
        return self._encoder.compiling_at_once()

    @property
    def encodes_ahead(self) -> bool:
        """Whether a step's graph is built while the step before it runs."""
        return self._encoder.ahead

    def encode_on(self, device: DeviceThread) -> None:
        """From now on :meth:`step` is called beside ``device``, whose thread made the engine.

        It leaves to that thread what needs MLX: a step is encoded there while here the tokens of
        the one before are handed out and the next is scheduled. Masks of grammars are filled on a
        third one meanwhile.
        """
        assert self.encodes_ahead, "a step whose launch waits for another cannot be encoded early"
        self._encoder.submit = device.submit
        self._fill = ThreadPoolExecutor(1, "masks").submit

    def submit(self, request: GenerateRequest) -> None:
        """Queue a request. Raises what :meth:`Scheduler.submit` raises, and GrammarError."""
        if not request.grammar:
            self.scheduler.submit(request)
            return
        grammar = self._grammars.begin(request)
        if grammar is not None:
            self.scheduler.submit(request, grammar)

    def abort(self, request_id: int) -> None:
        if not self._grammars.drop(request_id):
            self.scheduler.abort(request_id)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._in_flight) or bool(self._grammars)

    def step(
        self,
        receive: Callable[[], None] | None = None,
        send: Callable[[list[TokenOutput]], None] | None = None,
    ) -> list[TokenOutput]:
        """Run one step and return its new tokens; the first step of a burst returns none.

        A step that the device has no memory for is run again, in smaller ones if need be; if that
        does not help either, its requests end with an error. Other failures are raised.

        Args:
            receive: called at the last moment at which a request submitted or aborted can still
                take part in the step that is built next.
            send: called with tokens of the step before, where these could not be trusted earlier;
                by default they are returned with those of this one.
        """
        try:
            self._step(receive, send)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._recover(error)
        outputs, self._outputs = self._outputs, []
        return outputs

    def _step(
        self,
        receive: Callable[[], None] | None,
        send: Callable[[list[TokenOutput]], None] | None,
    ) -> None:
        """One iteration.

        A step with grammars goes to the device in two halves: its forward pass at once, its
        sampling once the tokens of the step before are committed and the masks that follow from
        them are filled. The next step is scheduled while the masks are filled.
        """
        encoder = self._encoder
        self._clock.begin()
        if not encoder.ahead:
            self._encode_unsampled()
            self._clock.end_build()
            if self._next is not None:
                # MLX lets no more than a few of the CPU's operations wait: this lasts nearly as
                # long as they take.
                encoder.launch(self._next.result())
            self._clock.end_wait()
        if receive is not None:
            receive()
        idle = not self._in_flight and not self.scheduler.has_work
        self._outputs += self._submit_compiled(wait=idle)
        batch = self.scheduler.schedule()
        self._clock.end_schedule()
        flight, host_step = None, None
        if batch is not None:
            flight = InFlight(batch)
            self._in_flight.append(flight)
            host_step = encoder.prepare(batch)
        self._encode_unsampled()
        running, self._next = self._next, None
        forward: Future[Forward] | None = None
        if flight is not None and host_step is not None:
            if flight.batch.has_grammars:
                flight.encoded = forward = encoder.encode_forward(host_step, running)
            else:
                flight.encoded = self._next = encoder.encode(host_step, running)
        self._clock.end_build()
        num_tokens: int | None = None
        if running is not None:
            step = running.result()
            num_tokens = step.batch.num_tokens
            self._confirm(send)
            is_late = host_step is not None and encoder.is_late(host_step)
            self._retire(step, None if is_late else forward or self._next)
        if flight is not None and forward is not None:
            masks = self._fill(partial(self._grammars.fill_masks, flight.batch))
            self._unsampled = Unsampled(flight, forward, masks)
        self._clock.end_emit(num_tokens)

    def _encode_unsampled(self) -> None:
        """The second half of the step that has grammars, if there is one."""
        unsampled, self._unsampled = self._unsampled, None
        if unsampled is None:
            return
        flight, forward, filling = unsampled
        masks, failed = filling.result()
        # Behind the tokens of the step before, which may not have left yet.
        (self._unconfirmed or self._outputs).extend(
            self.scheduler.fail(sequence, str(error))
            for sequence, error in failed
            if not sequence.finished
        )
        flight.encoded = self._next = self._encoder.encode_samples(forward, masks)

    def _retire(self, step: Step, following: Future[Any] | None) -> None:
        """Wait for a step and commit its tokens.

        MLX reports an error of the device once, to whoever asks first, which may be the thread that
        encodes the ``following`` step. So the tokens leave only when that step has been encoded
        without an error too.
        """
        tokens, logprobs, sums = self._encoder.collect(step)
        self._clock.end_wait()
        is_encoded = following is None or following.done()
        if following is not None and is_encoded:
            following.result()
        outputs = self.scheduler.commit(step.batch, tokens, logprobs, sums)
        self._in_flight.popleft()
        self._num_steps += 1
        if self._faults.succeeded():
            self.scheduler.limits.prompt_tokens = self._faults.prompt_tokens
        if is_encoded:
            self._outputs += outputs
        else:
            self._unconfirmed = outputs

    def _confirm(self, send: Callable[[list[TokenOutput]], None] | None) -> None:
        """Let the unconfirmed tokens leave: the step after theirs was encoded without an error."""
        outputs, self._unconfirmed = self._unconfirmed, []
        if outputs and send is not None:
            send(outputs)
        else:
            self._outputs += outputs

    def _recover(self, error: BaseException) -> None:
        """Begin anew after a step for which the device had no memory; steps in flight are lost."""
        reason = " ".join(str(error).split())[:_REASON_LENGTH]
        flight = self._drop_flight()
        has_prompts = any(batch.num_tokens > batch.num_decodes for batch in flight)
        goes_on = self._faults.failed(has_prompts)
        self.scheduler.start_over()
        self.scheduler.limits.prompt_tokens = self._faults.prompt_tokens
        logger.warning(
            "the device has no memory for a step (%s): %s, at most %d prompt tokens a step",
            reason,
            "it is run again" if goes_on else "its requests end",
            self._faults.prompt_tokens,
        )
        failed = {output.request_id for output in self._unconfirmed}
        self._unconfirmed = []
        if not goes_on:
            sequences = [chunk.sequence for batch in flight for chunk in batch.chunks]
            failed |= {s.request.request_id for s in sequences if not s.finished}
        message = f"The device has no memory for this request: {reason}"
        for request_id in sorted(failed):
            self.scheduler.abort(request_id)
            self._outputs.append(TokenOutput(request_id, [], "error", error=message))
        self._encoder.clear_device(self._capacity)

    def _drop_flight(self) -> list[StepBatch]:
        """Wait for the steps in flight, and forget their results."""
        flight = [*self._in_flight]
        self._in_flight.clear()
        self._next = None
        if self._unsampled is not None:
            self._unsampled.masks.exception()  # whose states may be given up now
            self._unsampled = None
        for each in flight:
            # They fail with the same error, or their results are not wanted.
            if each.encoded is not None:
                each.encoded.exception()
        return [each.batch for each in flight]

    def relieve(self, now: float) -> None:
        """Give memory back while the machine is short of it: to be called now and then, also when
        there is nothing to do. First go MLX's freed buffers, then blocks; no request fails.

        Args:
            now: seconds, of a clock that only goes forward.
        """
        if self._relief is None:
            return
        pressure = self._relief.look(now)
        if pressure is None:
            return
        if pressure is not Pressure.NONE:
            self._encoder.clear_cache()
        current = self._pools.blocks.num_blocks
        wanted = self._relief.num_blocks(pressure, now, current, idle=not self.has_work)
        if wanted == current:
            return
        logger.warning("the machine's memory: %s; %d KV blocks", pressure.name.lower(), wanted)
        errors = [each.encoded.exception() for each in self._in_flight if each.encoded is not None]
        for error in errors:
            if error is not None and not is_out_of_memory(error):
                raise error
            if error is not None and self._unconfirmed:
                self._recover(error)  # whose it is nobody knows
                return
        self._confirm(None)
        self._drop_flight()
        try:
            self._resize(wanted)
        except (RuntimeError, MemoryError) as error:
            if wanted < current or not is_out_of_memory(error):
                raise
            logger.warning("the machine has no room for them yet")
            self._relief.wait(now)
            self._resize(current)

    def _resize(self, num_blocks: int) -> None:
        """Begin anew with so many blocks; what runs is computed again."""
        self._capacity.resize(num_blocks)
        self.scheduler.start_over(num_blocks, self._capacity.num_window_blocks)
        self._encoder.replace_pages(self._capacity)

    def _submit_compiled(self, wait: bool) -> list[TokenOutput]:
        """Queue requests whose grammars are ready; the outputs of those that cannot be."""
        refused = []
        for request, grammar in self._grammars.take(wait=wait):
            try:
                if isinstance(grammar, EngineError):
                    raise grammar
                self.scheduler.submit(request, grammar)
            except (EngineError, ValueError) as error:
                refused.append(TokenOutput(request.request_id, [], "error", error=str(error)))
        return refused

    def stats(self) -> WorkerStats:
        scheduler, pool = self.scheduler, self._pools.blocks
        return WorkerStats(
            requests_running=len(scheduler.running),
            requests_waiting=len(scheduler.waiting) + len(self._grammars),
            blocks_used=pool.num_used,
            blocks_cached=pool.num_cached,
            blocks_free=pool.num_free,
            memory_active=mx.get_active_memory(),
            memory_cache=mx.get_cache_memory(),
            memory_peak=mx.get_peak_memory(),
            steps=self._num_steps,
            preemptions=scheduler.num_preemptions,
            memory_faults=self._faults.count,
            cache=cache_stats(self._pools, scheduler.lookups),
            step=self._clock.stats(),
            states=pool_stats(self._pools.states),
            windows=pool_stats(self._pools.windows),
        )
