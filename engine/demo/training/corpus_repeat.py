"""Exchanges in which the model repeats what it is told."""

from __future__ import annotations

from quire.engine.demo.training.corpus_about import ITSELF, SMALL_TALK
from quire.engine.demo.training.corpus_draw import Draw
from quire.engine.demo.training.corpus_exchange import Exchange, Memory, say
from quire.engine.demo.training.corpus_quire import QUIRE
from quire.engine.demo.training.corpus_texts import TEXTS

KNOWN_QUESTIONS = [
    question
    for topics in (SMALL_TALK, ITSELF, QUIRE, TEXTS)
    for topic in topics.values()
    for question in topic.questions
]

_REPEAT_ALL = (
    "[repeat|say|say it|echo|write|print|copy|type][| this| back| exactly| now]: {p}",
    "[please |]repeat [after me|this|the following|exactly|exactly this|the words|my words]: {p}",
    "[please |can you |could you |now ]repeat after me[:|,] {p}",
    "[repeat|say|write] after me[:|,] {p}",
    "[please |now |just |]say the [word|words|phrase|sentence]: {p}",
    "[reply|respond|answer] [with|only with|with only|with just|with exactly]: {p}",
    "[say|repeat] [exactly|only|just]: {p}",
    "repeat this [word|phrase|sentence|text] [for me|exactly|back to me]: {p}",
    "[type|write|say|echo]: {p}",
)
# Here a final full stop ends the request and is not part of the phrase.
_REPEAT_PLAIN = (
    "[please |now |just |only |simply |you should |I want you to |go ahead and |]say {p}",
    "[please |now |just |only |]say [|only ]the [word|words|phrase|sentence] {p}",
    "[please |now |just |]echo {p}",
    "[please |now |just |]repeat {p}",
    "[reply|respond|answer] [with|only with|with only|with just|with exactly] [|the word ]{p}",
    "[say|repeat] [exactly|only|just] {p}",
    "repeat after me {p}",
    "[type|write] {p}",
)
_REPEAT_ONLY = (
    "[reply|respond|answer] with [|the word ]{p} [only|and nothing else|and nothing more]",
    "[say|write|repeat] [|the word ]{p} [and nothing else|only|and nothing more]",
    "[say|repeat] [|the word ]{p} for me",
)
_TIMES = (
    "[say|repeat|write|echo] [|the word ]{p} {t}",
    "[say|repeat|write|echo] [|the word ]{p} {t}[ please| for me]",
    '[say|repeat|write] "{p}" {t}',
)
_COUNTS = {
    2: ("twice", "two times", "2 times"),
    3: ("three times", "3 times"),
    4: ("four times", "4 times"),
    5: ("five times", "5 times"),
}
_AGAIN = (
    "[again|once more|one more time|again please|say it again|say that again|repeat that|repeat "
    "it]",
    "[can you|could you|please] [repeat|say] that[| again]?",
    "[repeat|say again] [your|the] last [answer|message|reply]",
    "what did you [just |]say?",
)
_REPEAT_QUOTED = (
    "[please |now |can you |could you |just |]say {q}[| please| for me]",
    "[please |now |can you |could you |just |][repeat|echo|write|print|type] {q}[| please| for me]",
    "[say|repeat] [the word|the words|the phrase|the sentence|exactly] {q}",
    "[reply|respond|answer] with {q}[| and nothing else| only]",
    "[say|repeat] {q} and nothing else",
    "I want you to [say|repeat] {q}",
)
_REPEAT_ASKED = (
    "[can|could|would|will] you [please |][say|repeat|echo] {p}?",
    "[can|could|would|will] you repeat after me: {p}?",
    "[how about you say|why don't you say] {p}?",
)


def repeat(draw: Draw) -> Exchange:
    phrase = draw.phrase(12)
    if draw.chance(0.12):
        known = draw.choice(KNOWN_QUESTIONS)
        phrase = draw.unseen(lambda: draw.roughen(draw.spin(known)).strip(" .!?"))
    roll = draw.random.random()
    if roll < 0.08:
        word = draw.unseen(draw.word)
        times = draw.number(2, 5)
        slots = {"p": word, "t": draw.choice(_COUNTS[times])}
        return say("repeat", draw.ask(draw.choice(_TIMES), slots), " ".join([word] * times))
    if roll < 0.16:
        phrase = draw.phrase(2)
        return say("repeat", draw.ask(draw.choice(_REPEAT_ONLY), {"p": phrase}), phrase)
    if roll < 0.36:
        phrase += draw.choice(("", "", "", "", "!", "?"))
        stop = "." if phrase[-1] not in "!?" and draw.chance(0.2) else ""
        return say("repeat", draw.ask(draw.choice(_REPEAT_PLAIN), {"p": phrase}) + stop, phrase)
    if roll < 0.65:
        mark = draw.choice(("", "", "", "", "", ".", "!", "?"))
        phrase += mark
        question = draw.ask(draw.choice(_REPEAT_ALL), {"p": phrase})
    elif roll < 0.9:
        if draw.chance(0.1):
            phrase += draw.choice(".!?")
        mark = draw.choice('"""\'')
        question = draw.ask(draw.choice(_REPEAT_QUOTED), {"q": f"{mark}{phrase}{mark}"})
    else:
        question = draw.ask(draw.choice(_REPEAT_ASKED), {"p": phrase})
    return say("repeat", question, phrase)


def again(draw: Draw, memory: Memory) -> Exchange:
    """The user wants to hear the last reply once more."""
    question = draw.unseen(lambda: draw.ask(draw.choice(_AGAIN)))
    return say("again", question, memory.said)
