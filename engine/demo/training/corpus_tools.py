"""Conversations in which the request names tools: calls, their results, and no call at all."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from quire.engine.demo.training.corpus_about import ITSELF
from quire.engine.demo.training.corpus_draw import Draw
from quire.engine.demo.training.corpus_exchange import Exchange, Message, say
from quire.engine.demo.training.corpus_shapes import SHAPES, Shape, Value
from quire.engine.demo.training.corpus_unknown import UNKNOWN
from quire.engine.demo.training.corpus_words import COLORS, FOODS, NOUNS

Tool = dict[str, Any]

_QUALITIES = ("price", "status", "size", "count", "value", "info", "name")
_VERBS = ("get", "find", "lookup", "fetch", "check", "read", "show", "query")


def _custom(draw: Draw) -> Shape:
    """A tool that nobody has heard of: what it finds is a made-up or unusual noun."""

    def word() -> str:
        return draw.choice(NOUNS) if draw.chance(0.5) else draw.invented()

    thing = word() if draw.chance(0.6) else f"{word()} {draw.choice(_QUALITIES)}"
    name = thing.replace(" ", "_")
    if draw.chance(0.75):
        name = f"{draw.choice(_VERBS)}_{name}"
    elif draw.chance(0.3):
        verb = draw.choice(_VERBS)
        name = verb + "".join(part.capitalize() for part in name.split("_"))
    parameter = (
        word() if draw.chance(0.6) else draw.choice(("id", "name", "symbol", "user", "item", "key"))
    )
    value: Callable[[Draw], Value] = draw.choice(
        (
            Draw.name,
            Draw.city,
            lambda d: d.unseen(d.word),
            lambda d: d.unseen(lambda: d.number(1, 9999)),
            lambda d: d.value(COLORS),
            lambda d: d.value(FOODS),
            lambda d: d.unseen(
                lambda: "".join(d.choice("ABCDEFGHKLMNPRSTVW") for _ in range(d.number(2, 5)))
            ),
        )
    )
    return Shape(
        (name,),
        (
            f"Get the {thing} of a {parameter}",
            f"Find the {thing} for a {parameter}.",
            f"Returns the {thing}",
            f"Look up the {thing} of one {parameter}",
            "",
        ),
        ((parameter,),),
        (value,),
        (
            f"[what is|what's|get|find|check|tell me|look up|show me|give me] the {thing} [of"
            f"|for] {{0}}[|?]",
            f"[what is|find|get] the {thing} of the {parameter} {{0}}",
            f"[call|use|run] {name} [with|for|on] {{0}}",
            f"[call|use|run] {name} with {parameter} {{0}}",
            f"[can you|please|could you] [get|find|check|look up] the {thing} [of|for] {{0}}[|?]",
        ),
        lambda d: d.choice(
            (d.number(0, 9999), d.word(), {name: d.number(0, 99)}, {thing: d.word()}, d.sentence())
        ),
        several=draw.chance(0.5),
    )


_ASIDES = ("unit", "units", "format", "language", "limit", "lang", "verbose", "date", "timeout")


def _declare(draw: Draw, shape: Shape) -> Tool:
    """``shape`` as a tool of a chat completions request."""
    kinds = ["integer" if isinstance(value(draw), int) else "string" for value in shape.values]
    names: list[str] = []
    for options in shape.parameters:
        names.append(draw.choice([option for option in options if option not in names]))
    properties: dict[str, Any] = {
        name: {"type": draw.choice(("integer", "number")) if kind == "integer" else kind}
        for name, kind in zip(names, kinds, strict=True)
    }
    required = names if draw.chance(0.9) else []
    if draw.chance(0.2):
        aside = draw.choice(_ASIDES)
        properties.setdefault(aside, {"type": draw.choice(("string", "integer", "boolean"))})
    function = {
        "name": draw.choice(shape.names),
        "description": draw.choice(shape.descriptions),
        "parameters": {"type": "object", "properties": properties, "required": required},
    }
    return {"type": "function", "function": function}


# Two of these would both answer one question.
_SUMS = ("add", "multiply", "calculator")


@dataclass(frozen=True)
class Toolbox:
    """The tools of one conversation."""

    shapes: tuple[Shape, ...]
    tools: tuple[Tool, ...]

    def has(self, *names: str) -> bool:
        return any(name in shape.names for shape in self.shapes for name in names)


def toolbox(draw: Draw) -> Toolbox:
    """One to four tools with different names."""
    shapes: list[Shape] = []
    tools: list[Tool] = []
    for _ in range(draw.choice((1, 1, 2, 2, 3, 4))):
        shape = _custom(draw) if draw.chance(0.35) else draw.choice(SHAPES)
        if any(shape.names == other.names for other in shapes):
            continue
        if shape.names[0] in _SUMS and any(other.names[0] in _SUMS for other in shapes):
            continue
        shapes.append(shape)
        tools.append(_declare(draw, shape))
    return Toolbox(tuple(shapes), tuple(tools))


def _render(result: object) -> str:
    return json.dumps(result, ensure_ascii=False) if isinstance(result, dict) else str(result)


def _told(result: object) -> str:
    if isinstance(result, dict):
        return ", ".join(f"{key} {value}" for key, value in result.items())
    return str(result)


def _question(draw: Draw, shape: Shape, rows: list[list[Value]]) -> str:
    values = [str(row[0]) for row in rows]
    listed = values[0]
    if len(values) > 1:
        listed = ", ".join(values[:-1]) + draw.choice((" and ", ", and ")[: len(values) - 1])
        listed += values[-1]
    slots = {f"v{i}": value for i, value in enumerate([listed, *rows[0][1:]])}
    # str.format would take a bare number for the place of an argument.
    pattern = re.sub(r"\{(\d)\}", r"{v\1}", draw.choice(shape.questions))
    return draw.ask(pattern, slots)


def without_tool(draw: Draw, box: Toolbox | None) -> Exchange:
    """A question for a tool that the request does not name."""
    while True:
        shape = _custom(draw) if draw.chance(0.2 if draw.held_out else 0.4) else draw.choice(SHAPES)
        if shape.names[0] in _SUMS or (box and any(shape.names == s.names for s in box.shapes)):
            continue
        question = _question(draw, shape, [[value(draw) for value in shape.values]])
        if draw.owns(question):
            topic = {"get_weather": "weather", "get_time": "clock"}.get(shape.names[0])
            return say("no tool", question, ITSELF[topic].answers[0] if topic else UNKNOWN)


def tool_call(draw: Draw, box: Toolbox) -> list[Exchange]:
    """A question that one of the tools answers: the call, and mostly the reply to its result."""
    at = draw.random.randrange(len(box.shapes))
    shape, function = box.shapes[at], box.tools[at]["function"]
    names = list(function["parameters"]["properties"])[: len(shape.values)]
    rows = [[value(draw) for value in shape.values]]
    if shape.several and draw.chance(0.15):
        more = [[value(draw) for value in shape.values] for _ in range(draw.choice((1, 1, 2)))]
        rows += [row for at, row in enumerate(more) if row not in (rows[0], *more[:at])]
    question = _question(draw, shape, rows)
    while not isinstance(rows[0][0], str) and not draw.owns(question):
        rows = [[value(draw) for value in shape.values]]
        question = _question(draw, shape, rows)
    calls = [
        {
            "type": "function",
            "function": {"name": function["name"], "arguments": dict(zip(names, row, strict=True))},
        }
        for row in rows
    ]
    call: Message = {"role": "assistant", "content": "", "tool_calls": calls}
    exchanges = [Exchange("tool call", [{"role": "user", "content": question}], call)]
    if draw.chance(0.6):
        results = [shape.result(draw) for _ in rows]
        prompt = [{"role": "tool", "content": _render(result)} for result in results]
        answer = "The result: " + "; ".join(_told(result).rstrip(".") for result in results) + "."
        reply = {"role": "assistant", "content": answer}
        exchanges.append(Exchange("tool result", prompt, reply, (answer,)))
    return exchanges
