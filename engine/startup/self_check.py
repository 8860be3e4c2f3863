"""Does the model compute over pages what it computes by itself? Asked once, before serving."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from quire.cache.block_pool import BlockPool
from quire.cache.eviction import LRU
from quire.cache.pools import Pools
from quire.cache.state_pool import StatePool
from quire.cache.window_pool import WindowPool
from quire.engine.errors import UnsupportedModel
from quire.engine.messages import GenerateRequest, SamplingParams
from quire.engine.model.paged_model import PagedModel
from quire.engine.scheduler import Scheduler
from quire.engine.step.runner import ModelRunner
from quire.engine.step_limits import StepLimits

logger = logging.getLogger("quire.engine")

# A prompt computed in chunks that end inside blocks, then decodes.
_PROMPT_LENGTH = 20
_CHUNK = 9
_NUM_DECODES = 4
_NUM_SLOTS = 5

# Relative error of one row's logits, as the median over rows. Wrong positions or masks give 0.1 and
# more in every row; rounding in half precision, or an expert chosen differently, does not.
_TOLERANCE = 0.01
_HALF_PRECISION_TOLERANCE = 0.2
# How many times mlx-lm's own error is still no mistake.
_OWN_TIMES = 2


def check_against_plain_forward(paged: PagedModel, num_blocks: int) -> float:
    """Compare logits over pages with those of mlx-lm's own forward pass and cache.

    Some models amplify rounding without end: where hundreds of experts are chosen by weights that
    are hardly trained, mlx-lm's own answers to a text, whole and in pieces, or rounded to half
    precision and not, have nothing in common. A model is refused if its error over pages is more
    than a few times both of these; where they are large that tells little, which is logged.

    Overwrites pages. Returns the median relative error.

    Raises:
        UnsupportedModel: they differ by more than rounding.
    """
    token_ids = [(7 * i + 1) % paged.vocab_size for i in range(_PROMPT_LENGTH + _NUM_DECODES + 1)]
    plain = _plain_logits(paged, [token_ids])
    found = _paged_logits(paged, num_blocks, token_ids)
    ends = list(accumulate(len(piece) for piece, _ in found))
    rows = [logits for _, logits in found]

    def at_ends(logits: mx.array) -> list[mx.array]:
        return [logits[end - 1] for end in ends]

    expected = at_ends(plain)
    median = _median_error(rows, expected)
    is_float32 = all(layer.shape and layer.shape.key_dtype == mx.float32 for layer in paged.layers)
    if median <= (_TOLERANCE if is_float32 else _HALF_PRECISION_TOLERANCE):
        return median
    own = _median_error(at_ends(_plain_logits(paged, [piece for piece, _ in found])), expected)
    if not median <= _OWN_TIMES * own:
        with _unrounded(paged.model):
            unrounded = at_ends(_plain_logits(paged, [token_ids]))
        own = _median_error(expected, unrounded)
        if not _median_error(rows, unrounded) <= _OWN_TIMES * own:
            raise UnsupportedModel(
                paged.name,
                f"its logits over KV pages are off by {median:.1%} from its own, which rounding "
                f"changes by {own:.1%}",
            )
    logger.warning(
        "%s could not be checked against its own forward pass, which rounding changes by %.0f%%",
        paged.name,
        100 * own,
    )
    return median


def _paged_logits(
    paged: PagedModel, num_blocks: int, token_ids: list[int]
) -> list[tuple[list[int], mx.array]]:
    """The pieces in which all tokens but the last go through pages, and (vocab,) float32 behind the
    last of each."""
    pool = BlockPool(num_blocks, paged.block_size, LRU())
    states = None
    if paged.states is not None:
        states = StatePool(_NUM_SLOTS, paged.block_size, LRU())
    windows = None
    if paged.window is not None:
        windows = WindowPool(num_blocks, paged.block_size, paged.window, LRU())
    scheduler = Scheduler(Pools(pool, states, windows), StepLimits(1, _CHUNK))
    scheduler.submit(
        GenerateRequest(0, token_ids[:_PROMPT_LENGTH], _NUM_DECODES + 1, SamplingParams())
    )
    runner = ModelRunner(paged, max_num_seqs=1)
    found = []
    while (batch := scheduler.schedule()) is not None:
        logits = runner.forward(batch, None)[0].astype(mx.float32)
        mx.eval(logits)  # before pages are written again
        start, end = batch.chunks[0].start, batch.chunks[0].context_length
        found.append((token_ids[start:end], logits))
        # Whatever was sampled, go on with the text that the plain pass saw.
        scheduler.commit(batch, [token_ids[end]] if batch.sampled else [])
    return found


def _median_error(rows: Sequence[mx.array], expected: Sequence[mx.array]) -> float:
    return statistics.median(map(_error, rows, expected))


def _error(logits: mx.array, expected: mx.array) -> float:
    """Of one row, relative to its largest."""
    return float(mx.abs(logits - expected).max() / mx.maximum(mx.abs(expected).max(), 1e-6))


def _plain_logits(paged: PagedModel, pieces: Sequence[list[int]]) -> mx.array:
    """(T, vocab) float32, of all tokens of the pieces one after the other."""
    cache = make_prompt_cache(paged.model)
    rows = [paged.model(mx.array([piece]), cache=cache)[0] for piece in pieces]
    return mx.concatenate(rows).astype(mx.float32)


@contextmanager
def _unrounded(model: nn.Module) -> Iterator[None]:
    """Context manager: within it, what the model hands from layer to layer is float32, since the
    weights of its norms are; matrices stay as they are."""
    weights = {
        name: array
        for name, array in tree_flatten(model.parameters())
        if array.ndim < 2 and array.dtype in (mx.float16, mx.bfloat16)
    }
    model.load_weights([(name, w.astype(mx.float32)) for name, w in weights.items()], strict=False)
    try:
        yield
    finally:
        model.load_weights(list(weights.items()), strict=False)
