"""Conversations of the Responses API as JSON text: kept, joined and handed on as it is.

One that fills a long context has megabytes: to decode them would hold up every stream.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec

from quire.serve.errors import ApiError
from quire.serve.raw_body import RawBody

NO_ITEMS: Final = msgspec.Raw(b"[]")


class Asked(msgspec.Struct, frozen=True):
    """What a request says to the model; the request has been checked."""

    input: msgspec.Raw
    instructions: str | None = None

    @property
    def items(self) -> msgspec.Raw:
        """Its input as a list of items."""
        text = bytes(self.input)
        if text.startswith(b"["):
            return msgspec.Raw(text)
        return msgspec.Raw(b'[{"type":"message","role":"user","content":' + text + b"}]")


_decode: Final = msgspec.json.Decoder(Asked).decode


def asked(body: RawBody) -> Asked:
    return _decode(body.whole())


_REFERENCE: Final = "item_reference"
_fields: Final = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_raw_items: Final = msgspec.json.Decoder(list[msgspec.Raw]).decode


def resolved(body: RawBody, find: Callable[[str], bytes | None], limit: int) -> RawBody | None:
    """The body with the items themselves where its input refers to some; None: it refers to none
    that ``find`` knows by its id, as JSON. The request has been checked.

    Raises :class:`ApiError` (413) for items of more than ``limit`` bytes.
    """
    whole = body.whole()
    if _REFERENCE.encode() not in whole:
        return None
    fields = _fields(whole)
    if not bytes(fields["input"]).startswith(b"["):
        return None
    items, found = _raw_items(fields["input"]), 0
    for index, raw in enumerate(items):
        if _REFERENCE.encode() not in bytes(raw):
            continue
        reference = msgspec.json.decode(raw)
        if reference.get("type") != _REFERENCE or not isinstance(reference.get("id"), str):
            continue
        if (item := find(reference["id"])) is not None:
            items[index] = msgspec.Raw(item)
            found += len(item)
        if found > limit:
            raise ApiError(413, f"The items that input refers to have over {limit} bytes.")
    if not found:
        return None
    fields["input"] = joined(b"[" + b",".join(map(bytes, items)) + b"]")
    return RawBody([msgspec.json.encode(fields)])


def joined(*lists: bytes | msgspec.Raw) -> msgspec.Raw:
    """One JSON list of what is in several."""
    contents = (bytes(text).strip()[1:-1].strip() for text in lists)
    return msgspec.Raw(b"[" + b",".join(filter(None, contents)) + b"]")
