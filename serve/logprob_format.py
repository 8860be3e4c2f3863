"""Tokens and their log-probabilities in the forms of the two endpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from quire.engine.messages import TokenLogprobs
from quire.serve.detokenizer import TokenBytes
from quire.serve.openai_answer import (
    ChatLogprobs,
    CompletionLogprobs,
    ContentLogprob,
    TopLogprob,
)
from quire.serve.token_log import ShownToken

# JSON has no infinity. The value is vLLM's.
_LEAST: Final = -9999.0


def chat_logprobs(tokens: Sequence[ShownToken], table: TokenBytes, num_top: int) -> ChatLogprobs:
    """``table`` spells special tokens, too."""
    content = []
    for token in tokens:
        entry = token.logprobs or TokenLogprobs(_LEAST)
        top = zip(entry.top_ids[:num_top], entry.top_logprobs, strict=False)
        spelled = table[token.token_id]
        content.append(
            ContentLogprob(
                _text(spelled),
                max(entry.logprob, _LEAST),
                list(spelled),
                [
                    TopLogprob(_text(table[other]), max(logprob, _LEAST), list(table[other]))
                    for other, logprob in top
                ],
            )
        )
    return ChatLogprobs(content)


def completion_logprobs(
    tokens: Sequence[ShownToken], table: TokenBytes, num_top: int
) -> CompletionLogprobs:
    """``table`` spells special tokens, too. Each token is among its own alternatives."""
    logprobs: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    for token in tokens:
        entry = token.logprobs
        if entry is None:
            logprobs.append(None)
            tops.append(None)
            continue
        logprobs.append(max(entry.logprob, _LEAST))
        top: dict[str, float] = {}
        # Tokens may look alike: the likelier one is listed.
        for other, logprob in zip(entry.top_ids[:num_top], entry.top_logprobs, strict=False):
            top.setdefault(_text(table[other]), max(logprob, _LEAST))
        top.setdefault(_text(table[token.token_id]), max(entry.logprob, _LEAST))
        tops.append(top)
    return CompletionLogprobs(
        [_text(table[token.token_id]) for token in tokens],
        logprobs,
        tops,
        [token.offset for token in tokens],
    )


def _text(spelled: bytes) -> str:
    return spelled.decode(errors="replace")
