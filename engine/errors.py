"""Why a model or a request cannot be served. Every message is one line, fit to show to a user."""

from __future__ import annotations

import re


class EngineError(Exception):
    """Base of everything the engine raises on purpose."""


class ModelLoadError(EngineError):
    """The model folder is unusable, or the weights do not fit in memory."""


class UnsupportedModel(EngineError):
    """The architecture cannot run over paged KV."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"model architecture {name!r} is not supported: {reason}")
        self.name = name
        self.reason = reason


class RequestTooLong(EngineError):
    """A request needs more KV blocks than the pool has."""


class GrammarError(EngineError):
    """A request's grammar is wrong, or needs more time or memory than one request may take."""


# What MLX, CUDA and Metal say of memory that is not there.
_OUT_OF_MEMORY = re.compile(
    r"unable to allocate|out ?of ?memory|insufficient memory|bad_alloc"
    r"|resource limit|maximum allowed buffer size",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device, and not the program, is what failed: less might have fitted."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None
    )
