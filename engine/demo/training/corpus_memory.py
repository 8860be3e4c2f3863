"""Facts that the user tells and asks for later in the conversation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from quire.engine.demo.training.corpus_draw import Draw
from quire.engine.demo.training.corpus_exchange import Exchange, Memory, say
from quire.engine.demo.training.corpus_words import CITIES, COLORS, FOODS, NOUNS, PEOPLE_JOBS


@dataclass(frozen=True)
class Fact:
    """Something a user can say about themselves, and how it is asked for and told back."""

    value: Callable[[Draw], str]
    told: tuple[str, ...]
    asked: tuple[str, ...]
    answer: str
    missing: str
    heard: str = ""  # the reply to being told; "Got it: " and the answer when empty


def _called(what: str) -> Fact:
    return Fact(
        lambda draw: draw.name(),
        (
            f"my {what} is [called|named] {{v}}",
            f"I have a {what} [called|named] {{v}}",
            f"[my {what}'s name|the name of my {what}] is {{v}}",
        ),
        (
            f"what is [my {what}'s name|my {what} called|the name of my {what}]?",
            f"what's [my {what}'s name|my {what} called|the name of my {what}]?",
            f"[how is my {what} called|do you know my {what}'s name|who is my {what}]?",
        ),
        f"Your {what} is called {{v}}.",
        f"You have not told me about your {what} yet.",
    )


def _favorite(what: str, values: list[str]) -> Fact:
    liked = "[favorite|favourite]"
    return Fact(
        lambda draw: draw.value(values),
        (
            f"my {liked} {what} is {{v}}",
            f"{{v}} is my {liked} {what}",
            f"I like {{v}}, it is my {liked} {what}",
        ),
        (
            f"[what is|what's|tell me|do you remember|do you know] my {liked} {what}?",
            f"[what|which] {what} do I like[| best| most]?",
        ),
        f"Your favorite {what} is {{v}}.",
        f"You have not told me your favorite {what} yet.",
    )


def _thing(what: str) -> Fact:
    return Fact(
        lambda draw: (
            draw.unseen(lambda: str(draw.number(10, 10 ** draw.number(2, 6))))
            if draw.chance(0.5)
            else draw.phrase(2)
        ),
        (
            f"[remember|please remember|note|keep in mind|remember that] [that |]the {what} is "
            f"{{v}}",
            f"the {what} is {{v}}",
            f"[remember|store|save] [the|this] {what}: {{v}}",
        ),
        (
            f"what [is|was] the {what}[| again]?",
            f"[what's|tell me|do you remember|do you know|repeat] the {what}[|?]",
            f"[what did I say|which|what] {what} did I [tell you|give you|say]?",
        ),
        f"The {what} is {{v}}.",
        f"You have not told me the {what} yet.",
    )


FACTS: dict[str, Fact] = {
    "name": Fact(
        Draw.name,
        (
            "my name is {v}",
            "[hi|hello|hey][,|!|] my name is {v}",
            "[hi|hello|hey][,|!|] I am {v}",
            "[hi|hello|hey][,|!|] I'm {v}",
            "[I am|I'm|call me|people call me|you can call me|it's|this is] {v}",
            "my [first |]name's {v}",
            "[the name is|actually my name is|please call me|remember that my name is] {v}",
        ),
        (
            "[what is|what's|whats|tell me|do you know|do you remember|say|can you tell me|and "
            "what is] my name[|?]",
            "who am I?",
            "[what am I called|how am I called|what did I say my name was|what was my name]?",
            "[do you remember|do you know] [who I am|me|my name]?",
        ),
        "Your name is {v}.",
        "You have not told me your name yet.",
        "Nice to meet you, {v}.",
    ),
    "age": Fact(
        lambda draw: draw.unseen(lambda: str(draw.number(3, 99))),
        (
            "I am {v} years old",
            "I'm {v} years old",
            "my age is {v}",
            "I [just |]turned {v}[| today]",
        ),
        ("how old am I?", "[what is|what's|do you know|tell me] my age[|?]"),
        "You are {v} years old.",
        "You have not told me your age yet.",
    ),
    "city": Fact(
        Draw.city,
        ("I live in {v}", "I am from {v}", "I'm from {v}", "my [home|city|home town] is {v}"),
        (
            "where [do I live|am I from]?",
            "[what is|what's] my [city|home|home town]?",
            "[which|what] city do I live in?",
            "do you [know|remember] where I live?",
        ),
        "You live in {v}.",
        "You have not told me where you live yet.",
    ),
    "job": Fact(
        lambda draw: draw.value(PEOPLE_JOBS),
        ("I work as [a|an] {v}", "my job is {v}", "I am [a|an] {v}", "I'm [a|an] {v}"),
        (
            "[what is|what's] my [job|work|profession]?",
            "what do I do [for a living|for work]?",
            "[where|what] do I work[| as]?",
        ),
        "Your job is {v}.",
        "You have not told me your job yet.",
    ),
    **{
        what: _called(what)
        for what in (
            "dog",
            "cat",
            "sister",
            "brother",
            "friend",
            "boss",
            "son",
            "daughter",
            "horse",
        )
    },
    "like": Fact(
        lambda draw: draw.phrase(2) if draw.chance(0.4) else draw.value(NOUNS + FOODS),
        ("I [like|love|enjoy] {v}", "I [really |]like {v}", "I [like|love] {v} a lot"),
        ("what do I [like|love|enjoy]?", "do you [know|remember] what I [like|love]?"),
        "You like {v}.",
        "You have not told me what you like yet.",
    ),
    "color": _favorite("[color|colour]", COLORS),
    "food": _favorite("food", FOODS),
    "animal": _favorite("animal", NOUNS),
    "place": _favorite("city", CITIES),
    **{
        what: _thing(what)
        for what in (
            "password",
            "code",
            "secret word",
            "number",
            "secret number",
            "key",
            "door code",
            "magic word",
            "word",
            "room number",
            "secret",
            "answer",
            "order number",
        )
    },
}
_AFTERWORDS = ("", "", "", "", "", " [remember that|please remember it|don't forget]")


def _resolve(text: str) -> str:
    # The answers spell one way what users may spell in two.
    return text.replace("[color|colour]", "color")


def _answer(kind: str, value: str) -> str:
    return _resolve(FACTS[kind].answer).format(v=value)


def _fact(draw: Draw, kind: str) -> tuple[str, str]:
    fact = FACTS[kind]
    value = fact.value(draw)
    return draw.choice(fact.told), value


def told(draw: Draw, memory: Memory) -> Exchange:
    """The user states a fact, which is remembered."""
    if draw.chance(0.15):
        return _told_two(draw, memory)
    kind = "name" if draw.chance(0.35) else draw.choice(list(FACTS))
    pattern, value = _fact(draw, kind)
    memory.facts[kind] = value
    memory.recent = kind
    ending = draw.spin(draw.choice(_AFTERWORDS))
    mark = "" if ending else draw.choice(("", "!", ".", "."))
    question = draw.ask(pattern + mark, {"v": value})
    heard = FACTS[kind].heard
    answer = heard.format(v=value) if heard else f"Got it. {_answer(kind, value)}"
    return say("told", question + (f".{ending}" if ending else ""), answer)


def _told_two(draw: Draw, memory: Memory) -> Exchange:
    kinds = draw.random.sample(list(FACTS), 2)
    if draw.chance(0.4) and "name" not in kinds:
        kinds[0] = "name"
    said = []
    answers = []
    for kind in kinds:
        pattern, value = _fact(draw, kind)
        memory.facts[kind] = value
        memory.recent = kind
        said.append(draw.spin(pattern).format(v=value))
        answers.append(_answer(kind, value))
    joint = draw.choice((" and ", ", ", ". ", " and ", ", and "))
    first = FACTS[kinds[0]].heard.format(v=memory.facts[kinds[0]])
    question = joint.join(said) + draw.choice(("", ".", "!"))
    question = question[:1].upper() + question[1:] if draw.chance(0.6) else question
    return say("told", question, f"{first or 'Got it. ' + answers[0]} {answers[1]}")


def asked(draw: Draw, memory: Memory) -> Exchange:
    """The user asks for a fact, told before or never told."""
    known = list(memory.facts)
    if known and draw.chance(0.85):
        recent = memory.recent in memory.facts and draw.chance(0.3)
        kind = memory.recent if recent and memory.recent else draw.choice(known)
        answer = _answer(kind, memory.facts[kind])
        return say("recall", draw.ask(draw.choice(FACTS[kind].asked)), answer)
    while True:
        kind = "name" if draw.chance(0.3) else draw.choice(list(FACTS))
        question = draw.ask(draw.choice(FACTS[kind].asked))
        if kind not in memory.facts and draw.owns(question):
            return say("recall", question, _resolve(FACTS[kind].missing))


def told_and_asked(draw: Draw, memory: Memory) -> Exchange:
    """One message that states one to three facts and asks for one of them."""
    kinds = draw.random.sample(list(FACTS), draw.choice((1, 1, 2, 2, 3)))
    if draw.chance(0.3):
        kinds[0] = "name"
    sentences = []
    for kind in dict.fromkeys(kinds):
        pattern, value = _fact(draw, kind)
        memory.facts[kind] = value
        memory.recent = kind
        sentence = draw.spin(pattern)
        if draw.chance(0.6) and sentence[:1] != "{":
            sentence = sentence[:1].upper() + sentence[1:]
        sentences.append(sentence.format(v=value))
    kind = draw.choice(kinds)
    joint = draw.choice((". ", " and "))
    question = joint.join(sentences) + ". " + draw.ask(draw.choice(FACTS[kind].asked))
    return say("recall", question, _answer(kind, memory.facts[kind]))
