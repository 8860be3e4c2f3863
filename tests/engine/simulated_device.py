"""A device that runs the scheduler's steps over plain token ids, and requests to run on it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from hypothesis import strategies as st

from quire.cache.block_pool import BlockPool
from quire.cache.eviction import make_policy
from quire.cache.pools import Pools
from quire.cache.state_pool import EMPTY_SLOT, StatePool
from quire.cache.window_pool import WindowPool
from quire.engine.messages import GenerateRequest, SamplingParams, TokenOutput
from quire.engine.scheduler import Scheduler
from quire.engine.step_batch import Chunk, StepBatch
from quire.engine.step_limits import StepLimits

VOCAB = 3  # small, so that sequences agree by chance and share blocks


def next_token(context: Iterable[int]) -> int:
    """The simulated model: a function of every token in the context, in order."""
    return hashlib.blake2b(bytes(context), digest_size=1).digest()[0] % VOCAB


def reference(request: GenerateRequest) -> tuple[list[int], str]:
    tokens = list(request.prompt_token_ids)
    outputs: list[int] = []
    while True:
        token = next_token(tokens)
        if len(outputs) < request.min_tokens and token in request.stop_token_ids:
            token = VOCAB  # what the simulated sampler draws when the first choice is banned
        tokens.append(token)
        outputs.append(token)
        if token in request.stop_token_ids:
            return outputs, "stop"
        if len(outputs) == request.max_tokens:
            return outputs, "length"


class Device:
    """Executes step batches over a page array of token ids, as a model would over keys.

    What a recurrent layer would keep are the tokens before a position.
    """

    def __init__(self, pool: BlockPool, window: int | None = None) -> None:
        self.block_size = pool.block_size
        self.window = window
        self.slots: dict[int, int] = {}
        self.window_slots: dict[int, list[int]] = {}  # all tokens up to each slot's
        self.states: dict[int, list[int]] = {EMPTY_SLOT: []}
        self.samples: dict[int, list[int]] = {}

    def run(self, batch: StepBatch) -> None:
        previous = self.samples.get(batch.step_id - 1, [])
        writes: set[int] = set()
        inputs = []
        for chunk in batch.chunks:
            ids = chunk.token_ids or [previous[chunk.source_row]]
            assert len(ids) == chunk.num_tokens
            inputs.append(ids)
            for offset, token in enumerate(ids):
                slot = self.slot(chunk.block_ids, chunk.start + offset)
                assert slot not in writes, "two rows of a step write the same slot"
                writes.add(slot)
                self.slots[slot] = token
        self.move_states(batch)
        self.slide_windows(batch)
        sampled = []
        for chunk in batch.chunks:
            if chunk.samples:
                token = next_token(self.context(chunk))
                sampled.append(VOCAB if token in chunk.banned_token_ids else token)
        self.samples = {batch.step_id: sampled}

    def move_states(self, batch: StepBatch) -> None:
        """All chunks at once, as a kernel would."""
        if not batch.state_moves:
            return
        moves = list(zip(batch.chunks, batch.state_moves, strict=True))
        targets = [slot for _, move in moves for _, slot in move.stores]
        assert len(set(targets)) == len(targets), "two chunks of a step write the same slot"
        assert EMPTY_SLOT not in targets
        for chunk, move in moves:
            assert move.source not in targets or move.source == move.stores[-1][1]
            context = self.context(chunk)
            assert self.states[move.source] == context[: chunk.start]
            assert move.stores[-1][0] == chunk.num_tokens
            for num_tokens, slot in move.stores:
                self.states[slot] = context[: chunk.start + num_tokens]

    def slide_windows(self, batch: StepBatch) -> None:
        """Each row finds in the blocks of its window what a layer wrote for these very tokens."""
        if self.window is None:
            return
        seen: dict[int, list[int]] = {}
        written: set[int] = set()
        for chunk in batch.chunks:
            blocks, context = chunk.window_block_ids, self.context(chunk)
            assert blocks is not None
            for position in range(chunk.start, chunk.context_length):
                slot = self.slot(blocks, position)
                assert slot >= self.block_size, "a row writes to the scratch block"
                assert slot not in written, "two rows of a step write the same slot"
                written.add(slot)
                self.window_slots[slot] = context[: position + 1]
            for position in range(max(0, chunk.start - self.window + 1), chunk.context_length):
                seen[self.slot(blocks, position)] = context[: position + 1]
        for slot, tokens in seen.items():
            assert self.window_slots.get(slot) == tokens, "a row sees keys of other tokens"

    def context(self, chunk: Chunk) -> list[int]:
        return [self.slots[self.slot(chunk.block_ids, p)] for p in range(chunk.context_length)]

    def slot(self, block_ids: list[int], position: int) -> int:
        return block_ids[position // self.block_size] * self.block_size + position % self.block_size


class Simulation:
    """The engine's loop over the simulated device, with or without a step of look-ahead."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        look_ahead: bool = True,
        states: StatePool | None = None,
        windows: WindowPool | None = None,
        **limits: int | None,
    ):
        self.pool = BlockPool(num_blocks, block_size, make_policy("lru"))
        self.states = states
        self.windows = windows
        self.scheduler = Scheduler(Pools(self.pool, states, windows), StepLimits(**limits))  # type: ignore[arg-type]
        self.device = Device(self.pool, None if windows is None else windows.window)
        self.look_ahead = look_ahead
        self.in_flight: StepBatch | None = None
        self.outputs: dict[int, list[TokenOutput]] = {}
        self.budget = limits["max_num_batched_tokens"] or 0

    def step(self) -> None:
        running, self.in_flight = self.in_flight, None
        if not self.look_ahead:
            running = self.start()
        else:
            self.in_flight = self.start()
        if running is not None:
            sampled = self.samples_of[running.step_id]
            for output in self.scheduler.commit(running, sampled):
                self.outputs.setdefault(output.request_id, []).append(output)
        self.scheduler.check()

    def start(self) -> StepBatch | None:
        batch = self.scheduler.schedule()
        self.samples_of = dict(self.device.samples)
        if batch is not None:
            assert 0 < batch.num_tokens <= self.budget
            assert all(chunk.num_tokens == 1 for chunk in batch.chunks[: batch.num_decodes])
            self.device.run(batch)
            self.samples_of |= self.device.samples
        return batch

    def drain(self) -> None:
        idle = 0
        while self.scheduler.has_work or self.in_flight is not None:
            before = self.in_flight
            self.step()
            idle = idle + 1 if before is None and self.in_flight is None else 0
            assert idle < 3 or not self.look_ahead, "no progress although there is work"

    def result(self, request_id: int) -> tuple[list[int], str | None]:
        outputs = self.outputs[request_id]
        assert [o.finish_reason for o in outputs[:-1]] == [None] * (len(outputs) - 1)
        return [t for o in outputs for t in o.token_ids], outputs[-1].finish_reason


def request(request_id: int, prompt: list[int], max_tokens: int, **fields: object):
    return GenerateRequest(request_id, prompt, max_tokens, SamplingParams(temperature=0), **fields)  # type: ignore[arg-type]


@st.composite
def arrivals(draw: st.DrawFn) -> list[tuple[int, GenerateRequest, int | None]]:
    """(arrival step, request, step at which it is aborted)"""
    shared = draw(st.lists(st.integers(0, VOCAB - 1), max_size=20))
    out = []
    for request_id in range(draw(st.integers(1, 12))):
        tail = draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20))
        prompt = shared + tail if draw(st.booleans()) else tail
        stop = draw(st.sampled_from([[], [], [1]]))
        item = request(
            request_id,
            prompt,
            draw(st.integers(1, 12)),
            stop_token_ids=stop,
            min_tokens=draw(st.integers(0, 3)),
            cache_salt=draw(st.sampled_from(["", "", "tenant"])),
        )
        abort_after = draw(st.one_of(st.none(), st.none(), st.integers(0, 12)))
        out.append((draw(st.integers(0, 15)), item, abort_after))
    return out
