"""What requests' first looks into the prefix cache found, and why they found no more."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from quire.cache.sequence_cache import Prefix
from quire.engine.sequence import Sequence

logger = logging.getLogger(__name__)


@contextmanager
def lookups_unheard() -> Iterator[None]:
    """Meanwhile none is logged: those of a warm-up, which nobody has asked for."""
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = False


@dataclass(slots=True)
class Lookups:
    """Prompt tokens, each counted once for a request.

    Attributes:
        queries: looked up.
        hits: of those, found.
        missed_state, missed_window: whose pages were found, but no state of recurrent layers
            behind them, or no whole window.
        missed_evicted: in blocks that had been evicted.
        missed_new: in blocks that had never been cached.
        missed_tail: behind the last full block, or the last token.
    """

    queries: int = 0
    hits: int = 0
    missed_state: int = 0
    missed_window: int = 0
    missed_evicted: int = 0
    missed_new: int = 0
    missed_tail: int = 0

    def count(
        self, sequence: Sequence, prefix: Prefix, block_size: int, *, recurrent: bool
    ) -> None:
        num_tokens = len(sequence.token_ids)
        start, num_pages = len(prefix.blocks) * block_size, prefix.num_pages * block_size
        evicted, new = sequence.cache.blocks.misses(prefix.num_pages, sequence.token_ids)
        self.queries += num_tokens
        self.hits += start
        self.missed_evicted += evicted * block_size
        self.missed_new += new * block_size
        self.missed_tail += num_tokens - num_pages - (evicted + new) * block_size
        if num_pages == start:
            return
        if recurrent:
            self.missed_state += num_pages - start
        else:
            self.missed_window += num_pages - start
        logger.info(
            f"request {sequence.request.request_id}: {start:,} of {num_tokens:,} prompt tokens are "
            f"cached: pages {num_pages:,}, {'state' if recurrent else 'window'} {start:,}"
        )
