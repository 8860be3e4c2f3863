"""Seeded draws of names, words, phrases and numbers, split into training and held-out values."""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from quire.engine.demo.training.corpus_words import (
    ADJECTIVES,
    CITIES,
    LONG_CITIES,
    NAMES,
    NOUNS,
    REGIONS,
    VERBS,
    words,
)

T = TypeVar("T")

_ONSETS = words("""
b c d f g h j k l m n p r s t v w y z bl br ch cl cr dr fl fr gl gr kr pl pr qu sh sk sl sn sp st
th tr vr zw x
""")
_VOWELS = words("""
a e i o u a e i o u ai ea ee oo ou ay y
""")
_CODAS = words("""
b ck d f g l m n p r s t x z nd nk rt st ll ng mp sh th v k
""")
_ACCENTED = "éèüöäñçøåßłžšīōπλдж日本語한글🙂🚀✓"

OPENERS = ("hey, ", "hi, ", "hello, ", "please ", "so ", "ok, ", "now ", "well, ", "and ", "hi! ")
ENDINGS = (" please", ", please", " now", ", quire", ", thanks", " for me")

_ALTERNATIVES = re.compile(r"\[([^\[\]]*)\]")
_PARTS = re.compile(r"(\{\w+\})")


class Draw:
    """A source of random choices that belongs to one of the two halves of the corpus.

    Every value that a reply depends on (a name, a phrase, a pair of numbers, the wording of a
    question) hashes to one half, a tenth of them to the held-out one, so the two never share one.
    """

    def __init__(self, seed: int, *, held_out: bool = False) -> None:
        self.random = random.Random(f"{seed}:{held_out}")
        self.held_out = held_out

    def owns(self, text: str) -> bool:
        """Whether ``text``, ignoring case and outer punctuation, is in this half of the corpus."""
        key = text.lower().strip(" \n.,!?\"'")
        return (zlib.crc32(key.encode()) % 10 == 0) == self.held_out

    def unseen(self, make: Callable[[], T]) -> T:
        """The first result of ``make`` that this half owns."""
        for _ in range(2000):
            value = make()
            if self.owns(str(value)):
                return value
        raise ValueError(f"{make} gives nothing that this half of the corpus owns")

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def choice(self, items: Sequence[T]) -> T:
        return items[self.random.randrange(len(items))]

    def pick(self, items: Sequence[str]) -> str:
        """One of ``items`` that this half owns."""
        return self.unseen(lambda: self.choice(items))

    def number(self, low: int, high: int) -> int:
        """An integer between ``low`` and ``high``, both included, of either half."""
        return self.random.randint(low, high)

    def invented(self) -> str:
        """A made-up lower-case word such as "blorvax", of either half."""
        if self.chance(0.15):
            length = self.number(2, 9)
            return "".join(self.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(length))
        word = ""
        for _ in range(self.choice((1, 2, 2, 2, 3, 3))):
            word += self.choice(_ONSETS) + self.choice(_VOWELS)
            if self.chance(0.45):
                word += self.choice(_CODAS)
        return word

    def name(self) -> str:
        """A person's name of this half; half of them are made up."""
        if self.chance(0.5):
            name = self.pick(NAMES)
            return name.lower() if self.chance(0.08) else name
        return self.unseen(self.invented).capitalize()

    def city(self) -> str:
        """A city of this half; a third of them are made up."""
        roll = self.random.random()
        if roll < 0.5:
            return self.pick(CITIES)
        if roll < 0.58:
            return self.pick(LONG_CITIES)
        if roll < 0.62:
            return self.unseen(lambda: f"{self.invented()} {self.invented()}".title())
        return self.unseen(self.invented).capitalize()

    def place(self) -> str:
        """A city, now and then with its region, such as "Boston, MA"."""
        city = self.city()
        return f"{city}, {self._region()}" if self.chance(0.15) else city

    def _region(self) -> str:
        if self.chance(0.3):
            return "".join(self.choice("ABCDEFGHIJKLMNOPRSTUVWXYZ") for _ in range(2))
        return self.choice(REGIONS)

    def value(self, options: Sequence[str]) -> str:
        """A value of this half: one of ``options``, or now and then a made-up word."""
        owned = [word for word in options if self.owns(word)]
        if owned and self.chance(0.75):
            return self.choice(owned)
        return self.unseen(self.invented)

    def pair(self, low: int, high: int) -> tuple[int, int]:
        """Two numbers whose ordered pair this half owns."""
        return self.unseen(lambda: (self.number(low, high), self.number(low, high)))

    def word(self) -> str:
        roll = self.random.random()
        if roll < 0.3:
            return self.choice(NOUNS)
        if roll < 0.45:
            return self.choice(ADJECTIVES)
        if roll < 0.55:
            return self.choice(VERBS)
        if roll < 0.62:
            return self.choice(NAMES + CITIES)
        if roll < 0.68:
            return str(self.number(0, 10 ** self.number(1, 6)))
        if roll < 0.7:
            return "".join(self.choice(_ACCENTED) for _ in range(self.number(1, 4)))
        return self.invented()

    def sentence(self) -> str:
        noun, adjective, verb = NOUNS, ADJECTIVES, VERBS
        form = self.choice(
            (
                "the {a} {n} {v}",
                "the {n} {v} the {m}",
                "a {a} {n} {v} in the {m}",
                "I like the {a} {n}",
                "my {n} is {a}",
                "{a} {n} and {b} {m}",
                "every {n} {v} near a {a} {m}",
                "we saw a {a} {n} by the {m}",
            )
        )
        return form.format(
            n=self.choice(noun),
            m=self.choice(noun),
            a=self.choice(adjective),
            b=self.choice(adjective),
            v=self.choice(verb),
        )

    def phrase(self, most: int = 8) -> str:
        """Up to ``most`` words to be repeated or remembered; this half owns the whole of it."""
        return self.unseen(lambda: self._phrase(most))

    def _phrase(self, most: int) -> str:
        if most > 3 and self.chance(0.2):
            text = self.sentence()
        else:
            count = min(most, self.choice((1, 1, 1, 2, 2, 3, 3, 4, 5, 6, 8, 12)))
            chosen = [self.word() for _ in range(count)]
            if self.chance(0.08):
                chosen = chosen[: max(1, count // 2)] * 2
            if self.chance(0.04):
                chosen = chosen[:1] * self.number(2, 5)
            text = " ".join(chosen)
            if len(chosen) > 2 and self.chance(0.08):
                text = ", ".join(chosen)
            if len(chosen) > 1 and self.chance(0.03):
                text = "-".join(chosen)
        roll = self.random.random()
        if roll < 0.12:
            return text.capitalize()
        if roll < 0.17:
            return text.upper()
        if roll < 0.22:
            return text.title()
        return text

    def spin(self, text: str) -> str:
        """Choose one alternative in each ``[a|b]`` of ``text``, innermost first."""
        while True:
            spun = _ALTERNATIVES.sub(lambda match: self.choice(match[1].split("|")), text)
            if spun == text:
                return text
            text = spun

    def ask(
        self, pattern: str, slots: Mapping[str, object] | None = None, *, copied: bool = True
    ) -> str:
        """A user's message: ``pattern`` spun, roughened as people type, its ``{slots}`` filled.

        ``copied`` says that the reply copies a slot, so nothing may follow one that ends it.
        """
        # A misspelt "only" could change what has to be copied.
        text = self.roughen(self._politely(self.spin(pattern), copied), misspell=not slots)
        return text.format(**slots) if slots else text

    def _politely(self, text: str, copied: bool) -> str:
        if self.chance(0.1):
            text = self.choice(OPENERS) + text
        if self.chance(0.1) and not (copied and text.rstrip(".?!").endswith("}")):
            mark = text[-1:] if text[-1:] in "?." else ""
            text = text[: len(text) - len(mark)] + self.choice(ENDINGS) + mark
        return text

    def roughen(self, text: str, *, misspell: bool = True) -> str:
        """Vary case and the last punctuation mark, and now and then misspell a word."""
        if self.chance(0.04):
            text = "".join(p if p[:1] == "{" else p.upper() for p in _PARTS.split(text))
        elif self.chance(0.3):
            text = "".join(p if p[:1] == "{" else p.lower() for p in _PARTS.split(text))
        elif text[:1] != "{" and self.chance(0.75):
            text = text[:1].upper() + text[1:]
        if text[-1:] in "?." and self.chance(0.3):
            text = text[:-1]
        elif text[-1:].isalpha() and self.chance(0.08):
            text += self.choice(("!", ".", "?", "..."))
        if misspell and self.chance(0.06):
            parts = _PARTS.split(text)
            at = self.random.randrange(len(parts))
            if parts[at][:1] != "{":
                parts[at] = self._misspell(parts[at])
            text = "".join(parts)
        return text

    def _misspell(self, text: str) -> str:
        places = [i for i in range(1, len(text) - 2) if text[i : i + 2].isalpha()]
        if not places:
            return text
        at = self.choice(places)
        kind = self.random.randrange(3)
        if kind == 0:
            return text[:at] + text[at + 1] + text[at] + text[at + 2 :]
        if kind == 1:
            return text[:at] + text[at + 1 :]
        return text[:at] + text[at] + text[at:]
