"""Prompts that are refused for their length before anybody tokenizes them."""

from __future__ import annotations

from typing import Any, Final

from msgspec import Struct

from quire.serve.errors import ApiError, invalid
from quire.serve.text_encoder import TextEncoder, fewest_tokens

MAX_UNLIMITED_TEXT: Final = 4 * 2**20  # characters; to read one takes 150 bytes of memory
_MOST_CHARACTERS_PER_TOKEN: Final = 64


class LengthLimit(Struct, frozen=True):
    """What of a prompt's text is not even tokenized.

    Attributes:
        max_model_len: in tokens; None: there is no context to fit, and only what would take too
            much memory to read is refused.
        bytes_per_token: of text, at most; None: not known.
        counts: the tokens are only counted: a text longer than the context is read too, up to
            :data:`MAX_UNLIMITED_TEXT`.
    """

    max_model_len: int | None
    bytes_per_token: int | None
    counts: bool = False

    def check(self, text: str, prompt_field: str) -> None:
        """Raises :class:`ApiError` (400), of its kind :class:`PromptTooLong` for the context."""
        if len(text) <= MAX_UNLIMITED_TEXT and (self.counts or self.max_model_len is None):
            return
        if self.max_model_len is None:
            raise invalid(
                prompt_field,
                f"{prompt_field} has {len(text)} characters; send {MAX_UNLIMITED_TEXT} at a time.",
            )
        # Nobody's tokens are that long on average, though some may be.
        fewest = max(
            fewest_tokens(text, self.bytes_per_token), len(text) // _MOST_CHARACTERS_PER_TOKEN
        )
        if fewest >= self.max_model_len:
            raise PromptTooLong(prompt_field, fewest, self.max_model_len)


def length_limit(
    encoder: TextEncoder, max_model_len: int | None, *, counts: bool = False
) -> LengthLimit:
    return LengthLimit(max_model_len, encoder.bytes_per_token, counts)


class PromptTooLong(ApiError):
    """400, of a text whose length tells that it has ``fewest`` tokens or more."""

    def __init__(self, prompt_field: str, fewest: int, max_model_len: int) -> None:
        super().__init__(
            400,
            f"This model holds {max_model_len} tokens of prompt and answer together; "
            f"{prompt_field} has at least {fewest} by its length alone. Shorten it.",
            param=prompt_field,
            code="context_length_exceeded",
        )
        self.prompt_field = prompt_field
        self.fewest = fewest
        self.max_model_len = max_model_len


def details_of(error: ApiError) -> list[Any]:
    """A refusal (400) as values of JSON."""
    limits = (error.fewest, error.max_model_len) if isinstance(error, PromptTooLong) else None
    return [error.param, error.message, error.code, limits]


def error_of(details: list[Any]) -> ApiError:
    """The refusal that :func:`details_of` has taken apart."""
    param, message, code, limits = details
    return invalid(param, message, code=code) if limits is None else PromptTooLong(param, *limits)
