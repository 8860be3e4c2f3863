"""Decode steps of mlx-lm's own model, one step ahead as mlx-lm runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from quire.loadtest.engine_steps import MAX_TOKEN, Times, time_calls

_ROWS = 2048  # of one call that fills a cache


def time_decodes(
    model: Any,
    new_cache: Callable[[int], list[Any]],
    decode: Sequence[tuple[int, int]],
    steps: int,
) -> Times:
    """The steps of each batch and context in ``decode``; ``new_cache`` makes that of a batch."""
    times: Times = {}
    for batch, context in decode:
        cache = new_cache(batch)
        piece = max(1, _ROWS // batch)
        for start in range(0, context, piece):
            tokens = mx.random.randint(0, MAX_TOKEN, (batch, min(piece, context - start)))
            state = mx.argmax(model(tokens, cache=cache)[:, -1:], axis=-1)
            mx.eval(state)
        before = state

        def step(cache: list[Any] = cache) -> None:
            nonlocal state, before
            before, state = state, mx.argmax(model(state, cache=cache), axis=-1)
            mx.async_eval(state)
            mx.eval(before)

        times[f"decode {batch}x{context}"] = time_calls(step, steps)
        del cache, step  # before the next one's takes its memory
        mx.clear_cache()
    return times
