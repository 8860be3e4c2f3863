"""OpenBLAS for MLX's CPU backend on Linux: found, loaded, and with the right kernels.

MLX's Linux wheels carry the reference BLAS, whose matrix products are some 30 times slower.
"""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path

_LIBRARIES = ("libopenblas.so.0", "libopenblas.so", "libopenblasp.so.0")
_CORE_TYPE = "OPENBLAS_CORETYPE"
# What OpenBLAS falls back to on x86-64 processors newer than itself: kernels from before AVX, five
# times slower than what the processor can do.
_FALLBACKS = {"prescott", "core2", "generic", "unknown"}
_PROBE = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
library.openblas_get_corename.restype = ctypes.c_char_p
print(library.openblas_get_corename().decode())
"""


def load_openblas() -> str:
    """Make OpenBLAS's symbols take precedence over MLX's own; returns what happened.

    Must be called before mlx is imported.
    """
    if "mlx.core" in sys.modules:
        raise RuntimeError("OpenBLAS must be loaded before mlx is imported")
    for name in _LIBRARIES:
        core = _choose_core(name)
        if core is None:
            continue
        ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        return f"matrix products on the CPU use OpenBLAS ({name}, {core} kernels)"
    return (
        "OpenBLAS was not found: matrix products on the CPU are some 30 times slower than they "
        "could be; install libopenblas (Debian: libopenblas0-pthread, Fedora: openblas)"
    )


def _choose_core(library: str) -> str | None:
    """Which kernels ``library`` will use, set right if it fell back; None if it cannot be loaded.

    The choice is made when the library is loaded, so another process asks what it would be.
    """
    core = _probe(library)
    if core is None or _CORE_TYPE in os.environ or core.lower() not in _FALLBACKS:
        return core
    better = _core_for(_cpu_flags())
    if better is None:
        return core
    os.environ[_CORE_TYPE] = better
    return _probe(library)


def _probe(library: str) -> str | None:
    result = subprocess.run(
        [sys.executable, "-c", _PROBE, library], capture_output=True, text=True, check=False
    )
    return result.stdout.strip() or None


def _core_for(flags: set[str]) -> str | None:
    """OpenBLAS's name for kernels that a processor with these features runs."""
    if {"avx512f", "avx512dq", "avx512bw", "avx512vl"} <= flags:
        return "SKYLAKEX"
    if {"avx2", "fma"} <= flags:
        return "HASWELL"
    return None


def _cpu_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not info.exists():
        return set()
    for line in info.read_text().splitlines():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()
