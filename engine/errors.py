"""Why a model or a request cannot be served. Every message is one line, fit to show to a user."""

from __future__ import annotations


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
