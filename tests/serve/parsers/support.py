"""One answer through a family's parser, cut as a test likes it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import AddedToken, Tokenizer, models

from quire.serve.parsers.events import (
    ArgumentsDelta,
    CallEnded,
    CallStarted,
    ContentDelta,
    Event,
    ReasoningDelta,
)
from quire.serve.parsers.families import Family, ParserFactory
from quire.serve.parsers.schemas import Tools

TOOLS = Tools(
    {
        "f": {
            "type": "object",
            "properties": {
                "s": {"type": "string"},
                "n": {"type": "integer"},
                "x": {"type": "number"},
                "b": {"type": "boolean"},
                "o": {"type": "object"},
                "u": {"type": ["string", "null"]},
            },
        },
        "g": None,
        "ns.g": {"type": "object", "properties": {"n": {"type": "integer"}}},
    }
)

REASONING = {"gemma4": "gemma4", "harmony": "harmony", "kimi_k3": "kimi_k3", "mistral": "mistral"}


# Markup of several tags is several tokens.
_ONE_TOKEN = re.compile(r"<(?!/?｜DSML)[^<>\s]+>|\[[^\[\]]+\]|｜DSML｜")


@dataclass
class Call:
    name: str
    id: str
    arguments: str = ""
    ended: bool = False


@dataclass
class Answer:
    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)
    order: list[str] = field(default_factory=list)  # kinds of events, neighbours joined

    def add(self, events: Iterable[Event]) -> None:
        for event in events:
            match event:
                case ContentDelta(text):
                    assert text
                    self.content += text
                case ReasoningDelta(text):
                    assert text
                    self.reasoning += text
                case CallStarted(index, call_id, name):
                    assert index == len(self.calls)
                    self.calls.append(Call(name, call_id))
                case ArgumentsDelta(index, text):
                    assert text
                    assert index == len(self.calls) - 1
                    assert not self.calls[index].ended
                    self.calls[index].arguments += text
                case CallEnded(index):
                    assert index == len(self.calls) - 1
                    self.calls[index].ended = True
            kind = type(event).__name__
            if self.order[-1:] != [kind]:
                self.order.append(kind)

    @property
    def ended(self) -> int:
        return sum(call.ended for call in self.calls)


def added_tokens(texts: Iterable[str], special: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokens = [AddedToken(text, special=special, normalized=False) for text in sorted(texts)]
    (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(tokens)
    return tokenizer


def factory(family: str, *, tokens: bool, special: bool = False) -> ParserFactory:
    """``tokens``: whether the family's markers are added tokens; ``special``: special ones."""
    spec = Family(family, REASONING.get(family, "think"))
    tokenizer = added_tokens(single_tokens(family), special) if tokens else None
    return ParserFactory(spec, tokenizer)


def single_tokens(family: str) -> set[str]:
    """The family's markers that would be one token each."""
    spec = Family(family, REASONING.get(family, "think"))
    texts = ParserFactory(spec, None).marker_texts()
    return {text for text in texts if _ONE_TOKEN.fullmatch(text)}


def parse(
    made: ParserFactory,
    pieces: Sequence[str],
    *,
    truncated: bool = False,
    in_reasoning: bool = False,
    tools: Tools | None = TOOLS,
) -> Answer:
    parser = made.parser(tools, starts_in_reasoning=in_reasoning, new_id=lambda: "id")
    answer = Answer()
    for piece in pieces:
        answer.add(parser.push(piece))
    answer.add(parser.finish(truncated=truncated))
    assert answer.ended == parser.calls
    return answer


def calls(answer: Answer) -> list[tuple[str, str]]:
    return [(call.name, call.arguments) for call in answer.calls]


def loads(answer: Answer) -> list[Any]:
    return [json.loads(call.arguments) for call in answer.calls]
