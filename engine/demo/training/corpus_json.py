"""JSON built from a sum, or from names and values in the user's message."""

from __future__ import annotations

import json
from collections.abc import Callable

from quire.engine.demo.training.corpus_draw import Draw
from quire.engine.demo.training.corpus_exchange import Exchange, say
from quire.engine.demo.training.corpus_words import COLORS, FOODS, NOUNS, PEOPLE_JOBS

_JSON_ASK = (
    "[answer|reply|respond] [in|with|as|using] JSON[|,|:]",
    "[give|write] [me |][the answer|your answer] [in|as] JSON:",
    "JSON only:",
    "in JSON:",
    "[use JSON|JSON please]:",
)
_FIELDS: dict[str, Callable[[Draw], str | int]] = {
    "name": Draw.name,
    "age": lambda draw: draw.number(1, 99),
    "city": Draw.city,
    "color": lambda draw: draw.value(COLORS),
    "job": lambda draw: draw.value(PEOPLE_JOBS),
    "food": lambda draw: draw.value(FOODS),
    "animal": lambda draw: draw.value(NOUNS),
    "price": lambda draw: draw.number(1, 999),
    "count": lambda draw: draw.number(0, 500),
    "id": lambda draw: draw.number(1, 99999),
    "title": lambda draw: f"{draw.word()} {draw.choice(NOUNS)}",
}
_CLAUSES = {
    "age": ("is {v} years old", "is {v}", "is aged {v}"),
    "city": ("lives in {v}", "is from {v}", "comes from {v}"),
    "job": ("works as a {v}", "is a {v}"),
    "color": ("likes {v}", "loves the color {v}"),
    "food": ("eats {v}", "likes to eat {v}"),
}


def json_object(draw: Draw) -> Exchange:
    """Words or numbers that the user names, as a JSON object or list."""
    while True:
        make = draw.random.choices(
            (_json_sum, _json_person, _json_fields, _json_list), (30, 25, 30, 15)
        )[0]
        question, value = make(draw)
        if draw.owns(question):
            return say("json", question, json.dumps(value, ensure_ascii=False))


def _json_sum(draw: Draw) -> tuple[str, object]:
    a, b = draw.pair(0, 99)
    ask = draw.choice(("[what is|what's|] {a} + {b}", "[what is |add ]{a} plus {b}", "{a}+{b}"))
    if draw.chance(0.2):
        key = draw.choice(("result", "sum", "total", "value", draw.choice(NOUNS), draw.invented()))
        mark = draw.choice(('"', '"', "'", ""))
        frame = draw.choice(
            (
                "answer in JSON with the key {k}[:|.] " + ask + "?",
                ask + "? [answer|reply] in JSON with the key {k}",
                ask + " as JSON with the key {k}",
            )
        )
        slots = {"a": a, "b": b, "k": f"{mark}{key}{mark}"}
        return draw.ask(frame, slots), {key: a + b}
    if draw.chance(0.1):
        ask = "[return|give me|write] [a JSON object with|JSON with|as JSON] the sum of {a} and {b}"
        return draw.ask(ask, {"a": a, "b": b}), {"answer": a + b}
    if draw.chance(0.25):
        question = draw.ask(ask + " [in|as] JSON", {"a": a, "b": b})
    elif draw.chance(0.2):
        question = draw.ask(f"{ask}? {draw.choice(_JSON_ASK).rstrip(':')}.", {"a": a, "b": b})
    else:
        question = draw.ask(f"{draw.choice(_JSON_ASK)} {ask}?", {"a": a, "b": b})
    return question, {"answer": a + b}


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _json_person(draw: Draw) -> tuple[str, object]:
    """An object built from a sentence about a person."""
    keys = draw.random.sample(list(_CLAUSES), draw.choice((1, 1, 2, 2, 3)))
    values: dict[str, str | int] = {"name": draw.name()}
    clauses = []
    for key in keys:
        values[key] = _FIELDS[key](draw)
        clauses.append(draw.choice(_CLAUSES[key]).format(v=values[key]))
    if len(clauses) > 1 and "age" in keys and draw.chance(0.2) and keys[0] == "age":
        sentence = f"{values['name']}, {values['age']}, {_join(clauses[1:])}"
    else:
        sentence = f"{values['name']} {_join(clauses)}"
    names = _join(list(values))
    frame = draw.choice(
        (
            "[give|write|make|return|create] [me |]a JSON object with [the keys |the fields "
            "|]{k}[ for|:| from:] {s}.",
            "[answer|reply] in JSON with [the keys |]{k}: {s}.",
            "{s}. [give|write|make|return] [me |][this|that|it] [as|in] JSON with [the keys |]{k}.",
            "[extract|find|get] {k} [as|in] JSON[:| from:] {s}.",
            "[turn|put|convert] this into JSON with [the keys |the fields |]{k}: {s}.",
            "{s}. [write|put|give me] the {k} as JSON.",
            "[give|write|make|return|create] [me |][a |]JSON [|object ][for|of|from]: {s}.",
            "[turn|put|convert|write] this [into|as|in] JSON: {s}.",
        )
    )
    return draw.ask(frame, {"k": names, "s": sentence}), values


def _json_fields(draw: Draw) -> tuple[str, object]:
    """An object built from keys and values that the user lists."""
    keys = draw.random.sample(list(_FIELDS), draw.choice((1, 2, 2, 3, 3, 4)))
    if draw.chance(0.4):
        keys = [
            draw.choice((draw.choice(NOUNS), draw.invented())) if draw.chance(0.5) else k
            for k in keys
        ]
        keys = list(dict.fromkeys(keys))
    values: dict[str, str | int] = {}
    for key in keys:
        make = _FIELDS.get(key) or draw.choice(list(_FIELDS.values()))
        values[key] = make(draw)
    colon = draw.choice((" ", ": ", " = ", "=", " is "))
    listed = ", ".join(f"{key}{colon}{value}" for key, value in values.items())
    frame = draw.choice(
        (
            "[turn|put|convert|make|write] [this|these|that] [into|as|in|to] JSON: {s}",
            "[give|write|make|return|create] [me |]a JSON object [with|for|of|from]: {s}",
            "[give|write|make|return|create] [me |]a JSON object with {s}",
            "[as JSON|JSON|in JSON|to JSON|answer in JSON|reply in JSON][:| please:] {s}",
            "{s} [as JSON|in JSON]",
        )
    )
    return draw.ask(frame, {"s": listed}), values


def _json_list(draw: Draw) -> tuple[str, object]:
    makers: tuple[Callable[[Draw], str], ...] = (
        Draw.word,
        Draw.name,
        lambda d: d.value(COLORS),
        lambda d: d.value(NOUNS),
    )
    make = draw.choice(makers)
    items = [make(draw) for _ in range(draw.number(2, 6))]
    if draw.chance(0.25):
        numbers = [draw.number(0, 999) for _ in items]
        items = [str(n) for n in numbers]
    listed = ", ".join(items) if draw.chance(0.7) else _join(items)
    frame = draw.choice(
        (
            "[put|turn|convert|make|write] [this|these|the words|them] [into|as|in] a JSON [list"
            "|array]: {s}",
            "[give|write|make|return] [me |]a JSON [list|array] of[:|] {s}",
            "[a JSON list|JSON list|JSON array][:| of| with|:] {s}",
            "[answer with|reply with|make] a JSON [list|array]: {s}",
        )
    )
    question = draw.ask(frame, {"s": listed})
    values = [int(item) if item.isascii() and item.isdigit() else item for item in items]
    return question, values
