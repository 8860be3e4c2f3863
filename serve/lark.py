"""Grammars in llguidance's dialect of Lark, written so that markers are tokens and text is text.

A marker that the tokenizer has as one token never matches as text, and the other way round, so that
each is looked up: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import msgspec
from tokenizers import Tokenizer

# Any text, which never contains a marker.
TEXT: Final = r"/(.|\n)*/"


def quote(text: str) -> str:
    """A string as Lark writes it."""
    return msgspec.json.encode(text).decode()


class ReasoningForm(msgspec.Struct, frozen=True):
    """How the model writes what it thinks before it answers."""

    opener: str
    closer: str
    is_open: bool  # the prompt ends inside
    before_answer: str = ""  # what stands between reasoning and answer, such as a channel's header


def markers_of(tokenizer: Tokenizer) -> dict[str, int]:
    """The tokenizer's added tokens, special or not: their texts, and their ids."""
    added = tokenizer.get_added_tokens_decoder()
    return {token.content: token_id for token_id, token in added.items()}


class Lark:
    """A grammar under construction.

    Args:
        markers: of :func:`markers_of`.
    """

    def __init__(self, markers: Mapping[str, int]) -> None:
        self._markers = markers
        # The longest first: of two that fit the tokenizer takes that one.
        texts = sorted(filter(None, markers), key=len, reverse=True)
        self._pattern = re.compile("(" + "|".join(map(re.escape, texts)) + ")") if texts else None
        self._rules: list[str] = []

    def _pieces(self, text: str) -> list[str]:
        return [piece for piece in self._pattern.split(text) if piece] if self._pattern else [text]

    def literal(self, text: str) -> str:
        """Exactly this text, with markers as tokens; of the empty text nothing."""
        return " ".join(
            quote(piece) if (token := self._markers.get(piece)) is None else f"<[{token}]>"
            for piece in self._pieces(text)
            if piece
        )

    def text_before(self, closer: str) -> str:
        """Any text up to the first ``closer``, and that."""
        pieces = [piece for piece in self._pieces(closer) if piece]
        place = next((i for i, piece in enumerate(pieces) if piece in self._markers), None)
        if place is None:
            return self.rule(TEXT, f"suffix={quote(closer)}")
        # One lexeme with what stands in front of the marker, or the text would swallow that.
        end = "".join(map(_regex_escape, pieces[:place]))
        text = self.rule(f"{TEXT[:-1]}{end}/")
        return f"{text} {self.literal(''.join(pieces[place:]))}"

    def rule(self, body: str, options: str = "") -> str:
        """A rule of its own; returns its name."""
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}[{options}]: {body}" if options else f"{name}: {body}")
        return name

    def either(self, bodies: list[str]) -> str:
        """A rule that is one of several."""
        return bodies[0] if len(bodies) == 1 else self.rule(" | ".join(bodies))

    def define(self, name: str, body: str) -> str:
        """A rule that may refer to itself; defined once, however often this is called."""
        if (rule := f"{name}: {body}") not in self._rules:
            self._rules.append(rule)
        return name

    def json(self, schema: Mapping[str, Any]) -> str:
        """A value of a JSON schema."""
        return self.rule(f"%json {msgspec.json.encode(schema).decode()}")

    def reasoning(self, form: ReasoningForm) -> str:
        """What comes before an answer; nothing, perhaps, unless the prompt has opened it."""
        blank = self.rule(r"/\n{0,3}/")
        thought = f"{self.text_before(form.closer)} {blank}"
        if not form.is_open:
            opened = self.rule(f"{self.literal(form.opener)} {thought}")
            thought = f"{opened}?"
        return f"{thought} {self.literal(form.before_answer)}"

    def build(self, start: str) -> str:
        """The text of the grammar."""
        return "\n".join([f"start: {start}", *self._rules])


def _regex_escape(text: str) -> str:
    return re.escape(text).replace("/", r"\/").replace("\n", r"\n")
