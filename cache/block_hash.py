"""Hashes of full KV blocks, each chained to that of the block before.

A block's hash covers every token up to its end, so equal hashes mean equal keys and values. It
decides whose text is reused, hence a cryptographic hash (blake2b) rather than a fast one.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from typing import NewType

BlockHash = NewType("BlockHash", bytes)

_DIGEST_SIZE = 16  # bytes


def root_hash(model: str, salt: str = "", adapter: str = "") -> BlockHash:
    """The parent of a sequence's first block; different roots never share blocks."""
    digest = hashlib.blake2b(digest_size=_DIGEST_SIZE)
    for part in (model, salt, adapter):
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return BlockHash(digest.digest())


def extend_chain(
    hashes: list[BlockHash], root: BlockHash, token_ids: Sequence[int], block_size: int
) -> None:
    """Append to ``hashes`` those of all full blocks of ``token_ids`` that it lacks."""
    first, end = len(hashes), len(token_ids) // block_size
    if first >= end:
        return
    # All at once: a prompt may have 10,000 blocks.
    tokens = array("I", token_ids[first * block_size : end * block_size])
    data, size = tokens.tobytes(), tokens.itemsize * block_size
    parent = hashes[-1] if hashes else root
    for start in range(0, len(data), size):
        digest = hashlib.blake2b(parent + data[start : start + size], digest_size=_DIGEST_SIZE)
        parent = BlockHash(digest.digest())
        hashes.append(parent)
