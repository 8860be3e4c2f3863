"""Decode steps of mlx-lm's own model, one step ahead as mlx-lm runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from quire.loadtest.engine_steps import MAX_TOKEN, Times, time_calls


def time_decodes(
    model: Any,
    new_cache: Callable[[int], list[Any]],
    decode: Sequence[tuple[int, int]],
    steps: int,
) -> Times:
    """The steps of each batch and context in ``decode``; ``new_cache`` makes that of a batch.

    All but one token of a context are zeros in the cache: where a recurrence goes by single tokens,
    prompts would take minutes.
    """
    times: Times = {}
    for batch, context in decode:
        cache = new_cache(batch)
        tokens = mx.random.randint(0, MAX_TOKEN, (batch, 1))
        state = mx.argmax(model(tokens, cache=cache), axis=-1)
        mx.eval(state)
        for layer in cache:
            _lengthen(layer, context - 1)
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


def _lengthen(layer: Any, tokens: int) -> None:
    """Put so many tokens behind those of a layer's cache; a recurrent state has no length."""
    for part in getattr(layer, "caches", [layer]):
        if tokens and hasattr(part, "update_and_fetch"):
            batch, heads, _, width = part.keys.shape
            keys = mx.zeros((batch, heads, tokens, width), part.keys.dtype)
            values = mx.zeros((batch, heads, tokens, part.values.shape[-1]), part.values.dtype)
            mx.eval(part.update_and_fetch(keys, values))
