"""What one step computes, in plain integers: the seam between the scheduler and the runner."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import msgspec

from quire.cache.state_table import StateMoves
from quire.engine.grammar import GrammarState
from quire.engine.messages import SamplingParams
from quire.engine.sequence import Sequence


class Chunk(msgspec.Struct, eq=False, gc=False):  # a quarter of a dataclass's time to make
    """Consecutive tokens of one sequence; a decode is a chunk of one.

    Exactly one of ``token_ids`` and ``source_row`` names the input: the ids themselves, or the row
    of the previous step's samples that holds the one id the host has not seen yet.
    """

    # For the scheduler's commit, for what was drawn before and for what is reported; all else that
    # a step needs stands below.
    sequence: Sequence
    admission: int
    start: int  # position of the first token
    num_tokens: int
    token_ids: list[int]
    source_row: int  # -1: token_ids
    block_ids: array[int]  # covers positions 0 .. start + num_tokens - 1
    samples: bool  # the last token's logits are sampled
    sampling: SamplingParams
    seed: int
    output_index: int  # of the token sampled, counted from 0: the position of the random draw
    banned_token_ids: list[int]  # cannot be sampled here
    # What may be sampled, once the token before is known; it gives way to banned_token_ids as long
    # as anything is left.
    grammar: GrammarState | None = None
    # The prompt's tokens that follow on the chunk's first tokens, where they are to be scored.
    scored_token_ids: list[int] = []
    # Of layers with sliding windows, if these have blocks of their own: likewise, but only what the
    # chunk's rows see of it.
    window_block_ids: array[int] | None = None

    @property
    def logprobs(self) -> int | None:
        """How many of the likeliest tokens are reported beside the sampled one; None: it is not
        either."""
        return self.sequence.request.logprobs

    @property
    def num_pooled(self) -> int:
        """How many of its last rows' hidden states go into a vector."""
        pooled = self.sequence.report.pooled
        return 0 if pooled is None else pooled.num_wanted(self.start, self.context_length)

    @property
    def is_pooled(self) -> bool:
        """Whether its hidden states go into a vector, in place of a sample."""
        return not self.samples and self.num_pooled > 0

    @property
    def context_length(self) -> int:
        """Tokens the chunk's last row attends to, itself included."""
        return self.start + self.num_tokens


@dataclass(slots=True)
class StepBatch:
    """Decodes first, then prompt chunks."""

    step_id: int
    chunks: list[Chunk]
    num_decodes: int
    # For each chunk, of models with recurrent layers.
    state_moves: list[StateMoves] = field(default_factory=list)
    # With hidden states that go into a vector.
    pooled: list[Chunk] = field(default_factory=list)
    sampled: list[Chunk] = field(init=False)  # in the order of the step's samples
    scored: list[Chunk] = field(init=False)  # with prompt tokens to be scored
    num_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.sampled = [chunk for chunk in self.chunks if chunk.samples]
        self.scored = [chunk for chunk in self.chunks if chunk.scored_token_ids]
        prompts = self.chunks[self.num_decodes :]
        self.num_tokens = self.num_decodes + sum([chunk.num_tokens for chunk in prompts])

    @property
    def has_grammars(self) -> bool:
        """Whether a row can only be sampled once the step before has been read."""
        return any(chunk.grammar is not None for chunk in self.sampled)

    @property
    def reported(self) -> list[int]:
        """For each token whose log-probability is wanted, how many of the likeliest tokens are
        reported beside it: first the sampled tokens, then the scored ones."""
        drawn = [chunk.logprobs for chunk in self.sampled if chunk.logprobs is not None]
        return drawn + [
            chunk.sequence.request.prompt_logprobs or 0
            for chunk in self.scored
            for _ in chunk.scored_token_ids
        ]

    @property
    def num_scored(self) -> int:
        return sum(len(chunk.scored_token_ids) for chunk in self.scored)
