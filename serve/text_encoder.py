"""Texts to token ids and back, without holding up the streams that run meanwhile.

``Tokenizer.encode`` and ``decode`` keep Python's lock for as long as they work, so that a thread is
no help; their batch forms let go of it. Short texts are encoded where they are, long ones in one
of a few threads, and a text that cannot fit the context whatever its tokens are is refused unread.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

from tokenizers import Tokenizer

from quire.serve.detokenizer import byte_level_alphabet
from quire.serve.process_memory import return_freed_memory
from quire.serve.token_cache import TokenCache

# Characters, or token ids, up to which the event loop does the work: about a millisecond.
LONG_TEXT: Final = 4096
# Texts from which the memory that encoding took is worth giving back: 150 bytes a character.
_HUGE_TEXT: Final = 2**20
# Encodes at once. The model and the streams need the other cores.
_MAX_THREADS: Final = max(1, min(4, (os.cpu_count() or 2) // 2))

T = TypeVar("T")


class TextEncoder:
    """A tokenizer for use on an event loop. Threads are started with the first long text."""

    def __init__(self, tokenizer: Tokenizer, max_threads: int = _MAX_THREADS) -> None:
        self.tokenizer = tokenizer
        self.bytes_per_token = _most_bytes_per_token(tokenizer)  # None: there is no most
        self._parts = TokenCache(tokenizer)
        self._threads = ThreadPoolExecutor(max_threads, thread_name_prefix="encode")
        # Texts that take much memory are read one after another.
        self._huge = asyncio.Semaphore(1)

    def fewest_tokens(self, text: str) -> int:
        """How many tokens ``text`` has at least, by its bytes alone; 0 where nothing is known."""
        return fewest_tokens(text, self.bytes_per_token)

    async def encode(
        self, texts: Sequence[str], *, add_special_tokens: bool = True
    ) -> list[list[int]]:
        """Token ids of each text, with the special tokens the tokenizer adds unless told not to."""
        return await self.run(
            sum(map(len, texts)), lambda: self.encode_here(texts, add_special_tokens)
        )

    async def encode_conversation(self, text: str, salt: str = "") -> list[int]:
        """Token ids of what a chat template has written, of which the parts are kept.

        Special tokens are where ``text`` has them. ``salt``: see :meth:`TokenCache.encode`.
        """
        if not self._parts.usable:
            [ids] = await self.encode([text], add_special_tokens=False)
            return ids
        return await self.run(len(text), lambda: self._parts.encode(text, salt))

    def encode_here(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        """Like :meth:`encode`, on the calling thread."""
        encodings = self.tokenizer.encode_batch_fast(
            list(texts), add_special_tokens=add_special_tokens
        )
        return [encoding.ids for encoding in encodings]

    async def decode(self, token_ids: list[int]) -> str:
        """The text of ``token_ids``, special tokens included."""
        [text] = await self.run(
            len(token_ids),
            lambda: self.tokenizer.decode_batch([token_ids], skip_special_tokens=False),
        )
        return text

    async def run(self, size: int, work: Callable[[], T]) -> T:
        """Do ``work`` on a text of ``size`` characters here, or in a thread if it is long.

        Waits for a thread in the order of the calls; a call that is cancelled meanwhile is never
        started.
        """
        if size <= LONG_TEXT:
            return work()
        if size < _HUGE_TEXT:
            return await self._run_in_thread(work)
        async with self._huge:
            try:
                return await self._run_in_thread(work)
            finally:
                self._threads.submit(return_freed_memory)

    async def _run_in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def fewest_tokens(text: str, bytes_per_token: int | None) -> int:
    """As :meth:`TextEncoder.fewest_tokens`, for the ``bytes_per_token`` of an encoder."""
    if bytes_per_token is None:
        return 0
    return -(-len(text.encode(errors="replace")) // bytes_per_token)


def _most_bytes_per_token(tokenizer: Tokenizer) -> int | None:
    """How many bytes of text one token stands for at most, or None if there is no such number.

    There is one where every character of a text ends in a token of its own spelling: byte-pair
    encoding without unknown tokens, behind steps that only mark, split or compose characters.
    """
    spec: dict[str, Any] = json.loads(tokenizer.to_str())
    model = spec["model"]
    steps = [*_steps(spec["normalizer"]), *_steps(spec["pre_tokenizer"])]
    added = tokenizer.get_added_tokens_decoder().values()
    if (
        model["type"] != "BPE"
        or not all(map(_keeps_text, steps))
        # Such a token swallows any number of spaces beside it.
        or any(token.lstrip or token.rstrip for token in added)
    ):
        return None
    pieces = model["vocab"]
    byte_level = any(step["type"] == "ByteLevel" for step in steps)
    alphabet = byte_level_alphabet() if byte_level else [f"<0x{byte:02X}>" for byte in range(256)]
    if not (byte_level or model["byte_fallback"]) or not all(byte in pieces for byte in alphabet):
        return None  # unknown characters side by side are one token, or none
    # What the byte-level alphabet writes as one character is one byte.
    longest = max(map(len, pieces)) if byte_level else max(map(_num_bytes, pieces))
    longest = max(longest, *(_num_bytes(token.content) for token in added), 1)
    # Composing shortens a text to a third at most (Unicode Standard Annex 15, table 5, read
    # backwards), and compatibility forms to a quarter.
    return 4 * longest if any(step["type"] in _COMPOSING for step in steps) else longest


_COMPOSING: Final = ("NFC", "NFKC", "NFD", "NFKD")
_MARKING: Final = ("ByteLevel", "Digits", "Metaspace", "Prepend", *_COMPOSING)


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, those inside a sequence included."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        children = part.get("normalizers") or part.get("pretokenizers") or []
        return [step for child in children for step in _steps(child)]
    return [part]


def _keeps_text(step: dict[str, Any]) -> bool:
    if step["type"] == "Split":
        return bool(step["behavior"] != "Removed")
    if step["type"] == "Replace":
        pattern = step["pattern"].get("String")
        return pattern is not None and _num_bytes(step["content"]) >= len(pattern.encode())
    return step["type"] in _MARKING


def _num_bytes(piece: str) -> int:
    """At most, of the text that a piece stands for: its space mark is a space, or itself."""
    return len(piece.encode())
