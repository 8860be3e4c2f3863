"""Who computes how many tokens next.

There is no prefill phase and no decode phase (the rule of vLLM's v1 scheduler): each sequence's
computed tokens chase its tokens, within one budget per step. Running decodes come first, then
running prompts, then new arrivals while blocks last. When blocks run out the youngest sequence is
preempted and recomputed later from whatever of it is still cached.

One step may be in flight while the next is scheduled. Its sampled tokens are unknown then, and the
blocks it touches are given back only when it has retired.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as SequenceABC

from quire.cache.block_hash import BlockHash, root_hash
from quire.cache.pools import NO_NEEDS, Holdings, Needs, Pools
from quire.cache.sequence_cache import NO_PREFIX, Prefix, SequenceCache
from quire.cache.state_table import StateMoves
from quire.engine.admission_order import count_passed_over, put_cached_first
from quire.engine.chunking import take_chunk
from quire.engine.errors import EngineError, GrammarError, RequestTooLong
from quire.engine.grammar import GrammarState
from quire.engine.lookups import count_lookup
from quire.engine.messages import GenerateRequest, Lookups, TokenLogprobs, TokenOutput
from quire.engine.outcome import reports, take_token, vector_output
from quire.engine.pooled import Float32Array
from quire.engine.retiring import Retiring
from quire.engine.sequence import Sequence
from quire.engine.step_batch import Chunk, StepBatch
from quire.engine.step_limits import StepLimits

# Tokens of prompts that one step looks up in the cache, which hashes new ones: all streams wait.
_MAX_LOOKED_UP = 1 << 16


class Scheduler:
    """Plans steps for the sequences of one model, and takes what the steps have drawn.

    Attributes:
        limits: of a step.
        waiting: by priority, then by age.
        running: oldest first.
        lookups: what was found in the prefix cache.
        num_preemptions: so far.
    """

    def __init__(self, pools: Pools, limits: StepLimits, model_name: str = "") -> None:
        """
        Raises:
            ValueError: the pools hold no window of the model's.
        """
        self.limits = limits
        self.waiting: list[Sequence] = []
        self._is_in_order = True  # as far as is known
        self.running: list[Sequence] = []
        self.lookups = Lookups()
        self.num_preemptions = 0
        self._pools = pools
        self._blocks = pools.blocks
        self._model_name = model_name
        self._sequences: dict[int, Sequence] = {}
        self._next_step = 0
        self._retiring = Retiring(pools)
        self._follow_evictions()
        # A little room for running sequences to grow, so that an admission is not undone at once.
        self._watermark = Needs(max(1, self._blocks.num_usable // 100))
        if pools.windows is not None:
            # And for what prompts leave behind the window only when their step has retired.
            chunk = -(-limits.max_num_batched_tokens // self._blocks.block_size)
            self._watermark = self._watermark.plus(Needs(window=chunk))
        limits.fit(pools)

    def _follow_evictions(self) -> None:
        """A state or a window's block cannot be found without the KV block of the same hash: when
        that is evicted, drop them."""
        for pool in self._pools[1:]:
            if pool is not None:
                self._blocks.on_eviction.append(pool.drop)

    # ---- requests

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def submit(self, request: GenerateRequest, grammar: GrammarState | None = None) -> None:
        """Queue a request.

        Args:
            grammar: what the output must fit, at its start.

        Raises:
            RequestTooLong: it could not finish even with the whole pool to itself.
            ValueError: its id is in use, its prompt is empty or it wants nothing.
        """
        if request.request_id in self._sequences:
            raise ValueError(f"request id {request.request_id} is in use")
        pooling, num_prompt = request.pooling, len(request.prompt_token_ids)
        if not num_prompt or (pooling is None and request.max_tokens < 1):
            raise ValueError("a request needs a prompt and at least one token to generate")
        # The last sampled token is never computed, so it needs no slot.
        num_tokens = num_prompt + (request.max_tokens - 1 if pooling is None else 0)
        capacity = self._blocks.num_usable * self._blocks.block_size
        if num_tokens > capacity:
            raise RequestTooLong(
                f"{num_prompt} prompt tokens and {request.max_tokens} output tokens need more "
                f"than the {capacity} tokens the KV cache holds"
            )
        root = root_hash(self._model_name, salt=request.cache_salt)
        sequence = Sequence.of(request, SequenceCache(self._pools, root), grammar)
        self._sequences[request.request_id] = sequence
        self._enqueue(sequence)

    def abort(self, request_id: int) -> None:
        """Drop a request; unknown ids are ignored, since it may have finished meanwhile."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._finish(sequence)

    def _enqueue(self, sequence: Sequence, *, first: bool = False) -> None:
        """Put ``sequence`` behind those who wait with its priority, or ``first``, in front."""
        priority = sequence.request.priority
        place = len(self.waiting)
        while place and (
            self.waiting[place - 1].request.priority > priority
            or (first and self.waiting[place - 1].request.priority == priority)
        ):
            place -= 1
        self.waiting.insert(place, sequence)
        self._is_in_order = False

    # ---- scheduling

    def schedule(self) -> StepBatch | None:
        """The next step, or None if nothing can run before the step in flight retires."""
        planned: dict[Sequence, int] = {}
        wanting = [(s, s.num_wanted_tokens) for s in self.running]
        decodes = [(s, n) for s, n in wanting if n == 1]
        prompts = [(s, n) for s, n in wanting if n > 1]
        budget = self.limits.budget(len(decodes))
        if self._schedule_running(decodes + prompts, planned, budget):
            self._schedule_waiting(planned, budget)
        return self._make_batch(planned) if planned else None

    def _schedule_running(
        self, wanting: list[tuple[Sequence, int]], planned: dict[Sequence, int], budget: int
    ) -> bool:
        """Plan decodes, then prompt chunks; returns whether there were blocks for everybody."""
        enough = True
        preempted: set[Sequence] = set()
        for sequence, num_wanted in wanting:
            start = sequence.num_computed_tokens
            num_tokens = min(num_wanted, budget)
            if num_tokens > 1 or sequence.request.prompt_logprobs is not None:
                num_tokens = self.limits.cut(sequence, start, num_tokens, planned)
            if num_tokens == 0 or sequence in preempted:
                continue
            wanted = start + num_tokens
            while not sequence.cache.grow(wanted):
                enough = False
                if self._comes_back(sequence.cache.lacks(wanted)):
                    break  # enough is on its way back: sit this step out
                victim = self._victim()
                budget += planned.pop(victim, 0)
                self._preempt(victim)
                preempted.add(victim)
                if victim is sequence:
                    break
            else:
                planned[sequence] = num_tokens
                budget -= num_tokens
        return enough

    def _schedule_waiting(self, planned: dict[Sequence, int], budget: int) -> None:
        if not self.waiting or len(self.running) == self.limits.max_num_seqs:
            return
        if not self._is_in_order:
            size = self._blocks.block_size
            self._is_in_order = put_cached_first(self.waiting, size, _MAX_LOOKED_UP)
        # A small budget would cut most prompts in two.
        is_limited = budget < self.limits.max_num_batched_tokens
        may_cut = not is_limited or all(n == 1 for n in planned.values())
        budget -= sum(planned.values())
        # Prompts admitted earlier take their blocks chunk by chunk: leave them what they lack.
        reserve = NO_NEEDS
        for needs in (s.cache.will_lack(len(s.token_ids)) for s in self.running):
            reserve = reserve.plus(needs)
        coming = {each for s in self.running for each in s.cache.coming(s.token_ids)}
        looked_up = 0  # tokens
        for sequence in list(self.waiting):
            if not budget or len(self.running) == self.limits.max_num_seqs:
                break
            if sequence.num_pending_tokens:
                break  # preempted with a token in flight, which belongs to its prompt now
            if sequence.arrival.waits_for in coming:
                continue
            if looked_up > _MAX_LOOKED_UP:
                break
            prefix = NO_PREFIX
            if not sequence.needs_every_row:
                looked_up += len(sequence.token_ids)
                prefix = sequence.cache.find_prefix(sequence.token_ids)
            sequence.arrival.waits_for = self._awaited(sequence, prefix, coming)
            if sequence.arrival.waits_for is not None:
                continue
            start = len(prefix.blocks) * self._blocks.block_size
            num_missing = len(sequence.token_ids) - start
            num_tokens = self.limits.cut(sequence, start, min(num_missing, budget), planned)
            if not num_tokens:
                continue
            if num_tokens < num_missing and not may_cut:
                break
            spare = reserve.plus(self._watermark) if self.running else reserve
            if not sequence.cache.admit(prefix, sequence.token_ids, start + num_tokens, spare):
                break
            self._start_running(sequence, prefix)
            coming.update(sequence.cache.coming(sequence.token_ids))
            planned[sequence] = num_tokens
            budget -= num_tokens
            reserve = reserve.plus(sequence.cache.will_lack(len(sequence.token_ids)))
            may_cut = not is_limited

    def _victim(self) -> Sequence:
        """Who gives up blocks: the youngest of the lowest priority."""
        lowest = max(sequence.request.priority for sequence in self.running)
        return next(s for s in reversed(self.running) if s.request.priority == lowest)

    def _start_running(self, sequence: Sequence, prefix: Prefix) -> None:
        start = len(prefix.blocks) * self._blocks.block_size
        self.waiting.remove(sequence)
        if not sequence.admissions:
            count_passed_over(self.waiting, sequence)
        self.running.append(sequence)
        sequence.num_computed_tokens = start
        sequence.admissions += 1
        if (arrival := sequence.arrival).num_cached_tokens is None:
            arrival.num_cached_tokens = start
            arrival.queue_seconds = time.monotonic() - arrival.at
            recurrent = self._pools.states is not None
            size = self._blocks.block_size
            count_lookup(self.lookups, sequence, prefix, size, recurrent=recurrent)

    def _awaited(
        self, sequence: Sequence, prefix: Prefix, coming: set[BlockHash]
    ) -> BlockHash | None:
        """The block to wait for, if running sequences are computing much of this prompt right now.

        Requests that share a long prefix and arrive together would otherwise all compute it.
        """
        if not coming or sequence.needs_every_row:
            return None
        rest = len(sequence.token_ids) - len(prefix.blocks) * self._blocks.block_size
        least = min(rest, self.limits.max_num_batched_tokens) // 2
        return sequence.cache.awaited(prefix, sequence.token_ids, coming, least)

    def _make_batch(self, planned: dict[Sequence, int]) -> StepBatch:
        step_id = self._next_step
        self._next_step += 1
        decodes: list[Chunk] = []
        prompts: list[Chunk] = []
        for sequence, num_tokens in planned.items():
            chunks = decodes if num_tokens == 1 else prompts
            chunks.append(take_chunk(sequence, num_tokens, step_id))
        chunks = decodes + prompts
        moves = self._move_states(chunks) if self._pools.states is not None else []
        unsampled = [chunk for chunk in chunks if not chunk.samples]  # of most steps none
        pooled = [chunk for chunk in unsampled if chunk.is_pooled]
        batch = StepBatch(step_id, chunks, len(decodes), moves, pooled)
        for row, chunk in enumerate(batch.sampled):
            chunk.sequence.sample_row = row
            chunk.sequence.num_pending_tokens += 1
        return batch

    def _move_states(self, chunks: list[Chunk]) -> list[StateMoves]:
        # A slot stays for each sequence that could run beside these.
        reserve = min(len(self.waiting), self.limits.max_num_seqs - len(self.running))
        moves = []
        for chunk in chunks:
            cache = chunk.sequence.cache
            moves.append(cache.move_state(chunk.start, chunk.num_tokens, reserve))
            self._hold(chunk.sequence, cache.take_unneeded())
        return moves

    # ---- results

    def commit(
        self,
        batch: StepBatch,
        sampled: SequenceABC[int],
        logprobs: SequenceABC[TokenLogprobs] = (),
        sums: SequenceABC[Float32Array] = (),
    ) -> list[TokenOutput]:
        """Take the tokens of a step that has retired; steps retire in order.

        ``sampled`` has one token per chunk of ``batch.sampled``, ``logprobs`` one entry per entry
        of ``batch.reported``, and ``sums`` one of hidden states per chunk of ``batch.pooled``.
        """
        self._retiring.retired = batch.step_id
        size, has_states = self._blocks.block_size, self._pools.states is not None
        outputs = []
        tokens = iter(sampled)
        for chunk, reported in zip(batch.chunks, reports(batch, logprobs, sums), strict=True):
            token = next(tokens) if chunk.samples else None
            sequence = chunk.sequence
            if sequence.finished:
                continue
            cache, end = sequence.cache, chunk.start + chunk.num_tokens
            fills = has_states or end % size < chunk.num_tokens  # a block
            if fills and chunk.admission == sequence.admissions and cache.blocks.block_ids:
                cache.register(sequence.token_ids, end)
                if has_states:
                    self._hold(sequence, cache.take_unneeded())
            if reported.scored:
                # After a preemption what has been scored comes again.
                known = len(sequence.report.logprobs) - chunk.start
                sequence.report.logprobs += reported.scored[max(0, known) :]
            if reported.total is not None:
                outputs += self._pool(sequence, chunk, reported.total)
            if token is None:
                continue
            sequence.token_ids.append(token)
            if sequence.thinking is not None:
                sequence.thinking.accept(token)
            sequence.num_pending_tokens -= 1
            outputs.append(self._output(sequence, token, reported.drawn))
        self._retiring.release()
        return outputs

    def _pool(self, sequence: Sequence, chunk: Chunk, total: Float32Array) -> list[TokenOutput]:
        """The vector of a prompt, once its last hidden states have come."""
        pooled = sequence.report.pooled
        assert pooled is not None, "a chunk that nobody wants pooled"
        if not pooled.add(chunk.start, chunk.context_length, total):
            return []
        try:
            vector = pooled.vector()
        except EngineError as error:
            return [self.fail(sequence, str(error))]
        self._finish(sequence)
        return [vector_output(sequence, vector)]

    def _output(self, sequence: Sequence, token: int, logprobs: list[TokenLogprobs]) -> TokenOutput:
        try:
            output = take_token(sequence, token, logprobs)
        except GrammarError as error:
            return self.fail(sequence, str(error))
        if output.finish_reason is not None:
            self._finish(sequence)
        return output

    def start_over(
        self, num_blocks: int | None = None, num_window_blocks: int | None = None
    ) -> None:
        """No step in flight will be committed, and no page can be relied on: whatever runs is
        computed again from its tokens.

        From then on there are so many blocks; None: as many as before.
        """
        self._retiring.retired = self._next_step - 1
        for sequence in reversed(self.running.copy()):
            self._preempt(sequence)
        for sequence in self._sequences.values():
            sequence.num_pending_tokens = 0
        self._retiring.release()
        self._pools.forget(num_blocks, num_window_blocks)
        self.limits.fit(self._pools)

    def fail(self, sequence: Sequence, error: str) -> TokenOutput:
        """End a request that cannot go on."""
        self._finish(sequence)
        return TokenOutput(sequence.request.request_id, [], "error", error=error)

    # ---- giving up blocks and slots

    def _comes_back(self, lacking: Needs) -> bool:
        """Whether so many blocks can be had once all steps in flight have retired."""
        coming, windows = self._retiring.coming, self._pools.windows
        if lacking.blocks > self._blocks.num_available + coming.blocks:
            return False
        if windows is None:
            return True
        leaving = sum(s.cache.num_leaving(s.num_computed_tokens) for s in self.running)
        return lacking.window <= windows.num_available + coming.window + leaving

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preemptions += 1
        self.running.remove(sequence)
        self._enqueue(sequence, first=True)
        self._give_up(sequence)
        sequence.num_computed_tokens = 0

    def _finish(self, sequence: Sequence) -> None:
        sequence.finished = True
        self._is_in_order = False  # it leaves its blocks to others, and room for somebody
        del self._sequences[sequence.request.request_id]
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self._give_up(sequence)

    def _give_up(self, sequence: Sequence) -> None:
        held = sequence.cache.detach(sequence.token_ids, sequence.num_computed_tokens)
        self._hold(sequence, held)

    def _hold(self, sequence: Sequence, holdings: Holdings) -> None:
        self._retiring.hold(sequence.last_step, holdings)

    # ---- invariants

    def check(self) -> None:
        """Assert the pool's conservation and the scheduler's own rules. For tests and debugging."""
        owned = [*(s.cache.holdings for s in self.running), *self._retiring]
        self._pools.check(owned)
        for sequence in self.running:
            assert sequence.num_computed_tokens <= sequence.num_tokens
            assert sequence.num_computed_tokens <= sequence.cache.blocks.num_tokens
        for sequence in self.waiting:
            assert not any(sequence.cache.holdings)
            assert sequence.num_computed_tokens == 0
        assert len(self._sequences) == len(self.waiting) + len(self.running)
