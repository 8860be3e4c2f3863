"""Names for full KV blocks: a chain of hashes over token ids.

A block's name covers every token before it, so equal names mean equal keys and values. The name
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
    """Append to ``hashes`` the names of all full blocks of ``token_ids`` that it lacks."""
    for index in range(len(hashes), len(token_ids) // block_size):
        parent = hashes[-1] if hashes else root
        tokens = array("I", token_ids[index * block_size : (index + 1) * block_size])
        hashes.append(
            BlockHash(hashlib.blake2b(parent + tokens.tobytes(), digest_size=_DIGEST_SIZE).digest())
        )
