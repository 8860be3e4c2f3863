"""Marker tokens inside text: each is one character that no decoded text can hold.

The markup of tool calls and reasoning consists of added tokens in some tokenizers and of ordinary
text in others. A token that is a marker becomes a lone surrogate, which UTF-8 cannot encode, so
parsers see one string, and text that merely looks like a marker is never taken for the token.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from tokenizers import Tokenizer

_FIRST: Final = 0xD800
_LIMIT: Final = 0x800  # surrogates that exist


class Markers:
    """The texts among ``wanted`` that are one added token of ``tokenizer`` each.

    ``char_of`` maps their token ids to their characters. Without a tokenizer there are none, and
    all markup is text.
    """

    def __init__(self, wanted: Iterable[str] = (), tokenizer: Tokenizer | None = None) -> None:
        self.char_of: dict[int, str] = {}
        self._shown: dict[int, str] = {}  # for str.translate
        self._chars: dict[str, str] = {}
        self._pattern: re.Pattern[str] | None = None
        if tokenizer is None:
            return
        texts = set(wanted)
        added = tokenizer.get_added_tokens_decoder()
        for token_id, token in sorted(added.items()):
            if token.content in texts and len(self._chars) < _LIMIT:
                char = chr(_FIRST + len(self._chars))
                self.char_of[token_id] = char
                self._chars[token.content] = char
                self._shown[ord(char)] = "" if token.special else token.content
        by_length = sorted(map(re.escape, self._chars), key=len, reverse=True)
        self._pattern = re.compile("|".join(by_length)) if by_length else None

    def fold(self, markup: str) -> str:
        """A family's markup as parsers meet it: its marker tokens as their characters."""
        if self._pattern is None:
            return markup
        return self._pattern.sub(lambda match: self._chars[match[0]], markup)

    def show(self, text: str) -> str:
        """``text`` as a client sees it: special tokens vanish, other markers are spelled out."""
        return text.translate(self._shown) if self._shown and not text.isascii() else text

    @staticmethod
    def is_marker(char: str) -> bool:
        return "\ud800" <= char <= "\udfff"
