"""Which tokens a request's grammar allows next.

llguidance (https://github.com/guidance-ai/llguidance) does the work, without Python's lock: a
grammar is compiled once, each sequence runs a copy, and the masks of a step are filled in parallel.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor, LLMatcher, LLTokenizer

from quire.engine.errors import GrammarError
from quire.engine.grammar_tokens import PARSER_LIMITS

Bitmask = npt.NDArray[np.int32]

_ALL_ALLOWED: Final = -1  # 32 set bits


def mask_words(vocab_size: int) -> int:
    """The 32-bit words of one row of a bitmask."""
    return -(-vocab_size // 32)


class GrammarState:
    """How far one sequence has come in its grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def accept(self, token_id: int) -> None:
        """Take the next token. Raises :class:`GrammarError` if it is not allowed here."""
        self._matcher.consume_token(token_id)
        self.check()

    @property
    def is_finished(self) -> bool:
        """Whether the text is complete and nothing but its end can follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def check(self) -> None:
        """Raise :class:`GrammarError` if the grammar failed, here or while a mask was filled."""
        if self._matcher.is_error():
            raise GrammarError(f"the grammar failed: {_one_line(self._matcher.get_error())}")


class GrammarCompiler:
    """Compiles grammars off the calling thread, keeps the newest, and fills masks.

    Args:
        tokenizer: of :func:`quire.engine.grammar_tokens.make_tokenizer`, as wide as the logits.
        max_kept: compiled grammars that are kept for the next request.
        threads: that fill masks; by default as many as leave the model's own work half a machine.
    """

    def __init__(
        self, tokenizer: LLTokenizer, *, max_kept: int = 128, threads: int | None = None
    ) -> None:
        self.vocab_size = tokenizer.vocab_size
        self._tokenizer = tokenizer
        self._max_kept = max_kept
        self._kept: OrderedDict[str, Future[LLMatcher]] = OrderedDict()
        self._compiling = ThreadPoolExecutor(1, "grammar")
        self._executor = LLExecutor(threads or max(1, (os.cpu_count() or 2) // 2))

    def compile(self, grammar: str) -> Future[LLMatcher]:
        """The grammar, ready for :meth:`new_state`, now or later; asked from one thread only.

        The future raises :class:`GrammarError` where the grammar is wrong or too large.
        """
        prototype = self._kept.get(grammar)
        if prototype is None:
            prototype = self._compiling.submit(self._compile, grammar)
            self._kept[grammar] = prototype
            while len(self._kept) > self._max_kept:
                self._kept.popitem(last=False)
        self._kept.move_to_end(grammar)
        return prototype

    def new_state(self, prototype: LLMatcher) -> GrammarState:
        """The start of a compiled grammar."""
        return GrammarState(prototype.deep_copy())

    def fill_masks(self, states: Sequence[GrammarState | None], out: Bitmask) -> None:
        """Write which tokens each row may draw; takes no Python lock while it works.

        A state may fail over this: its row then allows everything, and its
        :meth:`GrammarState.check` raises.

        Args:
            states: R of them; None allows everything.
            out: (R, ceil(vocab / 32)) int32, C-contiguous. Bit ``t % 32`` of word ``t // 32`` is
                set where token ``t`` is allowed.
        """
        assert out.shape == (len(states), mask_words(self.vocab_size)), out.shape
        assert out.flags["C_CONTIGUOUS"]
        assert out.dtype == np.int32
        rows = [(state._matcher, row) for row, state in enumerate(states) if state is not None]
        if len(rows) < len(states):
            out[[row for row, state in enumerate(states) if state is None]] = _ALL_ALLOWED
        if not rows:
            return
        self._executor.unsafe_compute_mask_ptr(rows, out.ctypes.data, out.strides[0], len(states))
        for matcher, row in rows:
            if matcher.is_error():
                out[row] = _ALL_ALLOWED

    def _compile(self, grammar: str) -> LLMatcher:
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=PARSER_LIMITS)
        # The first mask builds much of what every copy needs.
        matcher.compute_bitmask()
        GrammarState(matcher).check()
        return matcher


def forbid(row: Bitmask, token_ids: Sequence[int]) -> None:
    """Take tokens out of one row of a bitmask, unless nothing would be left."""
    before = row.copy()
    words = row.view(np.uint32)
    for token in token_ids:
        words[token // 32] &= np.uint32(0xFFFFFFFF ^ (1 << token % 32))
    if not row.any():
        row[:] = before


def allow_only(row: Bitmask, token_ids: Sequence[int]) -> None:
    """Take all other tokens out of one row of a bitmask, unless nothing would be left."""
    kept = np.zeros_like(row).view(np.uint32)
    for token in token_ids:
        kept[token // 32] |= np.uint32(1 << token % 32)
    kept &= row.view(np.uint32)
    if kept.any():
        row[:] = kept.view(np.int32)


def _one_line(message: str) -> str:
    return " ".join(message.split())
