"""Responses kept for clients that come back to them, in a bounded amount of memory."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any, Final

import msgspec

from quire.serve.errors import ApiError, invalid

MAX_BYTES: Final = 64 * 2**20


class Stored(msgspec.Struct, frozen=True):
    items: msgspec.Raw  # a JSON list: the whole conversation, the answer's items included
    response: dict[str, Any]


class _Share:
    """What one owner has stored, the response used longest ago first."""

    def __init__(self) -> None:
        self.by_id: OrderedDict[str, bytes] = OrderedDict()
        self.by_item: dict[str, str] = {}  # the response that an item is of
        self.num_bytes = 0
        self._items: dict[str, list[str]] = {}  # by response

    def add(self, response_id: str, data: bytes, items: list[str]) -> None:
        self.by_id[response_id] = data
        self._items[response_id] = items
        self.by_item.update(dict.fromkeys(items, response_id))
        self.num_bytes += len(data)

    def get(self, response_id: str) -> bytes | None:
        data = self.by_id.get(response_id)
        if data is not None:
            self.by_id.move_to_end(response_id)
        return data

    def drop(self, response_id: str) -> int:
        """Returns the bytes that are free now."""
        for item in self._items.pop(response_id):
            del self.by_item[item]
        size = len(self.by_id.pop(response_id))
        self.num_bytes -= size
        return size


class ResponseStore:
    """The latest responses by owner and id, as JSON.

    An owner is an API key, or "" where there are none: nobody finds what is somebody else's. Where
    there is no more room the owner that holds the most gives up the response that it used longest
    ago, so that nobody who keeps to an even share loses any to others.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._shares: defaultdict[str, _Share] = defaultdict(_Share)
        self._decode = msgspec.json.Decoder(Stored).decode

    def add(self, owner: str, response_id: str, stored: Stored) -> None:
        data = msgspec.json.encode(stored)
        if len(data) > self._max_bytes:  # it would drive all others out and not stay itself
            return
        items = [item["id"] for item in stored.response["output"]]
        self._shares[owner].add(response_id, data, items)
        self._bytes += len(data)
        while self._bytes > self._max_bytes:
            largest = max(self._shares, key=lambda owner: self._shares[owner].num_bytes)
            self._drop(largest, next(iter(self._shares[largest].by_id)))

    def previous(self, owner: str, response_id: str) -> Stored:
        """For ``previous_response_id``. Raises :class:`ApiError` (400)."""
        stored = self._get(owner, response_id)
        if stored is None:
            raise invalid(
                "previous_response_id",
                f"Previous response with id {response_id[:100]!r} not found.",
                code="previous_response_not_found",
            )
        return stored

    def items(self, owner: str) -> Callable[[str], bytes | None]:
        """Looks up items, as JSON, in the outputs of responses that are kept; each of these is
        decoded once."""
        known: dict[str, bytes] = {}

        def find(item_id: str) -> bytes | None:
            share = self._shares.get(owner)
            response_id = None if share is None else share.by_item.get(item_id)
            if response_id is not None and item_id not in known:
                output = self.find(owner, response_id).response["output"]
                known.update((item["id"], msgspec.json.encode(item)) for item in output)
            return known.get(item_id)

        return find

    def find(self, owner: str, response_id: str) -> Stored:
        """Raises :class:`ApiError` (404)."""
        stored = self._get(owner, response_id)
        if stored is None:
            raise _not_found(response_id)
        return stored

    def delete(self, owner: str, response_id: str) -> None:
        """Raises :class:`ApiError` (404)."""
        if self._data(owner, response_id) is None:
            raise _not_found(response_id)
        self._drop(owner, response_id)

    def _drop(self, owner: str, response_id: str) -> None:
        share = self._shares[owner]
        self._bytes -= share.drop(response_id)
        if not share.by_id:
            del self._shares[owner]

    def _data(self, owner: str, response_id: str) -> bytes | None:
        share = self._shares.get(owner)
        return None if share is None else share.get(response_id)

    def _get(self, owner: str, response_id: str) -> Stored | None:
        data = self._data(owner, response_id)
        return None if data is None else self._decode(data)


def _not_found(response_id: str) -> ApiError:
    return ApiError(404, f"Response with id {response_id[:100]!r} not found.", param="response_id")
