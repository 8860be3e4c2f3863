"""Which tokens rows may draw, as far as no grammar says so."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from quire.engine.grammar import mask_words
from quire.engine.sequence import Sequence
from quire.engine.step_batch import Chunk
from quire.kernels.bitmask import apply_bitmask
from quire.kernels.padding import round_up_to_power_of_two
from quire.kernels.tree import Array

Int32Array = npt.NDArray[np.int32]

_EndAfter = tuple[int, int, int]  # a token, banned where a sample's place holds another
_LEAST = 8


@dataclass(frozen=True)
class Restrictions:
    """A node of a :mod:`quire.kernels.tree`. Parts are None where no row has any.

    Attributes:
        banned: (n, 2) int32, rows and tokens that they cannot draw.
        banned_after: (m, 4) int32: the same, where a sample of the step before is a certain token:
            its place, and the token.
        allowed: (k,) int32 rows, and (k, ceil(vocab / 32)) int32 bitmasks of what each may draw.
    """

    banned: Array | None
    banned_after: Array | None
    allowed: tuple[Array, Array] | None


def plan_restrictions(rows: SequenceABC[tuple[int, Chunk]], vocab_size: int) -> Restrictions | None:
    """On the host. Rows with a grammar are left to the mask that it makes."""
    banned: list[tuple[int, int]] = []
    after: list[tuple[int, int, int, int]] = []
    allowed: dict[int, SequenceABC[int]] = {}
    for i, row in rows:
        if row.grammar is not None:
            continue
        params = row.sampling
        known, unknown = [*row.banned_token_ids], list[_EndAfter]()
        if params.bad_words:
            ends, unknown = _ends_of(row)
            known += ends
        if params.allowed_token_ids:
            allowed[i] = params.allowed_token_ids
            if known or unknown:
                known, unknown = _leaving_some(params.allowed_token_ids, known, unknown)
        banned += [(i, token) for token in known]
        after += [(i, *end) for end in unknown]
    if not (banned or after or allowed):
        return None
    return Restrictions(
        banned=_padded(banned) if banned else None,
        banned_after=_padded(after) if after else None,
        allowed=_masks(allowed, vocab_size) if allowed else None,
    )


def restrict(logits: mx.array, restrictions: Restrictions, previous: mx.array) -> mx.array:
    """The logits, with -inf for what rows may not draw.

    Args:
        logits: (R, vocab)
        restrictions: of :func:`plan_restrictions`, the arrays on the device.
        previous: (n,) int32, the samples of the step before.
    """
    logits = logits[:]  # the caller keeps its own: an assignment changes the array object
    if restrictions.allowed is not None:
        rows, masks = restrictions.allowed
        logits[rows] = apply_bitmask(logits[rows], masks)
    if restrictions.banned is not None:
        rows, tokens = restrictions.banned.T
        logits[rows, tokens] = -mx.inf
    if restrictions.banned_after is not None:
        rows, tokens, places, last = restrictions.banned_after.T
        ban = mx.where(previous[places] == last, -mx.inf, 0.0).astype(logits.dtype)
        logits = logits.at[rows, tokens].add(ban)
    return logits


def ends_of_bad_words(sequence: Sequence) -> Iterator[int]:
    """Last tokens of bad words that a sequence, of which the host knows all, has drawn up to
    there."""
    for *head, end in sequence.request.sampling.bad_words:
        if _ends_with(sequence, head):
            yield end


def _leaving_some(
    allowed: SequenceABC[int], banned: list[int], after: list[_EndAfter]
) -> tuple[list[int], list[_EndAfter]]:
    """The bans that leave any of ``allowed``, as grammars leave a token too."""
    left = {*allowed}.difference(banned)
    if not left:
        left, banned = {*allowed}, []
    ends: dict[tuple[int, int], set[int]] = {}
    for token, place, last in after:
        ends.setdefault((place, last), set()).add(token)
    kept = {condition for condition, tokens in ends.items() if not left <= tokens}
    return banned, [end for end in after if end[1:] in kept]


def _ends_of(row: Chunk) -> tuple[list[int], list[_EndAfter]]:
    """The same of a row, and those that depend on its newest token, which is on the device only:
    beside each the token's place, and what it has to be."""
    if row.source_row < 0:
        return [*ends_of_bad_words(row.sequence)], []
    words = row.sampling.bad_words
    return [end for *head, end in words if not head], [
        (end, row.source_row, head[-1])
        for *head, end in words
        if head and _ends_with(row.sequence, head[:-1])
    ]


def _ends_with(sequence: Sequence, tail: list[int]) -> bool:
    """Whether these are the newest output tokens that the host has seen."""
    start = len(sequence.token_ids) - len(tail)
    return start >= len(sequence.request.prompt_token_ids) and sequence.token_ids[start:] == tail


def _masks(allowed: dict[int, SequenceABC[int]], vocab_size: int) -> tuple[Int32Array, Int32Array]:
    # More of the last one, so that their number recurs.
    rows = list(allowed) + [max(allowed)] * (round_up_to_power_of_two(len(allowed)) - len(allowed))
    bits = np.zeros((len(rows), mask_words(vocab_size) * 32), np.bool_)
    for bit_row, row in enumerate(rows):
        bits[bit_row, allowed[row]] = True
    masks = np.packbits(bits, axis=1, bitorder="little").view("<i4")
    return np.array(rows, np.int32), masks.astype(np.int32, copy=False)


def _padded(entries: SequenceABC[tuple[int, ...]]) -> Int32Array:
    """With more of the last one, so that their number recurs."""
    missing = round_up_to_power_of_two(len(entries), _LEAST) - len(entries)
    return np.array([*entries, *[entries[-1]] * missing], np.int32)
