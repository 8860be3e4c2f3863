"""Requests whose answer has to fit a JSON schema, which the model is not shown.

The server's grammar writes what the schema fixes; the model chooses the values, by the names of the
keys and by what the user says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quire.engine.demo.training.corpus_draw import Draw
from quire.engine.demo.training.corpus_exchange import Exchange
from quire.engine.demo.training.corpus_thoughts import columns, thought
from quire.engine.demo.training.corpus_words import COLORS, FOODS, NOUNS, PEOPLE_JOBS, words

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_INTEGER: Schema = {"type": "integer"}
_TRUTH: Schema = {"type": "boolean"}
_TEXTS: Schema = {"type": "array", "items": _TEXT}

_NAMES = ("name", "name", "full_name", "first_name", "person", "who")
# Per fact about a person: the keys that may hold it, and how it is said.
_FACTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "age": (
        ("age", "age", "years", "age_in_years"),
        ("is {v} years old", "is {v}", "turned {v}", "is aged {v}"),
    ),
    "city": (
        ("city", "city", "town", "location", "home", "place", "lives_in"),
        ("lives in {v}", "is from {v}", "comes from {v}", "moved to {v}"),
    ),
    "job": (
        ("job", "job", "profession", "occupation", "role", "work"),
        ("works as a {v}", "is a {v}", "became a {v}"),
    ),
    "color": (
        ("color", "favorite_color", "colour", "likes_color"),
        ("likes the color {v}", "loves {v}", "wears {v}"),
    ),
    "food": (("food", "favorite_food", "eats", "dish", "meal"), ("eats {v}", "likes to eat {v}")),
}
_SUMS = (
    "[what is|what's|how much is|calculate|compute|] {a} [+|plus] {b}[?|]",
    "add {a} [and|to] {b}",
    "what is the sum of {a} and {b}?",
    "{a} + {b}",
)
_DAYS = words(
    "Monday Tuesday Wednesday Thursday Friday Saturday Sunday today tomorrow January June July"
)
_EVENTS = (
    "science fair",
    "concert",
    "party",
    "meeting",
    "picnic",
    "dinner",
    "wedding",
    "football game",
    "birthday party",
    "book club",
    "{n} show",
    "{n} fair",
)


def _object(values: Mapping[str, Any], kinds: Mapping[str, Schema]) -> Schema:
    return {
        "type": "object",
        "properties": {key: kinds[key] for key in values},
        "required": list(values),
        "additionalProperties": False,
    }


def _answer(question: str, values: dict[str, Any], kinds: Mapping[str, Schema]) -> Exchange:
    content = json.dumps(values, ensure_ascii=False)
    return Exchange(
        "schema",
        [{"role": "user", "content": question}],
        {"role": "assistant", "content": content},
        (content,),
        schema=_object(values, kinds),
    )


def _join(parts: list[str], comma: str = "") -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + f"{comma} and " + parts[-1]


def _person(draw: Draw) -> Exchange:
    """What is said of a person; now and then a key asks for more, and the value is null."""
    said = draw.random.sample(list(_FACTS), draw.choice((1, 1, 2, 2, 3)))
    made = {
        "age": lambda: draw.number(1, 99),
        "city": draw.city,
        "job": lambda: draw.value(PEOPLE_JOBS),
        "color": lambda: draw.value(COLORS),
        "food": lambda: draw.value(FOODS),
    }
    name = draw.name()
    facts: dict[str, Any] = {fact: made[fact]() for fact in said}
    clauses = [draw.choice(_FACTS[fact][1]).format(v=value) for fact, value in facts.items()]
    sentence = f"{name} {_join(clauses)}"
    asked = [fact for fact in said if draw.chance(0.85)]
    if draw.chance(0.2):
        asked.append(draw.choice([fact for fact in _FACTS if fact not in said]))
    values: dict[str, Any] = {}
    kinds: dict[str, Schema] = {}
    for fact in asked:
        key = draw.choice(_FACTS[fact][0])
        values[key] = facts.get(fact)
        kind = "integer" if fact == "age" else "string"
        # Where nothing is said the schema has to allow null; where something is, it may.
        may_be_null = fact not in facts or draw.chance(0.15)
        kinds[key] = {"type": [kind, "null"]} if may_be_null else {"type": kind}
    if not values or draw.chance(0.9):
        key = draw.choice(_NAMES)
        kinds[key] = _TEXT
        values = {key: name, **values}
    if draw.chance(0.3):
        keys = list(values)
        draw.random.shuffle(keys)
        values = {key: values[key] for key in keys}
    frame = (
        "[|||[extract|find|get|read] [the person|the data|the facts][:| from this:] |who is it? ]"
    )
    question = draw.ask(frame + "{s}", {"s": sentence}) + draw.choice((".", ".", "", "!"))
    return _answer(question, values, kinds)


def _sum(draw: Draw) -> Exchange:
    a, b = draw.pair(0, 99)
    keys = draw.choice((("a", "b"), ("x", "y"), ("first", "second"), ("left", "right")))
    values: dict[str, Any] = dict(zip(keys, (a, b), strict=True)) if draw.chance(0.25) else {}
    kinds = dict.fromkeys(keys, _INTEGER)
    if draw.chance(0.12):
        key = draw.choice(("explanation", "text", "sentence", "calculation"))
        values[key], kinds[key] = f"{a} + {b} = {a + b}.", _TEXT
    key = draw.choice(("answer", "answer", "result", "sum", "total", "value", "number"))
    values[key], kinds[key] = a + b, {"type": draw.choice(("integer", "integer", "number"))}
    if draw.chance(0.2):
        key = draw.choice(("sure", "correct", "confident", "ok", "done"))
        values[key], kinds[key] = True, _TRUTH
    question = draw.ask(draw.choice(_SUMS), {"a": a, "b": b}, copied=False)
    return replace(_answer(question, values, kinds), thought=columns(a, b))


def _event(draw: Draw) -> Exchange:
    event = draw.choice(_EVENTS).format(n=draw.choice(NOUNS))
    people = [draw.name() for _ in range(draw.choice((1, 2, 2, 2, 3)))]
    day = draw.choice(_DAYS)
    when = day if day in ("today", "tomorrow") else f"{'in' if day[0] == 'J' else 'on'} {day}"
    go = draw.choice(("going to", "at", "invited to"))
    verb = "is" if len(people) == 1 else "are"
    article = draw.choice(("a", "the"))
    sentence = f"{_join(people)} {verb} {go} {article} {event} {when}."
    frame = "[||[extract|find] the event[|s][:| information:] ]"
    question = draw.ask(frame + "{s}", {"s": sentence})
    values = {
        draw.choice(("name", "event", "title", "event_name")): event,
        draw.choice(("date", "day", "when")): day,
        draw.choice(("participants", "people", "names", "guests")): people,
    }
    kinds = dict(zip(values, (_TEXT, _TEXT, _TEXTS), strict=True))
    if draw.chance(0.3):
        del values[draw.choice(list(values))]
    return _answer(question, values, kinds)


def _things(draw: Draw) -> Exchange:
    """A list, or a number of things."""
    if draw.chance(0.5):
        count, thing = draw.number(2, 99), draw.choice(FOODS + [f"{noun}s" for noun in NOUNS])
        pattern = "[I want|I would like|I need|I have|please send|order|buy|we sold] {a} {n}"
        values: dict[str, Any] = {
            draw.choice(("item", "product", "thing", "name", "what")): thing,
            draw.choice(("count", "quantity", "amount", "number", "how_many")): count,
        }
        kinds = dict(zip(values, (_TEXT, _INTEGER), strict=True))
        if draw.chance(0.3):
            values = dict(reversed(values.items()))
        return _answer(draw.ask(pattern, {"a": count, "n": thing}), values, kinds)
    made = draw.choice((lambda: draw.choice(NOUNS), lambda: draw.value(FOODS), draw.name))
    items = [made() for _ in range(draw.number(2, 5))]
    pattern = "[I bought|I saw|we need|my list:|list:|they are|write down|remember] {s}"
    key = draw.choice(("items", "items", "list", "things", "words", "names", "values"))
    question = draw.ask(pattern, {"s": _join(items)}) + draw.choice(("", "."))
    return _answer(question, {key: items}, {key: _TEXTS})


_MAKERS = (_person, _sum, _event, _things)
_WEIGHTS = (40, 26, 20, 14)


def fill(draw: Draw) -> Exchange:
    """A message, and the values in it that a schema asks for."""
    while True:
        exchange: Exchange = draw.random.choices(_MAKERS, _WEIGHTS)[0](draw)
        if draw.owns(exchange.prompt[0]["content"]):
            return exchange


def wrap(draw: Draw, exchange: Exchange) -> Exchange:
    """``exchange`` with its reply as the only text of an object."""
    key = draw.choice(("answer", "answer", "reply", "text", "message", "response", "content"))
    made = _answer("", {key: exchange.reply["content"]}, {key: _TEXT})
    accepted = tuple(json.dumps({key: reply}, ensure_ascii=False) for reply in exchange.accepted)
    return replace(
        exchange,
        ability="schema",
        reply=made.reply,
        accepted=accepted,
        thought=thought(exchange),
        schema=made.schema,
    )
