"""Gemma 4: a call whose arguments are JSON with bare keys and strings between quote tokens.

<|tool_call>call:f{n:1,s:<|"|>x<|"|>}<tool_call|>
"""

from __future__ import annotations

import re
from typing import Final

from quire.serve.parsers.reader import MarkupError, Wait
from quire.serve.parsers.schemas import ANY, Types, json_of, quote
from quire.serve.parsers.syntax import CallSyntax

_QUOTE: Final = '<|"|>'
_SCALAR = re.compile(r"[^,\]}\ud800-\udfff]*")
_MAX_DEPTH: Final = 32


class Gemma4(CallSyntax):
    openers = ("<|tool_call>",)
    closers = ("<tool_call|>",)
    marks = (_QUOTE,)

    def block(self, opener: str) -> Wait[None]:
        yield from self.expect("call:")
        name = yield from self.tool_name("{")
        yield from self.expect("{")
        types = self.tools.parameters(name)
        arguments = self.arguments(name)
        while (key := (yield from self._key())) is not None:
            arguments.key(key)
            yield from self._value(types.get(key, ANY), 1)
        arguments.end()
        self.end()
        if (yield from self.follows(*self.closers)) is not None:
            yield from self.expect(*self.closers)

    def _key(self) -> Wait[str | None]:
        """The next key, with its colon; None at the mapping's end."""
        yield from self.reader.skip_space()
        mark = yield from self.reader.accept(",", "}")
        if mark == "}":
            return None
        yield from self.reader.skip_space()
        if (yield from self.reader.accept(*self.fold(_QUOTE))) is None:
            key, _ = yield from self.reader.collect_until(self.stops(":"))
            return key.strip()
        key, _ = yield from self.reader.collect_until(self.stops(_QUOTE))
        yield from self.expect(":")
        return key

    def _value(self, types: Types, depth: int) -> Wait[None]:
        if depth > _MAX_DEPTH:
            raise MarkupError
        emit = self.events.arguments
        yield from self.reader.skip_space()
        opening = yield from self.reader.accept(*self.fold(_QUOTE, "{", "["))
        if opening == "{":
            separator = "{"
            while (key := (yield from self._key())) is not None:
                emit(f"{separator}{quote(key)}:")
                separator = ","
                yield from self._value(ANY, depth + 1)
            emit("{}" if separator == "{" else "}")
        elif opening == "[":
            yield from self._list(depth)
        elif opening is None:
            parts: list[str] = []
            yield from self.reader.span(_SCALAR, parts.append)
            self.reader.position -= 1
            emit(json_of("".join(parts).strip(), types))
        else:
            yield from self._string(types)

    def _list(self, depth: int) -> Wait[None]:
        emit = self.events.arguments
        emit("[")
        yield from self.reader.skip_space()
        if (yield from self.reader.accept("]")) is None:
            while True:
                yield from self._value(ANY, depth + 1)
                mark = yield from self.expect(",", "]")
                if mark == "]":
                    break
                emit(",")
        emit("]")

    def _string(self, types: Types) -> Wait[None]:
        emit = self.events.arguments
        stops = self.stops(_QUOTE)
        if types and "string" not in types:
            text, _ = yield from self.reader.collect_until(stops)
            emit(json_of(self.markers.show(text), types))
            return
        emit('"')
        yield from self.reader.until(stops, lambda text: emit(quote(self.markers.show(text))[1:-1]))
        emit('"')
