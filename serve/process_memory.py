"""How much memory a process has in use, without a library and in microseconds."""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path

# rusage_info_v0 of <sys/resource.h>: a UUID of 16 bytes, then 64-bit numbers, the eighth of which
# is ri_phys_footprint. Unlike the resident size that counts memory that has been compressed.
_RUSAGE_INFO_V0 = 0
_UUID_WORDS = 2
_FOOTPRINT_WORD = _UUID_WORDS + 7
_RUSAGE_WORDS = 64  # more than any version of the struct has
_M_ARENA_MAX = -8  # of <malloc.h>


def resident_bytes(pid: int) -> int:
    """Memory of process ``pid`` that is in use, in bytes; 0 if the process is gone."""
    if sys.platform == "darwin":
        return _darwin_resident_bytes(pid)
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_bytes().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def share_one_heap() -> None:
    """Let all threads of this process allocate from one heap; call it before any is started.

    glibc gives each thread a heap of its own, and leaves there what the thread has freed. A front
    end that reads one model after the other, in whatever thread is free, would come to hold pieces
    of each in heaps of several threads.
    """
    if (set_option := _glibc("mallopt")) is not None:
        set_option(_M_ARENA_MAX, 1)


def return_freed_memory() -> None:
    """Give back to the system what this process has freed, where the C library would keep it.

    glibc's heaps only shrink at their ends.
    """
    if (trim := _glibc("malloc_trim")) is not None:
        trim(0)


def forget_unreachable() -> None:
    """The same, and first free what only refers to itself.

    Python looks for such objects late where few are made. It takes some 30 ms, so it is for when
    something large has gone.
    """
    gc.collect()
    return_freed_memory()


@functools.cache
def _glibc(name: str) -> Callable[..., int] | None:
    """One of its functions; None where the C library is another that has none of that name."""
    if sys.platform == "darwin":
        return None
    return getattr(ctypes.CDLL(None), name, None)


@functools.cache
def _proc_pid_rusage() -> Callable[..., int]:
    return ctypes.CDLL("/usr/lib/libproc.dylib").proc_pid_rusage


def _darwin_resident_bytes(pid: int) -> int:
    words = (ctypes.c_uint64 * _RUSAGE_WORDS)()
    if _proc_pid_rusage()(pid, _RUSAGE_INFO_V0, ctypes.byref(words)) != 0:
        return 0
    return words[_FOOTPRINT_WORD]
