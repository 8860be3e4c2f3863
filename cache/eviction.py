"""Which cached block to give up first.

The block pool asks for a priority when the last sequence lets go of a cached block, and evicts the
lowest one among the blocks that no other cached block builds on, so tails always go before heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

PolicyName = Literal["lru", "fifo", "cost"]

# Beyond about this many tokens of context, attention costs a typical transformer as much as its
# matrix products: a block's recompute cost is then twice that of a block at position 0.
_ATTENTION_PARITY_TOKENS = 8192


class EvictionPolicy(Protocol):
    """Ranks cached blocks or states that nobody uses: which of them to give up first."""

    def priority(self, cached_at: int, released_at: int, position: int, uses: int) -> float:
        """Rank a block that nobody references any more; the lowest rank is evicted first.

        Args:
            cached_at: logical time at which the block's content was completed.
            released_at: logical time at which its last reference went away.
            position: tokens in front of the block in its sequence.
            uses: sequences that have used the block, its author included.
        """
        ...

    def evicted(self, priority: float) -> None:
        """A block of this priority was evicted."""
        ...


class LRU:
    """Least recently used first."""

    def priority(self, cached_at: int, released_at: int, position: int, uses: int) -> float:
        return released_at

    def evicted(self, priority: float) -> None:
        pass


class FIFO:
    """Oldest content first, however often it was used since."""

    def priority(self, cached_at: int, released_at: int, position: int, uses: int) -> float:
        return cached_at

    def evicted(self, priority: float) -> None:
        pass


class CostAware:
    """What would cost least to compute again, weighted by how often it was used, with ageing.

    GreedyDual-Size-Frequency (Cherkasova, 1998) for things of one size: priority = clock + uses *
    cost, where the clock is the priority of the last victim, so that what stops being used falls
    behind in time.
    """

    def __init__(self, cost: Callable[[int], float]) -> None:
        """``cost``: by position, in any unit."""
        self._cost = cost
        self._clock = 0.0

    def priority(self, cached_at: int, released_at: int, position: int, uses: int) -> float:
        return self._clock + uses * self._cost(position)

    def evicted(self, priority: float) -> None:
        self._clock = priority


def make_policy(name: PolicyName) -> EvictionPolicy:
    """For blocks of keys and values. Raises KeyError for an unknown name."""
    policies: dict[PolicyName, Callable[[], EvictionPolicy]] = {
        "lru": LRU,
        "fifo": FIFO,
        "cost": lambda: CostAware(_block_cost),
    }
    return policies[name]()


def make_state_policy(name: PolicyName) -> EvictionPolicy:
    """For states of recurrent layers beside blocks of policy ``name``.

    A state stands for all tokens in front of it, of which a long prompt has more than a short one,
    and takes as much memory. So recency alone loses to the time of the prompt that it saves: on
    traces of agents beside short chats that recomputes up to twice as many tokens.
    """
    return FIFO() if name == "fifo" else CostAware(_prompt_cost)


def _block_cost(position: int) -> float:
    return 1.0 + position / _ATTENTION_PARITY_TOKENS


def _prompt_cost(position: int) -> float:
    return position * (1.0 + position / 2 / _ATTENTION_PARITY_TOKENS)
