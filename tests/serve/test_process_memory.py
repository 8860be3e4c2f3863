"""Memory that a process has freed goes back to the system."""

from __future__ import annotations

import ctypes
import os

import pytest

from quire.serve.process_memory import resident_bytes, return_freed_memory

SIZE, COUNT = 4000, 20_000  # beyond what Python's own allocator takes


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not glibc")
def test_what_was_freed_below_something_in_use_is_given_back() -> None:
    pid = os.getpid()
    blocks = [bytearray(SIZE) for _ in range(COUNT)]
    kept = blocks[-1]
    del blocks
    before = resident_bytes(pid)
    return_freed_memory()
    assert before - resident_bytes(pid) > SIZE * COUNT // 2
    assert len(kept) == SIZE
