"""How a request wants its tokens drawn, as the engine takes it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Final

from tokenizers import Tokenizer

from quire.engine.messages import Ready, SamplingParams
from quire.serve.errors import invalid
from quire.serve.openai_protocol import GenerationRequest
from quire.serve.served_model import ServedModel

_MAX_BAD_WORD_TOKENS: Final = 64
_MAX_BAD_WORD: Final = 256  # characters: encoding holds up everybody's events


def sampling_of(
    body: GenerationRequest, model: ServedModel, info: Ready, banned_token_ids: Sequence[int] = ()
) -> SamplingParams:
    """The request's parameters, and the model's own where the request is silent.

    Raises :class:`ApiError` (400) for tokens that the model does not have.
    """
    default = model.default_sampling
    top_k = default.top_k if body.top_k is None else max(body.top_k, 0)  # -1 says "off" too
    top_p = default.top_p if body.top_p is None else body.top_p
    if top_p == 0:
        top_k, top_p = 1, 1.0
    _check_tokens("logit_bias", body.logit_bias or (), info.vocab_size)
    _check_tokens("allowed_token_ids", body.allowed_token_ids or (), info.vocab_size)
    return SamplingParams(
        temperature=default.temperature if body.temperature is None else body.temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=default.min_p if body.min_p is None else body.min_p,
        seed=body.seed,
        logit_bias=body.logit_bias or {},
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=body.repetition_penalty or 1.0,
        allowed_token_ids=sorted(set(body.allowed_token_ids or ())),
        # A word of a token that has no logit is never drawn.
        bad_words=[
            word
            for word in (
                *([token] for token in banned_token_ids),
                *_bad_words(model.encoder.tokenizer, body.bad_words or ()),
            )
            if max(word) < info.vocab_size
        ],
    )


def seed_of_choice(seed: int | None, choice: int) -> int | None:
    """The first answer to a prompt draws with the request's seed, the others with a hash of it and
    of their number."""
    if seed is None or choice == 0:
        return seed
    digest = hashlib.blake2b(f"{seed} {choice}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _bad_words(tokenizer: Tokenizer, words: Sequence[str]) -> list[list[int]]:
    """The tokens of each word, at the start of a text and behind a space."""
    found: list[list[int]] = []
    for index, word in enumerate(words):
        if len(word) > _MAX_BAD_WORD:
            param = f"bad_words[{index}]"
            raise invalid(param, f"{param} has more than {_MAX_BAD_WORD} characters.")
        for text in (word, f" {word.lstrip()}"):
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            if len(ids) > _MAX_BAD_WORD_TOKENS:
                param = f"bad_words[{index}]"
                raise invalid(param, f"{param} has more than {_MAX_BAD_WORD_TOKENS} tokens.")
            if ids and ids not in found:
                found.append(ids)
    return found


def _check_tokens(param: str, token_ids: Iterable[int], vocab_size: int) -> None:
    if (largest := max(token_ids, default=0)) >= vocab_size:
        raise invalid(param, f"{param} holds {largest}; the model has {vocab_size} tokens.")
