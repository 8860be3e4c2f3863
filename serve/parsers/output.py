"""One answer's text, with its markers, to events: content, reasoning and calls told apart."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Final

from msgspec import Struct

from quire.serve.parsers.events import Event, EventLog
from quire.serve.parsers.markers import Markers
from quire.serve.parsers.reader import EndOfInput, MarkupError, Reader, Sink, Stops, Wait
from quire.serve.parsers.schemas import Tools
from quire.serve.parsers.syntax import CallSyntax, UnknownName

# White space in front of a call is part of the call's markup, within reason.
_MAX_SPACE: Final = 256


class ThinkTags(Struct, frozen=True):
    """What a family writes around its reasoning."""

    opener: str
    closer: str
    # Tags that say that the answer begins or ends, and are not for the user.
    silent: tuple[str, ...] = ()


class OutputParser(ABC):
    """Takes the text of one answer in pieces of any size; equal texts give equal events.

    Markers of the family are single characters of the text, by :class:`Markers`.
    """

    def __init__(self, events: EventLog, markers: Markers) -> None:
        self.events = events
        self.markers = markers
        self.reader = Reader()
        self.in_reasoning = False
        self._run = self.run()
        self._done = False
        self.truncated = False

    @abstractmethod
    def run(self) -> Wait[None]: ...

    def push(self, text: str) -> list[Event]:
        self.reader.feed(text)
        self._advance()
        return self.events.drain()

    def finish(self, *, truncated: bool) -> list[Event]:
        """What was held back, now that nothing follows.

        ``truncated``: by the token limit, so that markup which has begun is markup that was cut.
        """
        self.truncated = truncated
        self.reader.end()
        self._advance()
        return self.events.drain()

    @property
    def calls(self) -> int:
        """How many calls are complete."""
        return self.events.ended_calls

    def _advance(self) -> None:
        # Waiting yields None; the default says that the generator has returned.
        self._done = self._done or next(self._run, True) is True


class TaggedParser(OutputParser):
    """Families that write reasoning and calls as tagged blocks within the text."""

    def __init__(
        self,
        events: EventLog,
        markers: Markers,
        tools: Tools,
        think: ThinkTags | None,
        syntax: type[CallSyntax] | None,
        *,
        starts_in_reasoning: bool,
    ) -> None:
        """``syntax`` None leaves calls alone: there are no tools, so nothing is one."""
        super().__init__(events, markers)
        self._think = think
        self._syntax = None if syntax is None else syntax(self.reader, events, tools, markers)
        self._prepare_stops()
        self.in_reasoning = starts_in_reasoning and think is not None
        self._blank = True  # no content but white space so far
        self._after_call = False  # only white space since the last call
        self._drop_closer = False  # of a block that was no call
        self._prose: Stops | None = None  # what would end the prose that is being passed on

    def push(self, text: str) -> list[Event]:
        """In the middle of prose, which most of an answer is, text passes without the reader."""
        if self._prose is None or self._prose.may_begin(text) or text[-1:].isspace():
            return super().push(text)
        self._emit(text)
        return self.events.drain()

    def _prepare_stops(self) -> None:
        fold = self.markers.fold
        think, syntax = self._think, self._syntax
        self._openers = {fold(text): text for text in syntax.openers} if syntax else {}
        self._first_openers = tuple(map(fold, syntax.first_openers)) if syntax else ()
        closers = map(fold, syntax.closers) if syntax else ()
        # Closers made of text stay where they are if no call stands before them.
        self._closers = {text for text in closers if self.markers.is_marker(text[0])}
        self._silent = {fold(text) for text in think.silent} if think else set()
        self._think_opener = fold(think.opener) if think else ""
        self._think_closer = fold(think.closer) if think else ""
        tags = [text for text in (self._think_opener, self._think_closer) if text]
        # In an answer, tags made of text may be quoted: they count as its first words only.
        firm = [text for text in tags if self.markers.is_marker(text[0])]
        self._first_tags = tuple(text for text in tags if text not in firm)
        self._content_stops = Stops([*self._openers, *self._closers, *self._silent, *firm])
        closing = [self._think_closer] if think else []
        self._reasoning_stops = Stops([*self._openers, *closing])

    def run(self) -> Wait[None]:
        try:
            if self.in_reasoning:
                yield from self._trim_reasoning_start()
            while True:
                yield from (self._reasoning() if self.in_reasoning else self._content())
        except EndOfInput:
            # White space between and behind calls separates markup, not words.
            rest = self.reader.take_rest()
            if not (self._after_call and rest.isspace()):
                self._emit(rest)

    # ---- text

    def _content(self) -> Wait[None]:
        if self._blank:
            yield from self._first_words()
            if self.in_reasoning:
                return
        keep_space = bool(self._openers)
        stop, space = yield from self._text(self._content_stops, self._emit, keep_space)
        if stop in self._openers:
            yield from self._call(stop, space)
            return
        self._emit(space)
        if stop == self._think_opener:
            yield from self._open_reasoning()
        elif stop in self._closers and not self._drop_closer:
            self._emit(stop)
        elif stop in self._closers:
            self._drop_closer = False

    def _first_words(self) -> Wait[None]:
        """Tags and openers that count only before anything else has been said."""
        reader = self.reader
        options = (*self._first_tags, *self._first_openers)
        if not options:
            return
        found = yield from reader.peek(options, after_space=True)
        if found is None:
            self._blank = False
            return
        start = reader.position
        yield from reader.skip_space()
        if found in self._first_openers:
            self._blank = False
            yield from self._call("", reader.text[start : reader.position], found)
            return
        reader.position += len(found)
        if found == self._think_opener:
            yield from self._open_reasoning()
        else:  # the end of reasoning that the prompt has closed already
            yield from self._skip_newlines()

    def _open_reasoning(self) -> Wait[None]:
        self.in_reasoning = True
        yield from self._trim_reasoning_start()

    def _trim_reasoning_start(self) -> Wait[None]:
        yield from self.reader.accept("\n")

    def _reasoning(self) -> Wait[None]:
        stop, space = yield from self._text(self._reasoning_stops, self._emit, True)
        if stop in self._openers:
            yield from self._call(stop, space)
            return
        self._emit(space.rstrip("\n"))
        self.in_reasoning = False
        yield from self._skip_newlines()

    def _skip_newlines(self) -> Wait[None]:
        while (yield from self.reader.accept("\n")) is not None:
            pass

    def _text(self, stops: Stops, emit: Sink, keep_space: bool) -> Wait[tuple[str, str]]:
        """Passes text on up to a stop; gives the stop and the white space in front of it."""
        reader = self.reader
        while True:
            match = stops.search(reader.text, reader.position)
            if match is not None:
                end = match.start()
            else:
                end = len(reader.text) - stops.held(reader.text, reader.position)
            text = reader.text[reader.position : end]
            said = text.rstrip() if keep_space else text
            if len(text) - len(said) > _MAX_SPACE:
                said = text[: len(text) - _MAX_SPACE]
            emit(said)
            if match is not None:
                reader.position = match.end()
                return match[0], text[len(said) :]
            reader.position += len(said)
            self._prose = stops if reader.position == len(reader.text) else None
            yield from reader.more()
            self._prose = None

    def _emit(self, text: str) -> None:
        if not text:
            return
        text = self.markers.show(text)
        if self.in_reasoning:
            self.events.reasoning(text)
            return
        self.events.content(text)
        if not text.isspace():
            self._blank = self._after_call = False

    # ---- calls

    def _call(self, stop: str, space: str, first: str = "") -> Wait[None]:
        """A block of calls behind ``stop``; if it is prose, it becomes text again.

        ``first`` is an opener that is part of the block and not read yet.
        """
        syntax, reader = self._syntax, self.reader
        assert syntax is not None
        before = self.events.started_calls
        reader.mark()
        try:
            yield from syntax.block(self._openers.get(stop, first))
        except MarkupError as error:
            if syntax.open_call:  # it stays incomplete
                syntax.open_call = False
                self._end_of_block()
                return
            reader.rewind()
            if self.events.started_calls > before:
                self._end_of_block()
                return
            self._take_back(stop, space, isinstance(error, UnknownName))
            if first:
                self._emit((yield from reader.next()))
            return
        except EndOfInput:
            if self.events.started_calls > before:
                self._end_of_block()
                reader.take_rest()
            else:
                reader.rewind()
                if self.truncated and self.markers.is_marker(stop[:1]):
                    reader.take_rest()
                else:
                    self._emit(space + stop)
            raise
        self._end_of_block()
        reader.forget_mark()

    def _end_of_block(self) -> None:
        self.in_reasoning = False
        self._blank = False
        self._after_call = True

    def _take_back(self, stop: str, space: str, unknown_name: bool) -> None:
        """The block's inner text is the answer then, or part of the reasoning."""
        self._emit(space)
        if unknown_name and not self.in_reasoning and self.markers.is_marker(stop[:1]):
            self._drop_closer = True
        else:
            self._emit(stop)
