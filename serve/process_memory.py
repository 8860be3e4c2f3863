"""How much memory a process has in use, without a library and in microseconds."""

from __future__ import annotations

import ctypes
import functools
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


def resident_bytes(pid: int) -> int:
    """Memory of process ``pid`` that is in use, in bytes; 0 if the process is gone."""
    if sys.platform == "darwin":
        return _darwin_resident_bytes(pid)
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_bytes().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def return_freed_memory() -> None:
    """Give back to the system what this process has freed, where the C library would keep it.

    glibc's heaps only shrink at their ends. A front end that reads one model after the other, in
    several threads, would come to hold a little more with each.
    """
    if (trim := _malloc_trim()) is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    """None where the C library has no such function."""
    if sys.platform == "darwin":
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


@functools.cache
def _proc_pid_rusage() -> Callable[..., int]:
    return ctypes.CDLL("/usr/lib/libproc.dylib").proc_pid_rusage


def _darwin_resident_bytes(pid: int) -> int:
    words = (ctypes.c_uint64 * _RUSAGE_WORDS)()
    if _proc_pid_rusage()(pid, _RUSAGE_INFO_V0, ctypes.byref(words)) != 0:
        return 0
    return words[_FOOTPRINT_WORD]
