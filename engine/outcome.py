"""What the results of a step mean for its requests, and what the requests' clients are told."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceABC
from typing import NamedTuple

from quire.engine.messages import FinishReason, TokenLogprobs, TokenOutput
from quire.engine.pooled import Float32Array
from quire.engine.sequence import Sequence
from quire.engine.step_batch import StepBatch


class Reported(NamedTuple):
    """What a step gave for one chunk beside its token.

    Attributes:
        drawn: the log-probabilities of that token, one entry; empty if nobody asks.
        scored: likewise of the prompt's tokens that the chunk's rows predict.
        total: (hidden_size,) the sum of its hidden states; None: the prompt is to be no vector.
    """

    drawn: list[TokenLogprobs]
    scored: list[TokenLogprobs]
    total: Float32Array | None


_NOTHING = Reported([], [], None)


def reports(
    batch: StepBatch, logprobs: SequenceABC[TokenLogprobs], sums: SequenceABC[Float32Array]
) -> Iterator[Reported]:
    """Deal the results of a step out to its chunks, in their order.

    Args:
        logprobs: one for each of ``batch.reported``.
        sums: one for each of ``batch.pooled``.
    """
    if not logprobs and not sums:
        # Nearly all steps. The loop below takes as long as all other work on their tokens.
        yield from [_NOTHING] * len(batch.chunks)
        return
    drawn, scored = iter(logprobs), iter(logprobs[len(logprobs) - batch.num_scored :])
    totals = iter(sums)
    for chunk in batch.chunks:
        yield Reported(
            [next(drawn)] if logprobs and chunk.samples and chunk.logprobs is not None else [],
            [next(scored) for _ in chunk.scored_token_ids],
            next(totals) if chunk.is_pooled else None,
        )


def take_token(sequence: Sequence, token: int, logprobs: list[TokenLogprobs]) -> TokenOutput:
    """Take ``token``, the newest of ``sequence``; a finish reason in the output says that it is the
    last.

    Raises:
        GrammarError: its grammar cannot go on.
    """
    request, arrival = sequence.request, sequence.arrival
    num_outputs = len(sequence.token_ids) - len(request.prompt_token_ids)
    grammar_ended = False
    if sequence.grammar is not None:
        sequence.grammar.accept(token)
        grammar_ended = sequence.grammar.is_finished
    reason: FinishReason | None = None
    with_text = False
    if token in request.stop_token_ids and num_outputs > request.min_tokens:
        reason = "stop"
    elif grammar_ended:
        reason, with_text = "stop", True
    elif num_outputs >= request.max_tokens:
        reason = "length"
    return TokenOutput(
        request.request_id,
        [token],
        reason,
        arrival.num_cached_tokens or 0,
        None,
        with_text,
        logprobs,
        sequence.report.logprobs if num_outputs == 1 else [],
        arrival.queue_seconds,
    )


def vector_output(sequence: Sequence, vector: bytes) -> TokenOutput:
    arrival = sequence.arrival
    return TokenOutput(
        sequence.request.request_id,
        [],
        "stop",
        num_cached_tokens=arrival.num_cached_tokens or 0,
        queue_seconds=arrival.queue_seconds,
        vector=vector,
    )
