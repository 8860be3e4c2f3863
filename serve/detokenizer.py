"""Token ids to text, incrementally and in whole characters.

Every token is turned into the bytes it adds, once per vocabulary entry, and the bytes of a sequence
run through an incremental UTF-8 decoder. The cost per token is a table look-up whatever the tokens
are, and an incomplete character is simply what the decoder still holds.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, Final

from tokenizers import Tokenizer

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# An unfinished character is at most three bytes, so this many tokens always hold its start.
_CONTEXT_TOKENS: Final = 8


def byte_level_alphabet() -> dict[str, int]:
    """The characters that byte-level BPE writes bytes as (Radford et al. 2019, GPT-2).

    Printable Latin-1 stands for itself; the other bytes are moved to U+0100 and up, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + i): byte for i, byte in enumerate(moved)})
    return alphabet


_ALPHABET: Final = byte_level_alphabet()


def _decoder_types(tokenizer: Tokenizer) -> set[str]:
    """The types in the tokenizer's decoder, those inside a sequence included."""
    if tokenizer.decoder is None:
        return set()
    spec: dict[str, Any] = json.loads(tokenizer.decoder.__getstate__())
    return {spec["type"], *(part["type"] for part in spec.get("decoders", []))}


class TokenBytes(dict[int, bytes]):
    """What each token adds to the text that precedes it; filled on first use.

    Special tokens and ids outside the vocabulary add nothing.
    """

    def __init__(self, tokenizer: Tokenizer, *, with_special: bool = False) -> None:
        """``with_special``: special tokens add their names."""
        super().__init__()
        self._tokenizer = tokenizer
        types = _decoder_types(tokenizer)
        self._byte_level = "ByteLevel" in types
        self._byte_fallback = "ByteFallback" in types
        added = tokenizer.get_added_tokens_decoder()
        self._special = {
            token_id: token.content.encode() if with_special else b""
            for token_id, token in added.items()
            if token.special
        }

    def __missing__(self, token_id: int) -> bytes:
        self[token_id] = value = self._bytes_of(token_id)
        return value

    def at_start(self, token_id: int) -> bytes:
        """What the token adds as the first of a text, where some decoders drop a space."""
        if token_id in self._special:
            return self._special[token_id]
        alone = self._tokenizer.decode([token_id])
        return self[token_id] if "\ufffd" in alone else alone.encode()

    def _bytes_of(self, token_id: int) -> bytes:
        piece = self._tokenizer.id_to_token(token_id)
        if piece is None or token_id in self._special:
            return self._special.get(token_id, b"")
        if self._byte_level:
            try:
                return bytes(_ALPHABET[char] for char in piece)
            except KeyError:  # an added token, which stands for itself
                return piece.encode()
        if self._byte_fallback and (byte := _BYTE_PIECE.fullmatch(piece)):
            return bytes.fromhex(byte[1])
        # Decoded twice over, the second copy is free of what happens only at a text's start.
        alone = self._tokenizer.decode([token_id])
        return self._tokenizer.decode([token_id, token_id])[len(alone) :].encode()


class Detokenizer:
    """The text of one generated sequence; ``table`` says what tokens add to it.

    Invalid bytes become U+FFFD, one for each maximal part of a character (Unicode 3.9, table 3-8),
    as ``bytes.decode(errors="replace")`` does.
    """

    def __init__(self, table: TokenBytes, prompt_token_ids: Sequence[int]) -> None:
        self.table = table
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._started = any(table[token_id] for token_id in reversed(prompt_token_ids))
        # A prompt of token ids may end inside a character, which the first token then completes.
        self._decode(b"".join(table[token_id] for token_id in prompt_token_ids[-_CONTEXT_TOKENS:]))

    def push(self, token_ids: Iterable[int]) -> str:
        """The characters that these tokens complete."""
        table = self.table
        if self._started:
            return self._decode(b"".join([table[token_id] for token_id in token_ids]))
        pieces: list[bytes] = []
        for token_id in token_ids:
            pieces.append(table[token_id] if self._started else table.at_start(token_id))
            self._started = self._started or bool(table[token_id])
        return self._decode(b"".join(pieces))

    def flush(self) -> str:
        """What is held back of a character that was never finished: U+FFFD, or nothing."""
        return self._decode(b"", True)


class StopStringMatcher:
    """Finds the stop string that is completed first, and holds back what may still become one.

    One Knuth-Morris-Pratt automaton per stop string, so the work per character does not depend on
    the strings' lengths and the answer does not depend on how the text was cut into pieces. Of
    several completed by the same character the longest wins.
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self._patterns = [(stop, _failure_table(stop)) for stop in dict.fromkeys(stop_strings)]
        self._matched = [0] * len(self._patterns)  # characters of each stop string matched so far
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> tuple[str, bool]:
        """The text that is safe to show, and whether a stop string was found.

        Neither the stop string nor anything after it is ever returned.
        """
        held = self._held + text
        for end, char in enumerate(text, start=len(self._held) + 1):
            completed = 0
            for i, (stop, failure) in enumerate(self._patterns):
                matched = self._matched[i]
                while matched and stop[matched] != char:
                    matched = failure[matched]
                matched += stop[matched] == char
                if matched == len(stop):
                    completed = max(completed, matched)
                    matched = failure[matched]
                self._matched[i] = matched
            if completed:
                self._held = ""
                self.found = held[end - completed : end]
                return held[: end - completed], True
        keep = max(self._matched, default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], False

    def flush(self) -> str:
        """What was held back, now that nothing can follow it."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self._matched)
        return held


@lru_cache(maxsize=256)  # the sequences of a request have the same
def _failure_table(pattern: str) -> Sequence[int]:
    """For each matched length, the longest proper prefix that is also a suffix of the match."""
    table = [0] * (len(pattern) + 1)
    length = 0
    for end in range(1, len(pattern)):
        while length and pattern[length] != pattern[end]:
            length = table[length]
        length += pattern[length] == pattern[end]
        table[end + 1] = length
    return table
