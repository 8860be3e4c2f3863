"""NVIDIA's run-time compiler, as far as MLX has loaded it: CUDA text in, machine code out."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

_LIBRARY = "libnvrtc.so.13"


class CompileError(Exception):
    """A text that the compiler refuses; the message is its log."""


def compile_text(text: str, options: Sequence[str]) -> bytes:
    """The cubin of a program. Other threads may compile meanwhile, and Python goes on.

    Raises:
        OSError: there is no compiler.
        CompileError: it refuses the text.
    """
    nvrtc = _load()
    program = ctypes.c_void_p()
    source = text.encode()
    _check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"quire.cu", 0, None, None))
    try:
        arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if nvrtc.nvrtcCompileProgram(program, len(options), arguments):
            raise CompileError(_read(program, "ProgramLog").decode(errors="replace"))
        return _read(program, "CUBIN")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _read(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(getattr(_load(), f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(getattr(_load(), f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


def _check(status: int) -> None:
    if status:
        raise CompileError(f"NVRTC reports error {status}")


@cache
def _load() -> ctypes.CDLL:
    return ctypes.CDLL(_LIBRARY)
