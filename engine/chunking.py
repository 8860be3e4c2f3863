"""The next tokens of a sequence as a part of a step."""

from __future__ import annotations

from functools import cache

from quire.engine.messages import SamplingParams
from quire.engine.sequence import Sequence
from quire.engine.step_batch import Chunk


def take_chunk(sequence: Sequence, num_tokens: int, step_id: int) -> Chunk:
    """The next ``num_tokens`` of a sequence; from now on they count as computed."""
    request, blocks, windows = sequence.request, sequence.cache.blocks, sequence.cache.windows
    start, num_pending = sequence.num_computed_tokens, sequence.num_pending_tokens
    end = start + num_tokens
    total = len(sequence.token_ids) + num_pending
    samples = end == total and request.pooling is None
    in_flight = samples and num_pending > 0
    output_index = total - len(request.prompt_token_ids)
    is_early = output_index < request.min_tokens
    thinking = sequence.thinking if samples else None
    forced = None if thinking is None else thinking.next_forced(num_pending)
    is_scored = request.prompt_logprobs is not None
    chunk = Chunk(  # in the order of its fields: by their names it takes six times as long
        sequence,
        sequence.admissions,
        start,
        num_tokens,
        [] if in_flight else sequence.token_ids[start:end],
        sequence.sample_row if in_flight else -1,
        blocks.block_ids,
        samples,
        request.sampling if forced is None else _only(forced),
        sequence.seed,
        output_index,
        request.stop_token_ids if is_early and forced is None else [],
        sequence.grammar,
        sequence.scored_behind(start, end) if is_scored else [],
        None if windows is None else windows.block_ids,
    )
    sequence.num_computed_tokens = end
    sequence.last_step = step_id
    return chunk


@cache
def _only(token: int) -> SamplingParams:
    """Draws that token."""
    return SamplingParams(temperature=0, allowed_token_ids=[token])
