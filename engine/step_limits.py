"""How many tokens a step may compute, and of whom."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from quire.cache.pools import Pools
from quire.cache.window_pool import longest_step
from quire.engine.sequence import Sequence

_LEAST_ROWS = 16  # of a prompt in a step, however long its context
# Prompt tokens of a step whose log-probabilities are wanted: each takes logits over the vocabulary.
_MAX_SCORED = 64


@dataclass(slots=True)
class StepLimits:
    """How many sequences and tokens a step may have, and how long its chunks of prompts may be.

    Attributes:
        max_num_seqs: sequences that run at the same time.
        max_num_batched_tokens: of decodes and prompt chunks together.
        mixed_prompt_tokens: prompt tokens of a step that also decodes, if many sequences would wait
            for more; None: as many as the budget leaves.
        max_attended: rows of prompts times their contexts; None: any.
        prompt_tokens: on top of decodes; fewer while the device has no memory for more.
        longest_chunk: of one prompt; fewer tokens than a step's where blocks of windows are few.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    mixed_prompt_tokens: int | None = None
    max_attended: int | None = None
    prompt_tokens: int = field(init=False)
    longest_chunk: int = field(init=False)

    def __post_init__(self) -> None:
        if self.max_num_batched_tokens <= self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be larger than "
                f"max_num_seqs ({self.max_num_seqs}), or decodes could starve prompts"
            )
        self.prompt_tokens = self.longest_chunk = self.max_num_batched_tokens

    def fit(self, pools: Pools) -> None:
        """Let chunks be as long as fit beside a window.

        Raises:
            ValueError: none does.
        """
        windows = pools.windows
        if windows is None:
            return
        longest = self.max_num_batched_tokens
        if windows.num_usable < pools.blocks.num_usable:  # which hold no longer sequences
            longest = longest_step(windows.window, windows.block_size, windows.num_usable)
        if longest < 1:
            raise ValueError(
                f"{windows.num_usable} blocks hold no window of {windows.window} tokens"
            )
        self.longest_chunk = longest

    def budget(self, num_decodes: int) -> int:
        """Tokens of a step in which so many sequences decode.

        A prompt makes each of them wait, so that more of them allow fewer prompt tokens (stall-free
        batching: Agrawal et al., Sarathi-Serve, 2024).
        """
        budget = min(self.max_num_batched_tokens, num_decodes + self.prompt_tokens)
        if not num_decodes or self.mixed_prompt_tokens is None:
            return budget
        beside = max(self.mixed_prompt_tokens, self.max_num_batched_tokens // num_decodes)
        return min(budget, num_decodes + beside)

    def cut(
        self, sequence: Sequence, start: int, num_tokens: int, planned: Mapping[Sequence, int]
    ) -> int:
        """How many of ``num_tokens`` from ``start`` on a step takes beside those ``planned``.

        Fewer where a step holds no more that are scored, where they attend to so much that it would
        hold the device for seconds, or where blocks of windows are few.
        """
        num_tokens = min(num_tokens, self.longest_chunk)
        if self.max_attended is not None and num_tokens > 1:
            taken = sum(n * (s.num_computed_tokens + n) for s, n in planned.items() if n > 1)
            rows = (self.max_attended - taken) // (start + num_tokens)
            # The first goes on, if slowly.
            num_tokens = min(num_tokens, max(rows, 0 if taken else _LEAST_ROWS))
        if not sequence.num_unscored:
            return num_tokens
        taken = sum(count for other, count in planned.items() if other.num_unscored)
        return min(num_tokens, _MAX_SCORED - taken)
