"""What a sampled token means for its request, and what the request's client is told."""

from __future__ import annotations

from typing import NamedTuple

from quire.engine.messages import FinishReason, TokenLogprobs, TokenOutput
from quire.engine.sequence import Sequence


class Ending(NamedTuple):
    """
    Attributes:
        reason: None: the request goes on.
        with_text: the last token is a part of the text, as the end of a grammar is.
    """

    reason: FinishReason | None
    with_text: bool = False


# To make one costs as much as all else that most tokens mean.
_NONE, _STOP, _END, _LENGTH = Ending(None), Ending("stop"), Ending("stop", True), Ending("length")


def accept(sequence: Sequence, token: int) -> Ending:
    """Take ``token``, the newest of ``sequence``.

    Raises:
        GrammarError: its grammar cannot go on.
    """
    request = sequence.request
    num_outputs = len(sequence.token_ids) - len(request.prompt_token_ids)
    grammar_ended = False
    if sequence.grammar is not None:
        sequence.grammar.accept(token)
        grammar_ended = sequence.grammar.is_finished
    if token in request.stop_token_ids and num_outputs > request.min_tokens:
        return _STOP
    if grammar_ended:
        return _END
    return _LENGTH if num_outputs >= request.max_tokens else _NONE


def token_output(
    sequence: Sequence, token: int, ending: Ending, logprobs: list[TokenLogprobs]
) -> TokenOutput:
    request, arrival = sequence.request, sequence.arrival
    is_first = len(sequence.token_ids) == len(request.prompt_token_ids) + 1
    return TokenOutput(
        request.request_id,
        [token],
        ending.reason,
        arrival.num_cached_tokens or 0,
        None,
        ending.with_text,
        logprobs,
        sequence.report.logprobs if is_first else [],
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
