"""The engine as the HTTP layer sees it: requests go to the worker, tokens come back."""

from __future__ import annotations

import asyncio
import enum
import itertools
import math
import time
from collections import deque
from typing import Literal

import msgspec

from quire.engine.messages import (
    Abort,
    FinishReason,
    GenerateRequest,
    Ready,
    StepOutput,
    TokenOutput,
)
from quire.serve import request_record
from quire.serve.api_keys import ApiKey
from quire.serve.backend import GenerationFailed, QueueFull, Unavailable
from quire.serve.channel import Channel
from quire.serve.model_metrics import ModelMetrics

# Seconds a client should wait when nothing better is known.
LOADING_RETRY_AFTER = 5
DRAINING_RETRY_AFTER = 5
QUEUE_RETRY_AFTER = 1


class WorkerState(enum.Enum):
    """Where in its life the worker is. The values are the reasons in the metrics."""

    LOADING = "loading"  # none has been ready yet
    READY = "ready"
    RESTARTING = "restarting"  # one was ready; its successor loads or is about to
    DRAINING = "draining"  # for good


def _api_key() -> ApiKey | None:
    """The key of the request that is being answered."""
    record = request_record.current()
    return None if record is None else record.api_key


class RequestStream:
    """The outputs of one request: a deque and a future, no task. See ``backend.TokenStream``."""

    def __init__(self, client: WorkerClient, request: GenerateRequest) -> None:
        self.request_id = request.request_id
        self._client = client
        self._outputs: deque[TokenOutput] = deque()
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._finished = False
        self._failure: str | None = None

        self._num_prompt_tokens = len(request.prompt_token_ids)
        self._num_tokens = 0
        self._submitted = time.monotonic()
        self._first_token: float | None = None
        self._last_token = self._submitted
        self._num_cached_tokens = 0
        self._record = request_record.current()
        if self._record is not None and self._record.first_sequence is None:
            self._record.first_sequence = request
        key = _api_key()
        self.key_name = "" if key is None else key.name

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> TokenOutput:
        while not self._outputs:
            if self._failure is not None:
                raise GenerationFailed(self._failure)
            if self._finished:
                raise StopAsyncIteration
            self._waiter = self._loop.create_future()
            await self._waiter
        if len(self._outputs) == 1:
            return self._outputs.popleft()
        return self._take_all()

    def close(self, reason: Literal["stop", "abort"] = "abort") -> None:
        if not self._finished:
            self._client._abort(self)
            self._finish(reason)
        self._outputs.clear()

    def push(self, output: TokenOutput, now: float) -> None:
        """Append one step's tokens, received at ``now``, and account for them."""
        if output.token_ids:
            self._count(output, now)
        elif output.vector:
            self._count_prompt(output, now)
        reason = output.finish_reason
        if reason in ("error", "abort"):
            self.fail(output.error or "The worker gave up this request.")
            return
        self._outputs.append(output)
        if reason is not None:
            self._finish(reason)
        else:
            self._wake()

    def fail(self, message: str) -> None:
        """End the stream with :class:`GenerationFailed` after the outputs that wait in it."""
        self._failure = message
        self._finish("error")

    def _take_all(self) -> TokenOutput:
        """Several steps in one: a reader that falls behind gets fewer, larger outputs."""
        outputs = list(self._outputs)
        self._outputs.clear()
        return TokenOutput(
            self.request_id,
            [token for output in outputs for token in output.token_ids],
            outputs[-1].finish_reason,
            outputs[0].num_cached_tokens,
            outputs[-1].error,
            outputs[-1].ends_with_text,
            [entry for output in outputs for entry in output.logprobs],
            outputs[0].prompt_logprobs,
            outputs[0].queue_seconds,
            outputs[-1].vector,
        )

    def _count(self, output: TokenOutput, now: float) -> None:
        metrics = self._client.metrics
        num_tokens = num_gaps = len(output.token_ids)
        gap = 0.0
        if self._first_token is None:
            self._first_token = now
            num_gaps -= 1
            waited = now - self._submitted
            metrics.time_to_first_token.observe(waited)
            self._count_prompt(output, now)
            if self._record is not None:
                self._record.add_times(output.queue_seconds, waited)
        else:
            gap = (now - self._last_token) / num_tokens
        for _ in range(num_gaps):
            metrics.inter_token_latency.observe(gap)
        self._num_tokens += num_tokens
        self._last_token = now

    def _count_prompt(self, output: TokenOutput, now: float) -> None:
        """Account for a prompt that has been computed."""
        metrics = self._client.metrics
        metrics.queue_time.observe(output.queue_seconds)
        metrics.prefill_time.observe(max(0.0, now - self._submitted - output.queue_seconds))
        metrics.request_prompt_tokens.observe(self._num_prompt_tokens)
        metrics.add_prompt(self._num_prompt_tokens, now)
        metrics.prompt_tokens_cached.inc(output.num_cached_tokens)
        self._num_cached_tokens = output.num_cached_tokens

    def _finish(self, reason: FinishReason) -> None:
        self._finished = True
        metrics = self._client.metrics
        metrics.requests[reason].inc()
        metrics.e2e_latency.observe(time.monotonic() - self._submitted)
        if self._first_token is not None:
            decoding = self._last_token - self._first_token
            metrics.decode_time.observe(decoding)
            metrics.request_generated_tokens.observe(self._num_tokens)
            if self._num_tokens > 1:
                metrics.time_per_output_token.observe(decoding / (self._num_tokens - 1))
        if (record := self._record) is not None:
            record.add_sequence(
                self._num_prompt_tokens, self._num_cached_tokens, self._num_tokens, reason
            )
            record.error = record.error or self._failure or ""
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class WorkerClient:
    """Implements ``backend.Backend``; the supervisor attaches and detaches workers.

    ``max_in_flight`` bounds the requests that run or wait in the worker.
    """

    def __init__(self, metrics: ModelMetrics, max_in_flight: int) -> None:
        self.metrics = metrics
        metrics.worker.in_flight = lambda: self.num_in_flight
        self._max_in_flight = max_in_flight
        self._streams: dict[int, RequestStream] = {}
        self._request_ids = itertools.count(1)
        self._channel: Channel | None = None
        self._info: Ready | None = None
        self._state = WorkerState.LOADING
        self._ready_by: float | None = None  # expected, on the monotonic clock
        self._idle = asyncio.Event()
        self._idle.set()
        self._busy = asyncio.Event()

    # ---- for the HTTP layer

    @property
    def alive(self) -> bool:
        return self._channel is not None

    @property
    def info(self) -> Ready | None:
        return self._info

    @property
    def state(self) -> WorkerState:
        return self._state

    def why_unavailable(self) -> Unavailable | None:
        match self._state:
            case WorkerState.READY:
                return None
            case WorkerState.DRAINING:
                return Unavailable("The server is shutting down.", DRAINING_RETRY_AFTER)
            case WorkerState.LOADING:
                message = "The model is still loading. Try again in a moment."
            case WorkerState.RESTARTING:
                message = "The model worker is restarting. Try again in a moment."
        return Unavailable(message, self._retry_after())

    def admit(self) -> Ready:
        if (refusal := self.why_unavailable()) is not None:
            self.metrics.admission_rejections[self._state.value].inc()
            raise refusal
        assert self._info is not None
        return self._info

    @property
    def max_in_flight(self) -> int:
        """For the key of the current request, its share."""
        key = _api_key()
        share = 1.0 if key is None else key.queue_share
        return max(1, int(share * self._max_in_flight))

    def check_room(self, count: int) -> None:
        if len(self._streams) + count > self._max_in_flight:
            self.metrics.admission_rejections["queue_full"].inc()
            raise QueueFull(
                f"{len(self._streams)} requests are already running or waiting. Try again later.",
                QUEUE_RETRY_AFTER,
            )
        key, limit = _api_key(), self.max_in_flight
        if key is not None and self._num_of(key) + count > limit:
            self.metrics.admission_rejections["key_share"].inc()
            raise QueueFull(
                f"The key {key.name} may have {limit} requests running or waiting, its share.",
                QUEUE_RETRY_AFTER,
            )

    def submit(self, request: GenerateRequest) -> RequestStream:
        self.admit()
        assert self._channel is not None
        self.check_room(1)
        request = msgspec.structs.replace(
            request,
            request_id=next(self._request_ids),
            cache_salt=request_record.cache_salt(request.cache_salt),
        )
        if not self._channel.send(request):
            # The worker has gone and the supervisor is about to notice.
            self.metrics.admission_rejections["restarting"].inc()
            raise Unavailable("The model worker has just stopped.", self._retry_after())
        stream = RequestStream(self, request)
        if not self._streams:
            self._idle.clear()
            self._busy.set()
            self.metrics.worker.mark_step(time.monotonic())
        self._streams[request.request_id] = stream
        return stream

    def _num_of(self, key: ApiKey) -> int:
        return sum(stream.key_name == key.name for stream in self._streams.values())

    # ---- for the supervisor

    @property
    def num_in_flight(self) -> int:
        return len(self._streams)

    def attach(self, channel: Channel) -> None:
        """A worker process exists on ``channel``; it takes requests after :meth:`ready`."""
        self._channel = channel

    def ready(self, info: Ready) -> None:
        self._info = info
        if self._state is not WorkerState.DRAINING:
            self._state = WorkerState.READY
        self._ready_by = None
        self.metrics.worker.ready(info)

    def deliver(self, step: StepOutput) -> None:
        now = time.monotonic()
        self.metrics.worker.mark_step(now)
        if step.stats is not None:
            self.metrics.snapshot(step.stats, now)
        num_tokens = 0
        for output in step.outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue  # closed while this frame was on its way
            if output.finish_reason is not None:
                self._forget(stream)
            stream.push(output, now)
            num_tokens += len(output.token_ids)
        self.metrics.add_generated(num_tokens, now)

    def dying(self) -> None:
        """The worker has ended; its last frames may still come, but nothing new is taken."""
        if self._state is WorkerState.READY:
            self._state = WorkerState.RESTARTING

    def detach(self, message: str) -> None:
        """The worker is gone: every open stream fails with ``message``."""
        self._channel = None
        self._info = None
        if self._state is WorkerState.READY:
            self._state = WorkerState.RESTARTING
        self.metrics.worker.lost()
        self.fail_all(message)

    def expect_ready_by(self, when: float | None) -> None:
        """When requests are likely to be taken again, on the monotonic clock; for Retry-After."""
        self._ready_by = when

    def start_draining(self) -> None:
        self._state = WorkerState.DRAINING

    async def wait_idle(self) -> None:
        await self._idle.wait()

    async def wait_busy(self) -> None:
        """Return once a request is in flight."""
        await self._busy.wait()

    def fail_all(self, message: str) -> None:
        for stream in list(self._streams.values()):
            self._forget(stream)
            stream.fail(message)

    def _abort(self, stream: RequestStream) -> None:
        if self._channel is not None:
            self._channel.send(Abort(stream.request_id))
        self._forget(stream)

    def _forget(self, stream: RequestStream) -> None:
        del self._streams[stream.request_id]
        if not self._streams:
            self._idle.set()
            self._busy.clear()

    def _retry_after(self) -> int:
        if self._ready_by is None:
            return LOADING_RETRY_AFTER
        return max(1, math.ceil(self._ready_by - time.monotonic()))
