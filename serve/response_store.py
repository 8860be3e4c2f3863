"""Responses kept for clients that come back to them, in a bounded amount of memory."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Final

import msgspec

from quire.serve.errors import ApiError, invalid
from quire.serve.responses_protocol import Item

MAX_BYTES: Final = 64 * 2**20


class Stored(msgspec.Struct, frozen=True):
    items: list[Item]  # the whole conversation, the answer's items included
    response: dict[str, Any]


class ResponseStore:
    """The latest responses by owner and id, as JSON; the one used longest ago goes first.

    An owner is an API key, or "" where there are none: nobody finds what is somebody else's.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._by_id: OrderedDict[tuple[str, str], bytes] = OrderedDict()
        self._decode = msgspec.json.Decoder(Stored).decode

    def add(self, owner: str, response_id: str, stored: Stored) -> None:
        data = msgspec.json.encode(stored)
        if len(data) > self._max_bytes:  # it would drive all others out and not stay itself
            return
        self._by_id[owner, response_id] = data
        self._bytes += len(data)
        while self._bytes > self._max_bytes:
            _, dropped = self._by_id.popitem(last=False)
            self._bytes -= len(dropped)

    def previous(self, owner: str, response_id: str) -> Stored:
        """For ``previous_response_id``. Raises :class:`ApiError` (400)."""
        stored = self._get((owner, response_id))
        if stored is None:
            raise invalid(
                "previous_response_id",
                f"Previous response with id {response_id[:100]!r} not found.",
                code="previous_response_not_found",
            )
        return stored

    def find(self, owner: str, response_id: str) -> Stored:
        """Raises :class:`ApiError` (404)."""
        stored = self._get((owner, response_id))
        if stored is None:
            raise _not_found(response_id)
        return stored

    def delete(self, owner: str, response_id: str) -> None:
        """Raises :class:`ApiError` (404)."""
        data = self._by_id.pop((owner, response_id), None)
        if data is None:
            raise _not_found(response_id)
        self._bytes -= len(data)

    def _get(self, key: tuple[str, str]) -> Stored | None:
        data = self._by_id.get(key)
        if data is None:
            return None
        self._by_id.move_to_end(key)
        return self._decode(data)


def _not_found(response_id: str) -> ApiError:
    return ApiError(404, f"Response with id {response_id[:100]!r} not found.", param="response_id")
