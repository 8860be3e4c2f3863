"""Recurrences and windows by functions that know nothing of slots, mlx-lm's own among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

from quire.engine.recurrent.layer import STORED, StateHandle, Stored

Recurrence = Callable[[list[mx.array], mx.array], tuple[mx.array, mx.array]]


def windows(handle: StateHandle, rows: mx.array, kept: int) -> mx.array:
    """Each row behind the ``kept`` rows before it in its sequence.

    Args:
        handle: of a state that is those rows, the oldest first.
        rows: (T, ...)

    Returns:
        (T, kept + 1, n), the last axis all of a row.
    """
    handle.item.window_size = kept
    flat = rows.reshape(rows.shape[0], -1)
    tails = handle.read()
    tails = tails.reshape(tails.shape[0], kept, -1).astype(flat.dtype)
    if not handle.rows.pieces:
        return mx.concatenate([tails, flat[:, None]], axis=1)
    known = mx.concatenate([tails.reshape(-1, flat.shape[1]), flat])
    return known[handle.rows.windows[kept]]


def previous_rows(handle: StateHandle, rows: mx.array) -> mx.array:
    """For each of (T, ...) rows the one before it in its sequence."""
    return windows(handle, rows, 1)[:, 0].reshape(rows.shape)


def scan(
    recurrence: Recurrence, handle: StateHandle, rows: Sequence[mx.array]
) -> tuple[mx.array, Stored]:
    """Run a recurrence over the rows of each sequence, and store its states.

    Args:
        recurrence: takes arrays (B, L, ...) and states (B, *shape) before them, and returns
            (B, L, ...) and the states behind. It is called once with one row of every decode, and
            then with each piece of each prompt chunk.
        rows: (T, 1, ...) each.

    Returns:
        (T, 1, ...), and what stands for the new state.
    """
    plan = handle.rows
    states = handle.read()
    num_rows = plan.num_decode_rows
    found: list[mx.array] = []
    behind: list[mx.array] = []
    if num_rows:
        every = [x[:num_rows] for x in rows] if plan.pieces else list(rows)
        outputs, new = recurrence(every, states[:num_rows] if plan.pieces else states)
        found.append(outputs)
        behind.append(new if plan.num_decodes == num_rows else new[: plan.num_decodes])
    first = num_rows
    for sequence, lengths in enumerate(plan.pieces, num_rows):
        state = states[sequence : sequence + 1]
        for length in lengths:
            piece = [x[first : first + length].swapaxes(0, 1) for x in rows]
            outputs, state = recurrence(piece, state)
            found.append(outputs.swapaxes(0, 1))
            behind.append(state)
            first += length
    if padding := rows[0].shape[0] - first:
        found.append(mx.zeros((padding, *found[0].shape[1:]), found[0].dtype))
    handle.store(_joined(behind))
    return _joined(found), STORED


def _joined(parts: list[mx.array]) -> mx.array:
    return parts[0] if len(parts) == 1 else mx.concatenate(parts)
