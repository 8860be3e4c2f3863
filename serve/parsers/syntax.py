"""What the tool-call syntaxes of all families share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from quire.serve.parsers.arguments import ArgumentsWriter
from quire.serve.parsers.events import EventLog
from quire.serve.parsers.json_text import JsonText
from quire.serve.parsers.markers import Markers
from quire.serve.parsers.reader import MarkupError, Reader, Sink, Stops, Wait
from quire.serve.parsers.schemas import Tools


class UnknownName(MarkupError):
    """What looks like a call names no tool of the request."""


class CallSyntax(ABC):
    """Reads a family's blocks of calls. One object reads one answer.

    A block begins behind one of the ``openers``. Nothing of a call is sent before its name is known
    to be a tool's and its arguments have begun as arguments do: until then the block may still turn
    out to be prose, by :class:`MarkupError`, and is read again as such.
    """

    openers: ClassVar[tuple[str, ...]]
    # Openers that count only as the first text of the answer, and are part of the block.
    first_openers: ClassVar[tuple[str, ...]] = ()
    closers: ClassVar[tuple[str, ...]] = ()
    # Further texts that may be marker tokens.
    marks: ClassVar[tuple[str, ...]] = ()

    def __init__(self, reader: Reader, events: EventLog, tools: Tools, markers: Markers) -> None:
        self.reader = reader
        self.events = events
        self.tools = tools
        self.markers = markers
        self.json = JsonText(reader, markers)
        self.open_call = False  # a call has started and has not ended

    @abstractmethod
    def block(self, opener: str) -> Wait[None]:
        """Everything from behind ``opener`` (as written in ``openers``) to the block's end."""

    def fold(self, *texts: str) -> tuple[str, ...]:
        return tuple(self.markers.fold(text) for text in texts)

    def stops(self, *texts: str) -> Stops:
        return Stops(self.fold(*texts))

    # ---- the life of a call

    def start(self, name: str, call_id: str | None = None) -> None:
        self.events.start_call(name, call_id)
        self.open_call = True
        self.reader.forget_mark()

    def end(self) -> None:
        """The call is complete. If no further call follows, the text from here on is content."""
        self.events.end_call()
        self.open_call = False
        self.reader.mark()

    def arguments(self, name: str) -> ArgumentsWriter:
        """Starts a call whose arguments come as named values."""
        self.start(name)
        return ArgumentsWriter(self.events.arguments, self.tools.parameters(name))

    # ---- pieces of markup

    def tool_name(self, *ends: str) -> Wait[str]:
        """The name of a tool; one of ``ends`` follows and is not read."""
        names = {name + end: name for end in self.fold(*ends) for name in self.tools.names}
        found = yield from self.reader.peek(tuple(names))
        if found is None:
            raise UnknownName
        self.reader.position += len(names[found])
        return names[found]

    def expect(self, *options: str) -> Wait[str]:
        """One of ``options`` behind white space, read."""
        yield from self.reader.skip_space()
        option = yield from self.reader.accept(*self.fold(*options))
        if option is None:
            raise MarkupError
        return option

    def require(self, *options: str) -> Wait[None]:
        """One of ``options`` must follow behind white space; it is not read."""
        if (yield from self.follows(*options)) is None:
            raise MarkupError

    def follows(self, *options: str) -> Wait[str | None]:
        return (yield from self.reader.peek(self.fold(*options), after_space=True))

    def element(self, end: str, followers: Sequence[str], sink: Sink) -> Wait[None]:
        """Text up to the ``end`` tag that one of ``followers`` stands behind.

        Values quote markup: a tag that nothing fitting follows is a part of the value.
        """
        stops = self.stops(end)
        while True:
            tag = yield from self.reader.until(stops, lambda text: sink(self.markers.show(text)))
            if (yield from self.follows(*followers)) is not None:
                return
            sink(self.markers.show(tag))

    def json_arguments(self, name: str, call_id: str | None = None) -> Wait[None]:
        """A whole call whose arguments are a JSON object, or one inside a JSON string."""
        opening = yield from self.expect("{", '"')
        self.start(name, call_id)
        yield from self.json_object(opening, self.events.arguments)
        self.end()

    def json_object(self, opening: str, sink: Sink) -> Wait[None]:
        if opening == "{":
            yield from self.json.container("{", sink)
        else:
            yield from self.json.string(sink)
