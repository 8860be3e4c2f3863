"""A request's body as it came in, and messages that are still part of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from msgspec import Raw, Struct

from quire.serve.prompt_length import LengthLimit

# Bytes of JSON from which a helper process decodes it: to decode so many, and to hand them on to
# the chat template, keeps the event loop for 5 ms.
LARGE_BODY: Final = 256 * 2**10


class RawBody(Struct, frozen=True):
    """Pieces that are only joined where the whole is wanted: they may be 32 MiB."""

    pieces: Sequence[bytes]

    @property
    def size(self) -> int:
        return sum(map(len, self.pieces))

    def whole(self) -> bytes:
        return b"".join(self.pieces)

    def start(self, num_bytes: int) -> bytes:
        """The first bytes, or fewer if there are no more."""
        taken = bytearray()
        for piece in self.pieces:
            if len(taken) >= num_bytes:
                break
            taken += piece[: num_bytes - len(taken)]
        return bytes(taken)


class LargeMessages(Struct, frozen=True):
    """Messages in a body that only a helper process decodes.

    Attributes:
        kind: of the request, by its name in ``request_kinds``.
        previous: a JSON list of items of the Responses API that come before the body's own.
        limit: of the prompt's text; None: there is none.
    """

    body: RawBody
    kind: str
    previous: Raw = Raw(b"[]")
    limit: LengthLimit | None = None
