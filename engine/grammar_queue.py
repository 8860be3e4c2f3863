"""Requests with grammars: they wait until these are compiled, then draw what these allow."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future
from concurrent.futures import wait as wait_for
from typing import NamedTuple

import numpy as np
from llguidance import LLMatcher

from quire.engine.errors import EngineError, GrammarError
from quire.engine.grammar import (
    Bitmask,
    GrammarCompiler,
    GrammarState,
    allow_only,
    forbid,
    mask_words,
)
from quire.engine.messages import GenerateRequest
from quire.engine.sequence import Sequence
from quire.engine.step.restrictions import ends_of_bad_words
from quire.engine.step_batch import Chunk, StepBatch

# How long an engine with nothing else to do waits for a grammar between two looks at its inbox.
_WAIT = 0.005  # seconds


class Masks(NamedTuple):
    """Which tokens the rows of a step may draw.

    Attributes:
        bits: (sampled rows, words) int32, a bit for each token that may be drawn.
        failed: sequences that cannot go on.
    """

    bits: Bitmask
    failed: list[tuple[Sequence, GrammarError]]


class GrammarQueue:
    """Holds requests until their grammars are compiled, and fills the masks of those that run."""

    def __init__(self, compiler: GrammarCompiler | None) -> None:
        """Without a compiler no request may have a grammar."""
        self._compiler = compiler
        self._waiting: dict[int, tuple[GenerateRequest, Future[LLMatcher]]] = {}

    def __len__(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    def begin(self, request: GenerateRequest) -> GrammarState | None:
        """The grammar of a request at its start; None: the request waits here for it.

        Raises:
            GrammarError: no grammars are taken, or this one cannot be compiled.
        """
        if self._compiler is None:
            raise GrammarError("this model takes no grammars")
        compiled = self._compiler.compile(request.grammar)
        if compiled.done():
            return self._compiler.new_state(compiled.result())
        self._waiting[request.request_id] = request, compiled
        return None

    def drop(self, request_id: int) -> bool:
        """Whether it was waiting here, and is no longer."""
        return self._waiting.pop(request_id, None) is not None

    def take(self, *, wait: bool) -> Iterator[tuple[GenerateRequest, GrammarState | EngineError]]:
        """Requests that need not wait any longer, and what became of their grammars.

        Args:
            wait: a moment, for the first.
        """
        if self._compiler is None or not self._waiting:
            return
        futures = [compiled for _, compiled in self._waiting.values()]
        done = wait_for(futures, _WAIT if wait else 0, FIRST_COMPLETED).done
        for request, compiled in list(self._waiting.values()):
            if compiled not in done:
                continue
            del self._waiting[request.request_id]
            try:
                yield request, self._compiler.new_state(compiled.result())
            except EngineError as error:
                yield request, error

    def fill_masks(self, batch: StepBatch) -> Masks:
        """What each sampled row may draw, and the sequences whose grammars have failed.

        On any thread, as long as no token is accepted meanwhile.
        """
        assert self._compiler is not None, "a batch with grammars that nobody has compiled"
        rows = batch.sampled
        states = [None if chunk.sequence.finished else chunk.grammar for chunk in rows]
        masks = np.empty((len(rows), mask_words(self._compiler.vocab_size)), np.int32)
        self._compiler.fill_masks(states, masks)
        failed = []
        for chunk, state, mask in zip(rows, states, masks, strict=True):
            if state is None:
                continue
            try:
                state.check()
            except GrammarError as error:
                failed.append((chunk.sequence, error))
            _restrict(chunk, mask)
        return Masks(masks, failed)


def _restrict(chunk: Chunk, mask: Bitmask) -> None:
    """Take out of ``mask`` what the request itself forbids, unless nothing would be left."""
    if allowed := chunk.sampling.allowed_token_ids:
        allow_only(mask, allowed)
    elif banned := [*chunk.banned_token_ids, *ends_of_bad_words(chunk.sequence)]:
        forbid(mask, banned)
