"""Prompts that ask for what stands between two texts, in the tokens that models learn it with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from tokenizers import Tokenizer


class FillTokens(NamedTuple):
    """Token ids. The prompt is prefix, the text before, suffix, the text behind, middle; with
    ``suffix_first`` the suffix and its text come first."""

    prefix: int
    suffix: int
    middle: int | None  # None: the prefix comes last, and the answer goes on from there
    suffix_first: bool = False

    def prompt(self, before: Sequence[int], behind: Sequence[int]) -> list[int]:
        first, second = [self.prefix, *before], [self.suffix, *behind]
        if self.suffix_first:
            first, second = second, first
        return [*first, *second, *([] if self.middle is None else [self.middle])]


# Prefix, suffix and middle, as families write them.
_SPELLINGS: Final[tuple[tuple[str, str, str | None, bool], ...]] = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", False),  # Qwen, CodeGemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>", False),  # StarCoder, Granite
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>", False),  # SantaCoder
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>", False),  # DeepSeek
    ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>", False),  # GLM
    ("▁<PRE>", "▁<SUF>", "▁<MID>", False),  # CodeLlama
    ("[PREFIX]", "[SUFFIX]", None, True),  # Codestral
)


def find_fill_tokens(tokenizer: Tokenizer) -> FillTokens | None:
    """None where the model has no such tokens."""
    for prefix, suffix, middle, suffix_first in _SPELLINGS:
        first, second = tokenizer.token_to_id(prefix), tokenizer.token_to_id(suffix)
        last = None if middle is None else tokenizer.token_to_id(middle)
        if first is not None and second is not None and (last is None) == (middle is None):
            return FillTokens(first, second, last, suffix_first)
    return None
