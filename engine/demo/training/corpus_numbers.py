"""Sums, differences, small products and counting."""

from __future__ import annotations

from dataclasses import replace

from quire.engine.demo.training.corpus_draw import Draw
from quire.engine.demo.training.corpus_exchange import Exchange, say
from quire.engine.demo.training.corpus_thoughts import columns
from quire.engine.demo.training.corpus_words import NOUNS, words

_UNITS = words("""
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
sixteen seventeen eighteen nineteen
""")
_TENS = words("twenty thirty forty fifty sixty seventy eighty ninety")


def spelled(number: int) -> str:
    """``number`` (0 to 99) in words, such as "forty-seven"."""
    if number < 20:
        return _UNITS[number]
    tens, units = divmod(number, 10)
    return _TENS[tens - 2] + (f"-{_UNITS[units]}" if units else "")


_ADD = (
    "[what is|what's|whats|how much is|calculate|compute|can you tell me|tell me|solve|work out|] "
    "{a}[ + |+]{b}",
    "{a}[ + |+]{b}[ =|=|?| = ?|]",
    "[what is|what's|how much is|how much does|calculate|compute] {a} [plus|and|added to] {b}",
    "[what is|what's|how much is] {a} [+|plus] {b}?",
    "[please |can you |could you |]add {a} [and|to|plus] {b}",
    "[what is|what's|find|tell me|give me|calculate] the sum of {a} and {b}",
    "[what do you get|what is it] [if you|when you|when I|if I] add {a} [and|to] {b}?",
    "{a} plus {b}[|?| is| equals| makes]",
    "I have {a} {n}s and get {b} more. How many [do I have|are there|is that][| now]?",
    "[do|try] [|this sum: |this: ]{a} + {b}",
    "[I need|do you know|can you do|can you calculate|can you compute] {a} + {b}[|?]",
    "[what is|what's] [the result of|the answer to|the total of] {a} + {b}?",
)
_SUBTRACT = (
    "[what is|what's|how much is|calculate|compute|] {a}[ - |-]{b}",
    "{a}[ - |-]{b}[ =|=|?|]",
    "[what is|what's|how much is] {a} [minus|less|take away] {b}?",
    "[subtract|take] {b} from {a}",
    "{a} minus {b}",
)
_MULTIPLY = (
    "[what is|what's|how much is|calculate|compute|] {a}[ * | x |*| \u00d7 ]{b}",
    "{a}[ * | x |*| \u00d7 ]{b}[ =|=|?|]",
    "[what is|what's|how much is] {a} [times|multiplied by] {b}?",
    "multiply {a} [by|and|with] {b}",
    "{a} times {b}",
)
_BARE = (
    ". [Just|Only] the number.",
    "? [Answer|Reply] with [just|only] the number.",
    "? [Just|Only] the [number|result], please.",
    " ([just|only] the number)",
)
_TOO_BIG = (
    "[what is|what's|calculate|] {a} [+|-|*|plus|minus|times] {b}",
    "add {a} and {b}",
    "{a}[+|*|-]{b}",
)
TOO_BIG = "That is too large for me: I add and subtract numbers below 1000."


def arithmetic(draw: Draw) -> Exchange:
    roll = draw.random.random()
    if roll < 0.66:
        top = 999 if draw.chance(0.25) else 99
        a, b = draw.pair(0, top)
        slots: dict[str, object] = {"a": a, "b": b, "n": draw.choice(NOUNS)}
        if top == 99 and draw.chance(0.12):
            slots |= {"a": spelled(a), "b": spelled(b)}
        if draw.chance(0.1):
            question = draw.ask(draw.choice(_ADD[1:5]) + draw.choice(_BARE), slots, copied=False)
            return replace(say("add", question, str(a + b)), thought=columns(a, b))
        if draw.chance(0.05):
            a, b = draw.pair(0, 30)
            c = draw.number(0, 30)
            pattern = draw.choice(("[what is|what's|calculate|] {a} + {b} + {c}", "{a}+{b}+{c}"))
            question = draw.ask(pattern, {"a": a, "b": b, "c": c}, copied=False)
            exchange = say("add", question, f"{a} + {b} + {c} = {a + b + c}.")
            return replace(
                exchange, thought=f"{a} + {b} = {a + b}, then {a + b} + {c} = {a + b + c}."
            )
        question = draw.ask(draw.choice(_ADD), slots, copied=False)
        return replace(say("add", question, f"{a} + {b} = {a + b}."), thought=columns(a, b))
    if roll < 0.87:
        a, b = draw.pair(0, 999 if draw.chance(0.3) else 120)
        a, b = max(a, b), min(a, b)
        if not draw.owns(str((a, b))):
            return arithmetic(draw)
        question = draw.ask(draw.choice(_SUBTRACT), {"a": a, "b": b}, copied=False)
        return say("subtract", question, f"{a} - {b} = {a - b}.")
    if roll < 0.96:
        # A table of 144 entries is learnt by heart, so here only the wording is held out.
        a, b = draw.number(0, 12), draw.number(0, 12)
        question = draw.unseen(
            lambda: draw.ask(draw.choice(_MULTIPLY), {"a": a, "b": b}, copied=False)
        )
        return say("multiply", question, f"{a} * {b} = {a * b}.")
    low, high = 10 ** draw.number(3, 5), 10 ** draw.number(6, 8)
    a, b = draw.pair(low, high)
    return say("unknown", draw.ask(draw.choice(_TOO_BIG), {"a": a, "b": b}, copied=False), TOO_BIG)


_COUNT = (
    "[count|please count|can you count|count up] to {b}",
    "[count|please count|can you count] from {a} to {b}",
    "[list|write|say|give me] the numbers from {a} to {b}",
)


def count(draw: Draw) -> Exchange:
    while True:
        pattern = draw.choice(_COUNT)
        low = draw.number(0, 60) if "{a}" in pattern else 1
        high = low + draw.number(2, 19)
        ends = (spelled(low), spelled(high)) if draw.chance(0.3) else (str(low), str(high))
        question = draw.ask(pattern, {"a": ends[0], "b": ends[1]}, copied=False)
        if draw.owns(question):
            return say("count", question, ", ".join(map(str, range(low, high + 1))) + ".")
