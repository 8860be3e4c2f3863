"""Token ids of the parts of a conversation, so that a turn encodes only what is new of it.

An agent sends all of its conversation with every turn; to encode 200,000 tokens takes a third of a
second. Special tokens cut a text before anything else looks at it, so each part from one special
token to the next has ids of its own, whatever stands around it. Whether that is so for a tokenizer
is tried out when it is loaded.
"""

from __future__ import annotations

import re
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterator
from hashlib import blake2b
from typing import Final

from tokenizers import Tokenizer

MAX_TOKENS: Final = 2 << 20  # kept, of four bytes each: ten conversations of 200,000
# Characters. Fewer take less than half a millisecond, and would be many small things to keep.
SHORTEST: Final = 1024
# Begin and end with what a neighbour might change: spaces, line ends, accents, parts of words.
_TRIED: Final = ("", "a", " a ", "\nword", "é ", "\u0301x", "12", "user\nHi. \n\n", "  \n", "'s")


class TokenCache:
    """Any thread may encode. ``usable`` is False where a text has to be encoded as a whole.

    Those used longest ago are forgotten. Texts are not kept, but digests of them.
    """

    def __init__(
        self, tokenizer: Tokenizer, max_tokens: int = MAX_TOKENS, shortest: int = SHORTEST
    ) -> None:
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._shortest = shortest
        self._num_tokens = 0
        self._parts: OrderedDict[bytes, array[int]] = OrderedDict()
        self._lock = threading.Lock()
        self._starts = _starts_of(tokenizer)
        self.usable = self._starts is not None and self._is_independent()

    def encode(self, text: str, salt: str = "") -> list[int]:
        """As the tokenizer does without adding special tokens.

        Who has another ``salt`` cannot tell by the time it takes what has been encoded before.
        """
        key = blake2b(salt.encode(errors="surrogatepass")).digest()
        ids: list[int] = []
        short = ""  # parts in a row, which are encoded together
        for part in self._split(text):
            if len(part) < self._shortest:
                short += part
                continue
            ids += self._encode(short) if short else []
            short = ""
            data = part.encode(errors="surrogatepass")
            digest = blake2b(data, key=key, digest_size=16).digest()
            ids += self._find(digest) or self._keep(digest, self._encode(part))
        return ids + self._encode(short) if short else ids

    def _find(self, digest: bytes) -> array[int] | None:
        with self._lock:
            found = self._parts.get(digest)
            if found is not None:
                self._parts.move_to_end(digest)
            return found

    def _keep(self, digest: bytes, ids: list[int]) -> list[int]:
        with self._lock:
            if digest not in self._parts and len(ids) <= self._max_tokens:
                self._parts[digest] = array("I", ids)
                self._num_tokens += len(ids)
            while self._num_tokens > self._max_tokens:
                _, oldest = self._parts.popitem(last=False)
                self._num_tokens -= len(oldest)
        return ids

    def _encode(self, text: str) -> list[int]:
        # The batch form lets go of Python's lock.
        [encoding] = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        ids: list[int] = encoding.ids
        return ids

    def _split(self, text: str) -> Iterator[str]:
        """Parts that begin with a special token each, but for the first."""
        assert self._starts is not None
        begin = 0
        for match in self._starts.finditer(text):
            if match.start() > begin:
                yield text[begin : match.start()]
            begin = match.start()
        yield text[begin:]

    def _is_independent(self) -> bool:
        """Whether parts have the ids that they have within a whole."""
        added = self._tokenizer.get_added_tokens_decoder().values()
        token = next(token.content for token in added if not token.normalized)
        for before in _TRIED:
            for after in _TRIED:
                parts = [before, token + after, token + before]
                whole = self._encode("".join(parts))
                if whole != [id for part in parts for id in self._encode(part)]:
                    return False
        return True


def _starts_of(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Finds the tokens that are cut out of a text first; None where there are none, or where they
    take something of their neighbours with them."""
    added = [token for token in tokenizer.get_added_tokens_decoder().values() if token.content]
    first = [token for token in added if not token.normalized]
    if not first or any(token.lstrip or token.rstrip or token.single_word for token in first):
        return None
    # Of those that begin at the same place the longest is the one.
    contents = sorted((token.content for token in first), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, contents)))
