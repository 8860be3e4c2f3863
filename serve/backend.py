"""What the HTTP layer needs from an engine: submit a request, read its tokens, close it.

``serve.worker_client`` implements this over a worker process; tests implement it with scripts.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final, Literal, Protocol

from quire.engine.messages import GenerateRequest, Ready, TokenOutput


class BackendError(Exception):
    """Base of everything below; ``message`` is fit to show to a client."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class Unavailable(BackendError):
    """The worker is loading, restarting or draining: 503 with Retry-After."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after  # seconds


class QueueFull(BackendError):
    """Admission refused: 429 with Retry-After."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after  # seconds


class GenerationFailed(BackendError):
    """The worker died or reported an error while this request was in flight."""


UNNUMBERED: Final = 0  # the id of a request until :meth:`Backend.submit` gives it one


class TokenStream(Protocol):
    """The outputs of one submitted request, in order.

    Iteration ends after the output that carries a finish reason and raises
    :class:`GenerationFailed` if the worker dies first.
    """

    def __aiter__(self) -> AsyncIterator[TokenOutput]: ...

    def close(self, reason: Literal["stop", "abort"] = "abort") -> None:
        """Stop generating if the request is still running. Idempotent.

        ``reason`` is what the metrics record: "stop" for a stop string, "abort" for a client that
        went away.
        """
        ...


class Backend(Protocol):
    @property
    def alive(self) -> bool:
        """Whether the worker process exists."""
        ...

    @property
    def info(self) -> Ready | None:
        """What the worker reported when it became ready; None while it is not."""
        ...

    @property
    def max_in_flight(self) -> int:
        """How many sequences may run or wait at a time."""
        ...

    def why_unavailable(self) -> Unavailable | None:
        """Why :meth:`admit` would refuse any request now, or None if it would not."""
        ...

    def admit(self) -> Ready:
        """What the worker said of itself. Raises :class:`Unavailable` if it takes no requests."""
        ...

    def check_room(self, count: int) -> None:
        """Whether ``count`` sequences can be submitted now. Raises :class:`QueueFull`."""
        ...

    def submit(self, request: GenerateRequest) -> TokenStream:
        """Give ``request`` a number and queue it.

        Raises :class:`Unavailable` or :class:`QueueFull`.
        """
        ...
