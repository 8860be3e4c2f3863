"""What the front end, which checks grammars, and the worker, which runs them, have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from llguidance import LLParserLimits, LLTokenizer

# A grammar that needs more is an error of its own request: at its start, where the front end sees
# it too, or while it runs.
PARSER_LIMITS: Final = LLParserLimits(
    max_items_in_row=5_000,  # four for each optional property of one object
    step_lexer_fuel=50_000,  # some 4 ms of one mask
    max_lexer_states=50_000,  # of 1 to 2 kB each
    verbose_errors=False,  # the client's schema has no business in a log
)


def make_tokenizer(
    tokenizer_json: str, eos_token_ids: Sequence[int], vocab_size: int | None = None
) -> LLTokenizer:
    """The tokenizer as grammars see it: the bytes of each token, and which tokens are markers.

    Every added token is a marker, special or not: grammars name it, and text never contains it.

    Args:
        tokenizer_json: a tokenizer of the tokenizers library, serialised or as the path of a file.
        eos_token_ids: what ends a text; allowed by a grammar wherever it may end.
        vocab_size: the width of the model's logits; None: the tokenizer's own vocabulary.

    Raises:
        ValueError: llguidance cannot read this kind of tokenizer.
    """
    return LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=list(eos_token_ids) or None)
