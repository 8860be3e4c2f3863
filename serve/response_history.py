"""Conversations of the Responses API as JSON text: kept, joined and handed on as it is.

One that fills a long context has megabytes: to decode them would hold up every stream.
"""

from __future__ import annotations

from typing import Final

import msgspec

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


def joined(*lists: bytes | msgspec.Raw) -> msgspec.Raw:
    """One JSON list of what is in several."""
    contents = (bytes(text).strip()[1:-1].strip() for text in lists)
    return msgspec.Raw(b"[" + b",".join(filter(None, contents)) + b"]")
