"""Does the model compute over pages what it computes by itself? Asked once, before serving."""

from __future__ import annotations

import statistics

import mlx.core as mx
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

# A prompt computed in chunks that end inside blocks, then decodes.
_PROMPT_LENGTH = 20
_CHUNK = 9
_NUM_DECODES = 4
_NUM_SLOTS = 5

# Relative error of one row's logits, as the median over rows. Wrong positions or masks give 0.1 and
# more in every row; rounding in half precision, or an expert chosen differently, does not.
_TOLERANCE = 0.01
_HALF_PRECISION_TOLERANCE = 0.2


def check_against_plain_forward(paged: PagedModel, num_blocks: int) -> float:
    """Compare logits over pages with those of mlx-lm's own forward pass and cache.

    Overwrites pages. Returns the median relative error.

    Raises:
        UnsupportedModel: they differ by more than rounding.
    """
    token_ids = [(7 * i + 1) % paged.vocab_size for i in range(_PROMPT_LENGTH + _NUM_DECODES + 1)]
    plain = _plain_logits(paged, token_ids)
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
    errors: list[float] = []
    while (batch := scheduler.schedule()) is not None:
        logits = runner.forward(batch, None)[0].astype(mx.float32)
        end = batch.chunks[0].context_length
        expected = plain[end - 1]
        error = mx.abs(logits - expected).max() / mx.maximum(mx.abs(expected).max(), 1e-6)
        errors.append(float(error))
        # Whatever was sampled, go on with the text that the plain pass saw.
        scheduler.commit(batch, [token_ids[end]] if batch.sampled else [])
    median = statistics.median(errors)
    is_float32 = all(layer.shape and layer.shape.key_dtype == mx.float32 for layer in paged.layers)
    if not median <= (_TOLERANCE if is_float32 else _HALF_PRECISION_TOLERANCE):
        raise UnsupportedModel(
            paged.name, f"its logits over KV pages are off by {median:.1%} from its own"
        )
    return median


def _plain_logits(paged: PagedModel, token_ids: list[int]) -> mx.array:
    logits: mx.array = paged.model(mx.array([token_ids]), cache=make_prompt_cache(paged.model))
    return logits[0].astype(mx.float32)
