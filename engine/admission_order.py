"""Who waits in front of whom.

Whoever runs evicts cached blocks. Were requests admitted as they came, each would evict what the
next one would find, and of many conversations beside each other hardly any prompt would be cached.
"""

from __future__ import annotations

from quire.engine.sequence import Sequence

_CONSIDERED = 16  # of those who wait
_FEW = 4  # times to be passed over
_WORTH = 256  # tokens; fewer are no reason to go first


def put_cached_first(waiting: list[Sequence], block_size: int, most_hashed: int) -> bool:
    """Sort the first of ``waiting`` such that more of whose prompt is cached goes first.

    Priorities come before that, then those who were preempted, then those who have been passed over
    as often as there are some to consider, and four times at least.

    Args:
        most_hashed: prompt tokens, behind which those not yet looked up count as not cached.

    Returns:
        Whether all prompts considered have been looked up.
    """
    considered = waiting[:_CONSIDERED]
    found: dict[Sequence, int] = {}
    for sequence in considered:
        if most_hashed < 0:
            break
        cache = sequence.cache
        most_hashed -= len(sequence.token_ids) - block_size * len(cache.blocks.known_hashes)
        if not sequence.needs_every_row:
            blocks = cache.find_prefix(sequence.token_ids).blocks
            found[sequence] = block_size * len(blocks) // _WORTH

    most_passed = max(_FEW, len(considered))

    def rank(sequence: Sequence) -> tuple[int, int, float, float]:
        priority, arrival = sequence.request.priority, sequence.arrival
        if sequence.admissions:
            return priority, 0, 0, 0
        if arrival.passed_over >= most_passed:
            return priority, 1, 0, arrival.at
        return priority, 2, -found.get(sequence, 0), arrival.at

    waiting[:_CONSIDERED] = sorted(considered, key=rank)
    return most_hashed >= 0


def count_passed_over(waiting: list[Sequence], admitted: Sequence) -> None:
    """``admitted`` runs, in front of those of ``waiting`` who came before it."""
    for sequence in waiting[:_CONSIDERED]:
        if (
            sequence.request.priority == admitted.request.priority
            and sequence.arrival.at < admitted.arrival.at
        ):
            sequence.arrival.passed_over += 1
