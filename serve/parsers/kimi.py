"""Kimi K2, whose calls carry an id of the model's own, and Kimi K3, whose tags are token triples.

<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"n": 1}<|tool_call_end|>
<|open|>call tool="f" index="1"<|sep|><|open|>argument key="n" type="number"<|sep|>1<|close|>...
"""

from __future__ import annotations

import re

from quire.serve.parsers.reader import MarkupError, Wait
from quire.serve.parsers.schemas import Types
from quire.serve.parsers.syntax import CallSyntax, UnknownName

_ID = re.compile(r"(?:functions\.)?(?P<name>.+?)(?P<index>:[0-9]+)?")


class KimiK2(CallSyntax):
    openers = ("<|tool_calls_section_begin|>", "<|tool_call_begin|>")
    closers = ("<|tool_calls_section_end|>",)
    marks = ("<|tool_call_argument_begin|>", "<|tool_call_end|>")

    def block(self, opener: str) -> Wait[None]:
        begin, end = "<|tool_call_begin|>", "<|tool_calls_section_end|>"
        if opener != begin:
            yield from self.expect(begin)
        yield from self._call()
        while (yield from self.follows(begin, end)) is not None:
            if (yield from self.expect(begin, end)) != self.fold(begin)[0]:
                return
            yield from self._call()

    def _call(self) -> Wait[None]:
        written, stop = yield from self.reader.collect_until(
            self.stops("<|tool_call_argument_begin|>", "<|tool_call_end|>")
        )
        match = _ID.fullmatch(written.strip())
        if match is None or stop != self.fold("<|tool_call_argument_begin|>")[0]:
            raise MarkupError
        name = match["name"]
        if name not in self.tools:
            raise UnknownName
        # The template writes the id back into the prompt, so the model must find its own there.
        call_id = written.strip()
        if not match["index"]:
            call_id = f"functions.{name}:{self.events.started_calls}"
        yield from self.json_arguments(name, call_id)
        yield from self.reader.until(self.stops("<|tool_call_end|>"), lambda text: None)


_ATTRIBUTE = re.compile(r'(\w+)="([^"]*)"')


def _attributes(text: str) -> dict[str, str]:
    return {
        key: value.replace("&quot;", '"').replace("&amp;", "&")
        for key, value in _ATTRIBUTE.findall(text)
    }


class KimiK3(CallSyntax):
    openers = ("<|open|>tools<|sep|>",)
    closers = ("<|close|>tools<|sep|>",)
    marks = ("<|open|>", "<|close|>", "<|sep|>")

    def block(self, opener: str) -> Wait[None]:
        begin, end = "<|open|>call", "<|close|>tools<|sep|>"
        yield from self.expect(begin)
        yield from self._call()
        while (yield from self.follows(begin, end)) is not None:
            if (yield from self.expect(begin, end)) != self.fold(begin)[0]:
                return
            yield from self._call()

    def _tag(self) -> Wait[dict[str, str]]:
        """The attributes of a tag whose name has been read."""
        text, _ = yield from self.reader.collect_until(self.stops("<|sep|>"))
        return _attributes(text)

    def _call(self) -> Wait[None]:
        attributes = yield from self._tag()
        name = attributes.get("tool", "")
        if name not in self.tools:
            raise UnknownName
        argument, whole, end = "<|open|>argument", "<|open|>json", "<|close|>call<|sep|>"
        first = yield from self.follows(argument, whole, end)
        if first is None:
            raise MarkupError
        if first == self.fold(whole)[0]:
            yield from self.expect(whole)
            yield from self._tag()
            yield from self.json_arguments(name)
            yield from self.reader.until(self.stops(end), lambda text: None)
            return
        arguments = self.arguments(name)
        tags = self.stops(argument, end)
        while (yield from self.reader.until(tags, lambda text: None)) == self.fold(argument)[0]:
            attributes = yield from self._tag()
            value = arguments.value(attributes.get("key", ""), _declared(attributes))
            yield from self.element("<|close|>argument<|sep|>", (argument, end), value.write)
            value.end()
        arguments.end()
        self.end()


def _declared(attributes: dict[str, str]) -> Types | None:
    kind = attributes.get("type")
    return frozenset({kind}) if kind else None
