"""gpt-oss: messages in channels (https://github.com/openai/harmony, docs/format.md).

<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...<|return|>
<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"n": 1}<|call|>
"""

from __future__ import annotations

import re
from typing import Final

from quire.serve.parsers.events import EventLog
from quire.serve.parsers.json_text import JsonText
from quire.serve.parsers.markers import Markers
from quire.serve.parsers.output import OutputParser
from quire.serve.parsers.reader import EndOfInput, MarkupError, Sink, Stops, Wait
from quire.serve.parsers.schemas import Tools

_ENDS: Final = ("<|end|>", "<|call|>", "<|return|>", "<|start|>")
MARKS: Final = (*_ENDS, "<|channel|>", "<|message|>", "<|constrain|>")

_RECIPIENT = re.compile(r"\bto=(?:functions\.)?([^\s<]+)")
_MARKERS = re.compile(r"[\ud800-\udfff]")


class HarmonyParser(OutputParser):
    """The prompt ends behind ``<|start|>assistant``, so the answer begins inside a header."""

    def __init__(self, events: EventLog, markers: Markers, tools: Tools) -> None:
        super().__init__(events, markers)
        self._tools = tools
        self._json = JsonText(self.reader, markers)
        self._ends = Stops(map(markers.fold, _ENDS))
        self._header_end = Stops([*self._ends.texts, markers.fold("<|message|>")])
        self._said: set[bool] = set()  # whether something was reasoned, and answered
        self._sink: Sink = _ignore  # of the message that is being read

    def run(self) -> Wait[None]:
        try:
            if (yield from self.reader.peek(self._header_starts(), after_space=True)) is None:
                yield from self._text()  # an answer without any header is prose all the same
            while True:
                header, stop = yield from self.reader.collect_until(self._header_end)
                if stop == self.markers.fold("<|message|>"):
                    yield from self._message(header)
        except EndOfInput:
            self._sink(self.reader.take_rest())

    def _header_starts(self) -> tuple[str, ...]:
        return ("to=", *(self.markers.fold(mark) for mark in MARKS))

    def _message(self, header: str) -> Wait[None]:
        _, _, channel = header.partition(self.markers.fold("<|channel|>"))
        recipient = _RECIPIENT.search(_MARKERS.sub(" ", header))
        if recipient is not None and recipient[1] in self._tools:
            yield from self._call(recipient[1])
            return
        self.in_reasoning = channel.lstrip().startswith("analysis")
        yield from self._text()
        self.in_reasoning = False

    def _text(self) -> Wait[None]:
        reasoning = self.in_reasoning
        emit = self.events.reasoning if reasoning else self.events.content
        # Messages of one kind are set apart by a line end.
        separator = "\n" if reasoning in self._said else ""

        def sink(text: str) -> None:
            nonlocal separator
            if shown := self.markers.show(text):
                emit(separator + shown)
                separator = ""
                self._said.add(reasoning)

        self._sink = sink
        yield from self.reader.until(self._ends, sink)
        self._sink = _ignore

    def _call(self, name: str) -> Wait[None]:
        self.events.start_call(name)
        emit = self.events.arguments
        yield from self.reader.skip_space()
        try:
            opening = yield from self.reader.accept("{", '"', *self._ends.texts)
            if opening == "{":
                yield from self._json.container("{", emit)
            elif opening == '"':
                yield from self._json.string(emit)
            elif opening is not None:
                emit("{}")
                self.events.end_call()
                return
            else:
                raise MarkupError
            self.events.end_call()
        except MarkupError:  # whatever it is, it is what the model sends
            yield from self.reader.until(self._ends, lambda text: emit(self.markers.show(text)))
            return
        yield from self.reader.until(self._ends, _ignore)


def _ignore(text: str) -> None:
    pass
