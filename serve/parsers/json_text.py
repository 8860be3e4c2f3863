"""JSON as a model writes it: passed on while it comes, in the model's own spelling."""

from __future__ import annotations

import json
import re
from typing import Final

from quire.serve.parsers.markers import Markers
from quire.serve.parsers.reader import MarkupError, Reader, Sink, Wait

# Markers are lone surrogates: they end every run of text.
_OUTSIDE = re.compile(r'[^"{}\[\]\ud800-\udfff]*')
_INSIDE = re.compile(r'[^"\\\x00-\x1f\ud800-\udfff]*')
_SCALAR = re.compile(r'[^",{}\[\]\s\ud800-\udfff]*')
_HEX: Final = 4  # digits of \uXXXX
_ESCAPES: Final = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}


class JsonText:
    """Reads JSON values. Raises :class:`MarkupError` where a special token cuts in."""

    def __init__(self, reader: Reader, markers: Markers) -> None:
        self._reader = reader
        self._markers = markers

    def container(self, opening: str, sink: Sink) -> Wait[None]:
        """The rest of an object or array, after its ``opening`` bracket was read."""
        sink(opening)
        depth = 1
        while depth:
            char = yield from self._reader.span(_OUTSIDE, sink)
            if char == '"':
                yield from self._string_text(sink)
                continue
            if char not in "{}[]":
                raise MarkupError
            depth += 1 if char in "{[" else -1
            sink(char)

    def _string_text(self, sink: Sink) -> Wait[None]:
        """A string's own text, after its opening quote; bare control characters get escaped."""
        sink('"')
        while True:
            char = yield from self._reader.span(_INSIDE, sink)
            if char == '"':
                sink(char)
                return
            if char == "\\":
                following = self._plain((yield from self._reader.next()))
                sink(char + (following if following >= " " else _escaped(following)[1:]))
            else:
                sink(_escaped(self._plain(char)))

    def string(self, sink: Sink) -> Wait[None]:
        """A string's value, after its opening quote."""
        reader = self._reader
        while True:
            char = yield from reader.span(_INSIDE, sink)
            if char == '"':
                return
            if char == "\\":
                sink((yield from self._unescaped()))
            else:
                sink(self._plain(char))

    def _unescaped(self) -> Wait[str]:
        char = self._plain((yield from self._reader.next()))
        if char != "u":
            return _ESCAPES.get(char, char)
        code = yield from self._code()
        if 0xD800 <= code < 0xDC00 and (yield from self._reader.accept("\\u")):
            low = yield from self._code()
            if 0xDC00 <= low < 0xE000:
                return chr(0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00))
            return "\ufffd" + _char(low)
        return _char(code)

    def _code(self) -> Wait[int]:
        digits = ""
        for _ in range(_HEX):
            digits += yield from self._reader.next()
        try:
            return int(digits, 16)
        except ValueError:
            raise MarkupError from None

    def value(self, sink: Sink) -> Wait[None]:
        """Any value, as its own text."""
        yield from self._reader.skip_space()
        char = yield from self._reader.next()
        if char == '"':
            yield from self._string_text(sink)
        elif char in "{[":
            yield from self.container(char, sink)
        else:
            self._reader.position -= 1
            yield from self._reader.span(_SCALAR, sink)
            self._reader.position -= 1

    def short_string(self) -> Wait[str | None]:
        """A string's value, or None if something else comes."""
        yield from self._reader.skip_space()
        if not (yield from self._reader.accept('"')):
            return None
        parts: list[str] = []
        yield from self.string(parts.append)
        return "".join(parts)

    def _plain(self, char: str) -> str:
        """A marker inside a string is part of it if it is spelled like text."""
        shown = self._markers.show(char)
        if not shown:
            raise MarkupError
        return shown


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _char(code: int) -> str:
    return "\ufffd" if 0xD800 <= code < 0xE000 else chr(code)
