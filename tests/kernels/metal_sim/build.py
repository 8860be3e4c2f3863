"""Compiles Metal texts as C++, each distinct one once."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from metal_sim.text import MetalText, cpp_text

_HERE = Path(__file__).parent
SHIM = _HERE / "shim"

# Metal is C++14 with extensions: what only later standards have must not compile here either.
_KERNEL_FLAGS = (
    "-std=c++14",
    "-pedantic-errors",
    "-O1",
    "-g1",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    # What the first notices too, whose checks would take 40% of the time to compile.
    "-fno-sanitize=null,object-size,pointer-overflow,vptr",
    "-fno-sanitize-recover=all",
    "-Wno-attributes",
    "-Wno-unknown-pragmas",
)
_RUNTIME_FLAGS = ("-std=c++17", "-O2")
if sys.platform == "darwin":
    # Its <ucontext.h> wants the first, which hides what the second shows again. Of a whole file:
    # they change the layout of a context. Never run there yet.
    _RUNTIME_FLAGS += ("-D_XOPEN_SOURCE", "-D_DARWIN_C_SOURCE")

_locks: dict[Path, threading.Lock] = {}
_locks_lock = threading.Lock()


class CompileError(RuntimeError):
    """The compiler refuses the text; its message says why."""


def build(text: MetalText, name: str, *, ucontext: bool = False) -> Path:
    """The executable of ``text``; it is kept between runs, in a folder of this user.

    Args:
        ucontext: change stacks by swapcontext(), as where the processor is not an x86-64.

    Raises:
        CompileError: the text is not valid.
        RuntimeError: no C++ compiler is installed.
    """
    flags = [*_RUNTIME_FLAGS, "-DMETAL_SIM_UCONTEXT"] if ucontext else _RUNTIME_FLAGS
    runtime = _compiled((_HERE / "runtime.cpp").read_text(), [*flags, "-c"], [])
    return _compiled(
        cpp_text(text, name), [*_KERNEL_FLAGS, *_fusing_flags()], ["-x", "none", str(runtime)]
    )


def build_all(texts: Iterable[tuple[MetalText, str]]) -> None:
    """Compile several texts, given with their names, on all cores."""
    distinct = {cpp_text(text, name): (text, name) for text, name in texts}
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for future in [pool.submit(build, *each) for each in distinct.values()]:
            future.result()


def _compiled(source: str, flags: Sequence[str], objects: Sequence[str]) -> Path:
    compiler, version = _compiler()
    name = hashlib.blake2b(
        "\0".join([version, _shim_digest(), *flags, *objects, source]).encode(), digest_size=16
    ).hexdigest()
    target = _folder() / name
    with _locks_lock:
        lock = _locks.setdefault(target, threading.Lock())
    with lock:
        if target.exists():
            return target
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            path, made = Path(folder, "source.cpp"), Path(folder, "made")
            path.write_text(source)
            command = [compiler, *flags, f"-I{SHIM}", "-o", str(made), str(path)]
            run = subprocess.run([*command, *objects], capture_output=True, text=True)
            if run.returncode != 0:
                raise CompileError(run.stderr)
            os.replace(made, target)  # other processes see all of it or nothing
    return target


@cache
def _compiler() -> tuple[str, str]:
    return find_compiler()


def find_compiler() -> tuple[str, str]:
    """The path and version of the C++ compiler."""
    for name in (os.environ.get("CXX", "g++"), "g++", "clang++"):
        if (path := shutil.which(name)) is not None:
            shown = subprocess.run([path, "--version"], capture_output=True, text=True, check=True)
            return path, shown.stdout
    raise RuntimeError(
        "Metal kernels are tested as C++, which needs a compiler: install g++ "
        "(apt-get install g++) or clang++ (xcode-select --install), or name one in CXX."
    )


@cache
def _fusing_flags() -> tuple[str, ...]:
    """For sums of products that are rounded once, as GPUs do it, if this processor can."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return ("-ffp-contract=fast",)
    compiler, _ = _compiler()
    shown = subprocess.run(
        [compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull],
        capture_output=True,
        text=True,
        check=True,
    )
    if "__FMA__" not in shown.stdout:
        return ()
    # Not by clang++, which has no such option and needs none.
    expensive = () if "__clang__" in shown.stdout else ("-fexpensive-optimizations",)
    return ("-ffp-contract=fast", "-mfma", *expensive)


@cache
def _shim_digest() -> str:
    digest = hashlib.blake2b()
    for path in sorted(SHIM.iterdir()):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@cache
def _folder() -> Path:
    path = Path(tempfile.gettempdir(), f"quire-metal-sim-{os.getuid()}")
    path.mkdir(mode=0o700, exist_ok=True)
    if path.stat().st_uid != os.getuid():
        raise RuntimeError(f"{path} belongs to another user")
    return path
