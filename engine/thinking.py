"""A limit to what a sequence thinks: once it is spent, the tokens that end thinking are forced."""

from __future__ import annotations

from quire.engine.messages import ThinkingBudget


class Thinking:
    """How far one sequence has thought, as far as the host has seen its tokens."""

    def __init__(self, budget: ThinkingBudget) -> None:
        self._budget = budget
        self._is_open = budget.starts_open
        self._num_tokens = 0  # of all that was thought, the opening and closing tokens left out
        self._tail: list[int] = []  # the newest tokens, as many as a mark has
        self._forced = [*budget.close_token_ids, *budget.then_token_ids]
        self._num_accepted = 0
        self._forced_from: int | None = None  # the output token with which forcing began
        self._opened: int | None = None  # behind which output token the model began to think

    def accept(self, token: int) -> None:
        """Take the next output token."""
        budget = self._budget
        self._num_accepted += 1
        longest = max(len(budget.open_token_ids), len(budget.close_token_ids))
        self._tail = [*self._tail, token][-longest:]
        if self._is_open:
            self._num_tokens += 1
            if self._ends_with(budget.close_token_ids):
                self._is_open = False
                self._num_tokens -= len(budget.close_token_ids)
        elif budget.open_token_ids and self._ends_with(budget.open_token_ids):
            self._is_open = True
            self._opened = self._num_accepted
        start = self._forced_from
        if start is not None and self._num_accepted - start >= len(self._forced):
            self._forced_from = None

    def waits(self, num_pending: int) -> bool:
        """Whether the next token cannot be chosen before those under way are known: they may spend
        the budget, or end the thinking by themselves."""
        if not num_pending or not self._is_open or self._forced_from is not None:
            return False
        return self._num_tokens + num_pending >= self._budget.max_tokens

    def next_forced(self, num_pending: int) -> int | None:
        """The token that must follow on those under way; None: any may."""
        if self._forced_from is None:
            if not self._is_open or self._num_tokens < self._budget.max_tokens:
                return None
            if not num_pending and self._opened == self._num_accepted:
                # One token passes behind an opener, whether or not it was drawn before the host
                # had seen that.
                return None
            self._forced_from = self._num_accepted + num_pending
        place = self._num_accepted + num_pending - self._forced_from
        return self._forced[place] if place < len(self._forced) else None

    def _ends_with(self, mark: list[int]) -> bool:
        return self._tail[-len(mark) :] == mark
