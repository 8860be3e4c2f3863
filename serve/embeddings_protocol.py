"""POST /v1/embeddings: the request and the answer, after OpenAI's schema."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from msgspec import Meta, Struct

from quire.serve.openai_protocol import PositiveInt, TextsOrIds, texts_or_ids

MAX_INPUTS: Final = 2048


class EmbeddingRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    model: str
    input: TextsOrIds
    encoding_format: Literal["float", "base64"] | None = None  # None: float
    dimensions: PositiveInt | None = None  # only so many of the first ones, of length 1 again
    cache_salt: str | None = None  # prefixes are shared among equal ones
    priority: Annotated[int, Meta(ge=-1000, le=1000)] | None = None  # smaller goes first

    # No effect on the answer, by definition.
    user: str | None = None

    @property
    def inputs(self) -> list[str | list[int]]:
        """Texts, or token ids. Raises :class:`ApiError`."""
        return texts_or_ids(self.input, "input", MAX_INPUTS)


class Embedding(Struct, tag_field="object", tag="embedding", frozen=True):
    index: int  # of the input
    embedding: list[float] | str  # or base64 of float32 in little-endian order


class EmbeddingUsage(Struct, frozen=True):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(Struct, tag_field="object", tag="list", frozen=True):
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
