"""What requests' first looks into the prefix cache found, and why they found no more."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from quire.cache.sequence_cache import Prefix
from quire.engine.messages import Lookups
from quire.engine.sequence import Sequence

logger = logging.getLogger(__name__)


@contextmanager
def lookups_unheard() -> Iterator[None]:
    """Context manager: within it, no lookup is logged, such as those of a warm-up."""
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = False


def count_lookup(
    lookups: Lookups, sequence: Sequence, prefix: Prefix, block_size: int, *, recurrent: bool
) -> None:
    """Add a request's first look to ``lookups``; log it if pages alone had given more tokens."""
    num_tokens = len(sequence.token_ids)
    start, num_pages = len(prefix.blocks) * block_size, prefix.num_pages * block_size
    evicted, new = sequence.cache.blocks.misses(prefix.num_pages, sequence.token_ids)
    lookups.queries += num_tokens
    lookups.hits += start
    lookups.missed_evicted += evicted * block_size
    lookups.missed_new += new * block_size
    lookups.missed_tail += num_tokens - num_pages - (evicted + new) * block_size
    if num_pages == start:
        return
    if recurrent:
        lookups.missed_state += num_pages - start
    else:
        lookups.missed_window += num_pages - start
    logger.info(
        f"request {sequence.request.request_id}: {start:,} of {num_tokens:,} prompt tokens are "
        f"cached: pages {num_pages:,}, {'state' if recurrent else 'window'} {start:,}"
    )
