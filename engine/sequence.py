"""One request inside the engine: its tokens, what is cached of it and how far it has got."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field

from quire.cache.block_hash import BlockHash
from quire.cache.sequence_cache import SequenceCache
from quire.engine.grammar import GrammarState
from quire.engine.messages import GenerateRequest, TokenLogprobs
from quire.engine.pooled import Pooled
from quire.engine.seen_tokens import SeenTokens
from quire.engine.thinking import Thinking


@dataclass(slots=True)
class Arrival:
    """From a request's arrival to its first admission."""

    at: float = 0.0  # seconds, on the monotonic clock
    queue_seconds: float = 0.0
    num_cached_tokens: int | None = None  # of its prompt; None until it was admitted
    waits_for: BlockHash | None = None  # while somebody else computes that block, it waits
    passed_over: int = 0  # times that somebody who came later was admitted first


@dataclass(slots=True)
class PromptReport:
    """What is to be told of a prompt, as far as the host has it."""

    # Of each token but the first; empty where nobody asks.
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    pooled: Pooled | None = None


@dataclass(slots=True, eq=False)
class Sequence:
    """``num_computed_tokens`` chases ``num_tokens``; prefill and decode differ in nothing else."""

    request: GenerateRequest
    cache: SequenceCache
    token_ids: list[int]  # the prompt and every output token the host has seen
    seed: int
    num_computed_tokens: int = 0  # scheduled so far; their KV is in the pages once steps retire
    num_pending_tokens: int = 0  # sampled by scheduled steps, not yet seen by the host
    sample_row: int = -1  # where the newest of those steps puts its token
    last_step: int = -1  # the newest step that reads or writes the sequence's cache
    arrival: Arrival = field(default_factory=Arrival)
    admissions: int = 0  # tells rows scheduled before a preemption from those after it
    finished: bool = False
    grammar: GrammarState | None = None  # has taken the output tokens that the host has seen
    report: PromptReport = field(default_factory=PromptReport)
    thinking: Thinking | None = None  # likewise; None: there is no limit
    _seen: SeenTokens | None = None

    @classmethod
    def of(
        cls, request: GenerateRequest, cache: SequenceCache, grammar: GrammarState | None
    ) -> Sequence:
        """That of a request that has just come; ``cache`` is empty, ``grammar`` at its start."""
        seed, thinking, pooling = request.sampling.seed, request.thinking, request.pooling
        num_prompt = len(request.prompt_token_ids)
        return cls(
            request,
            cache,
            list(request.prompt_token_ids),
            seed=secrets.randbits(64) if seed is None else seed,
            arrival=Arrival(time.monotonic()),
            grammar=grammar,
            report=PromptReport(pooled=None if pooling is None else Pooled(pooling, num_prompt)),
            thinking=None if thinking is None else Thinking(thinking),
        )

    @property
    def num_tokens(self) -> int:
        """Pending ones included."""
        return len(self.token_ids) + self.num_pending_tokens

    @property
    def num_unscored(self) -> int:
        """Prompt tokens whose log-probabilities are wanted and not known yet."""
        if self.request.prompt_logprobs is None:
            return 0
        return len(self.request.prompt_token_ids) - 1 - len(self.report.logprobs)

    @property
    def needs_every_row(self) -> bool:
        """Whether nothing of the prompt may come from the cache, which has no logits and no hidden
        states."""
        pooled = self.report.pooled
        return self.num_unscored > 0 or (pooled is not None and pooled.needs_all)

    def scored_behind(self, start: int, end: int) -> list[int]:
        """The tokens that follow on those at ``start`` to ``end``, where they are scored."""
        if not self.num_unscored:
            return []
        return self.request.prompt_token_ids[start + 1 : end + 1]

    def seen_tokens(self) -> SeenTokens:
        """Counts of the output tokens that the host has seen, and the prompt's if they matter."""
        if self._seen is None:
            request = self.request
            with_prompt = request.sampling.repetition_penalty != 1
            self._seen = SeenTokens(request.prompt_token_ids, with_prompt=with_prompt)
        self._seen.read(self.token_ids)
        return self._seen

    @property
    def num_wanted_tokens(self) -> int:
        """Tokens still to compute before the next one can be sampled, or before the prompt is a
        vector; 0 if neither will be."""
        num_tokens = len(self.token_ids) + self.num_pending_tokens
        if self.report.pooled is not None:
            return num_tokens - self.num_computed_tokens
        request = self.request
        if num_tokens >= len(request.prompt_token_ids) + request.max_tokens:
            return 0
        if self.thinking is not None and self.thinking.waits(self.num_pending_tokens):
            return 0
        return num_tokens - self.num_computed_tokens
