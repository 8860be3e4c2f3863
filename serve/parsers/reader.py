"""Text that arrives in pieces, read as if it were there already.

Reading methods are generators: a bare ``yield`` waits for the next piece. A parser is then an
ordinary recursive descent over methods joined by ``yield from``, and how the text was cut cannot
change what it finds, since every decision waits until the text seen so far settles it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
Wait = Generator[None, None, T]
Sink = Callable[[str], Any]

_SPACE = re.compile(r"\s*")


class EndOfInput(Exception):
    """The text ended where a parser needed more of it."""


class MarkupError(Exception):
    """The text does not follow the family's markup."""


class Stops:
    """A set of strings to look for. None of them may be the beginning of another."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = tuple(dict.fromkeys(texts))
        # (?!) matches nothing: no stops, all of the text is safe.
        self._search = re.compile("|".join(map(re.escape, self.texts)) or "(?!)").search
        self._prefixes = {text[:end] for text in self.texts for end in range(1, len(text))}
        self._longest = max(map(len, self._prefixes), default=0)
        first = {re.escape(text[0]) for text in self.texts}
        self._first = re.compile("|".join(sorted(first)) or "(?!)")
        self.may_begin = self._first.search  # in a text: None where no stop begins

    def search(self, text: str, start: int) -> re.Match[str] | None:
        return self._search(text, start)

    def held(self, text: str, start: int) -> int:
        """How many last characters of ``text[start:]`` may become a stop with more text."""
        tail = max(start, len(text) - self._longest)
        if not self._prefixes or not self._first.search(text, tail):
            return 0
        for begin in range(tail, len(text)):
            if text[begin:] in self._prefixes:
                return len(text) - begin
        return 0


class Reader:
    """``text[position:]`` is what has arrived and is not read yet."""

    def __init__(self) -> None:
        self.text = ""
        self.position = 0
        self.ended = False
        self._mark: int | None = None

    def feed(self, piece: str) -> None:
        keep = self.position if self._mark is None else self._mark
        self.text = self.text[keep:] + piece
        self.position -= keep
        if self._mark is not None:
            self._mark = 0

    def end(self) -> None:
        self.ended = True

    # ---- going back

    def mark(self) -> None:
        """Remember this position for :meth:`rewind`; text from here on is kept."""
        self._mark = self.position

    def rewind(self) -> None:
        assert self._mark is not None
        self.position = self._mark
        self._mark = None

    def forget_mark(self) -> None:
        self._mark = None

    def take_rest(self) -> str:
        rest = self.text[self.position :]
        self.position = len(self.text)
        return rest

    # ---- reading

    def more(self) -> Wait[None]:
        """Waits for the next piece. Raises :class:`EndOfInput`, as do all methods below."""
        if self.ended:
            raise EndOfInput
        yield

    def next(self) -> Wait[str]:
        """One character."""
        while self.position == len(self.text):
            yield from self.more()
        self.position += 1
        return self.text[self.position - 1]

    def skip_space(self) -> Wait[None]:
        """Up to a character that is there and is not white space."""
        while True:
            match = _SPACE.match(self.text, self.position)
            assert match is not None
            self.position = match.end()
            if self.position < len(self.text):
                return
            yield from self.more()

    def peek(self, options: Sequence[str], *, after_space: bool = False) -> Wait[str | None]:
        """Which of the options the text goes on with; none of them begins another.

        ``after_space`` looks past white space. Nothing is read.
        """
        while True:
            start = self.position
            if after_space:
                match = _SPACE.match(self.text, start)
                assert match is not None
                start = match.end()
            rest = len(self.text) - start
            undecided = rest == 0
            for option in options:
                if self.text.startswith(option, start):
                    return option
                undecided = undecided or (rest < len(option) and self.text.endswith(option[:rest]))
            if not undecided:
                return None
            yield from self.more()

    def matches(self, whole: re.Pattern[str], partial: re.Pattern[str]) -> Wait[bool]:
        """Whether the text goes on with ``whole``. Nothing is read.

        ``partial`` matches every text, to its end, that more text may turn into ``whole``.
        """
        while not whole.match(self.text, self.position):
            if not partial.fullmatch(self.text, self.position):
                return False
            yield from self.more()
        return True

    def accept(self, *options: str) -> Wait[str | None]:
        """Like :meth:`peek`, and reads the option."""
        option = yield from self.peek(options)
        self.position += len(option or "")
        return option

    def until(self, stops: Stops, sink: Sink) -> Wait[str]:
        """Passes text on as it comes, up to the first stop, which is read and returned."""
        while True:
            match = stops.search(self.text, self.position)
            if match is not None:
                sink(self.text[self.position : match.start()])
                self.position = match.end()
                return match[0]
            safe = len(self.text) - stops.held(self.text, self.position)
            sink(self.text[self.position : safe])
            self.position = safe
            yield from self.more()

    def collect_until(self, stops: Stops) -> Wait[tuple[str, str]]:
        """The text before the first stop, and the stop."""
        parts: list[str] = []
        stop = yield from self.until(stops, parts.append)
        return "".join(parts), stop

    def span(self, pattern: re.Pattern[str], sink: Sink) -> Wait[str]:
        """Passes on the characters that ``pattern`` (a repeated class) matches; reads one more."""
        while True:
            match = pattern.match(self.text, self.position)
            assert match is not None
            sink(match[0])
            self.position = match.end()
            if self.position < len(self.text):
                self.position += 1
                return self.text[self.position - 1]
            yield from self.more()
