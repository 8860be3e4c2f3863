"""The conversations that the demo model is trained and measured on, generated from a seed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from quire.engine.demo.training.corpus_about import ITSELF, SMALL_TALK, Topic
from quire.engine.demo.training.corpus_draw import Draw
from quire.engine.demo.training.corpus_exchange import Exchange, Memory, Message, say
from quire.engine.demo.training.corpus_json import json_object
from quire.engine.demo.training.corpus_memory import asked, told, told_and_asked
from quire.engine.demo.training.corpus_numbers import arithmetic, count
from quire.engine.demo.training.corpus_quire import QUIRE
from quire.engine.demo.training.corpus_repeat import again, repeat
from quire.engine.demo.training.corpus_schema import fill, wrap
from quire.engine.demo.training.corpus_texts import TEXTS
from quire.engine.demo.training.corpus_thoughts import thought
from quire.engine.demo.training.corpus_tools import Toolbox, tool_call, toolbox, without_tool
from quire.engine.demo.training.corpus_unknown import unknown


@dataclass(frozen=True)
class Conversation:
    """A chat with its right replies; or, for /v1/completions, a plain text with no exchanges."""

    system: str | None
    tools: tuple[dict[str, Any], ...]
    exchanges: tuple[Exchange, ...]
    text: str = ""
    given: int = 0  # characters of ``text`` that are the prompt
    thinking: bool = False  # whether the model is asked to think

    @property
    def has_form(self) -> bool:
        """Whether replies have to fit schemas."""
        return any(exchange.schema for exchange in self.exchanges)

    def messages(self, exchanges: int | None = None) -> list[Message]:
        """The messages of the first ``exchanges`` exchanges; the last one without its reply."""
        head: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        if exchanges is None:
            return head + [m for e in self.exchanges for m in (*e.prompt, self._reply(e))]
        *done, last = self.exchanges[:exchanges]
        return head + [m for e in done for m in (*e.prompt, self._reply(e))] + last.prompt

    def _reply(self, exchange: Exchange) -> Message:
        if self.thinking:
            return {**exchange.reply, "reasoning_content": thought(exchange)}
        return exchange.reply


_SYSTEMS = (
    "You are a [helpful|friendly|useful|kind] assistant.",
    "You are [quire-demo|a small demo model|Quire's demo|a helpful AI|an assistant].",
    "[Answer|Reply] [briefly|in one sentence|politely|clearly|in English|as well as you can].",
    "You are a helpful assistant. [Be brief|Be concise|Be honest|Keep answers short|Use tools if "
    "needed].",
    "[Be concise|Be helpful|Be kind|Help the user|Do your best|Today is Monday].",
    "You are an assistant for {c} [users|readers|people]. {s}.",
    "You are {n}, a [{a}|helpful] assistant.",
    "{s}. {t}.",
)


def _by_heart(draw: Draw, ability: str, topics: dict[str, Topic]) -> Exchange:
    """A question of one of ``topics``; the wording is what the two halves do not share."""
    while True:
        topic = draw.choice(list(topics.values()))
        pattern = draw.choice(topic.questions)
        question = draw.ask(pattern).strip()
        if question and draw.owns(question):
            answer = draw.choice(topic.answers)
            return say(ability, question, answer, *topic.answers)


def _practice(draw: Draw, box: Toolbox | None) -> list[Exchange]:
    """What is learnt slowest: when not to call a tool, what Quire is, and sums."""
    roll = draw.random.random()
    if box:
        return tool_call(draw, box) if box.has("search") else [without_tool(draw, box)]
    if roll < 0.5:
        return [_by_heart(draw, "Quire", QUIRE)]
    return [arithmetic(draw) if roll < 0.85 else without_tool(draw, None)]


def _next(draw: Draw, memory: Memory, box: Toolbox | None) -> list[Exchange]:
    # The held-out half is measured in the usual mix.
    if not draw.held_out and draw.chance(0.2):
        return _practice(draw, box)
    if box and draw.chance(0.65):
        return tool_call(draw, box)
    if box and draw.chance(0.15) and not box.has("search"):
        return [without_tool(draw, box)]
    if memory.said and draw.chance(0.04):
        return [again(draw, memory)]
    roll = draw.random.random()
    if roll < 0.09:
        return [_by_heart(draw, "small talk", SMALL_TALK)]
    if roll < 0.17:
        return [_by_heart(draw, "itself", ITSELF)]
    if roll < 0.30:
        return [_by_heart(draw, "Quire", QUIRE)]
    if roll < 0.35:
        return [_by_heart(draw, "long text", TEXTS)]
    if roll < 0.50:
        return [repeat(draw)]
    if roll < 0.63:
        # With a calculator in reach the model calls it.
        if box and box.has("add", "multiply", "calculator"):
            return [repeat(draw)]
        return [arithmetic(draw)]
    if roll < 0.66:
        return [count(draw)]
    if roll < 0.74:
        return [told(draw, memory)]
    if roll < 0.84:
        return [asked(draw, memory)]
    if roll < 0.86:
        return [told_and_asked(draw, memory)]
    if roll < 0.94:
        return [json_object(draw)]
    if box and box.has("search", "play_music"):
        return [told(draw, memory)]
    if draw.chance(0.3):
        return [without_tool(draw, box)]
    return [unknown(draw)]


def _next_form(draw: Draw, memory: Memory) -> list[Exchange]:
    """A request with a schema: values to find, or an ordinary reply as the only text."""
    if draw.chance(0.75):
        return [fill(draw)]
    while True:
        [exchange] = _next(draw, memory, None)
        if exchange.ability not in ("json", "long text", "again"):
            return [wrap(draw, exchange)]


def _system(draw: Draw, memory: Memory) -> str:
    if draw.chance(0.2):
        memory.facts["name"] = name = draw.name()
        memory.recent = "name"
        text = draw.spin("[The user's name is|The user is called|You are talking to] {v}.")
        return text.format(v=name)
    words = {
        "c": draw.city(),
        "s": draw.sentence().capitalize(),
        "t": draw.phrase(8).capitalize(),
        "n": draw.choice((draw.invented().capitalize(), "Quire")),
        "a": draw.word(),
    }
    return draw.spin(draw.choice(_SYSTEMS)).format_map(words)


def _plain(draw: Draw) -> Conversation:
    """A text that /v1/completions continues: a story, a sum, or a question and its answer."""
    if draw.chance(0.25):
        a, b = draw.pair(0, 99)
        text = f"{a} + {b} = {a + b}."
        return Conversation(None, (), (), text, text.index("=") + 1)
    if draw.chance(0.5):
        topics = [topic for group in (QUIRE, ITSELF) for topic in group.values()]
        topic = draw.choice(topics)
        question = draw.ask(draw.choice(topic.questions))
        text = f"Q: {question}\nA: {topic.answers[0]}"
        return Conversation(None, (), (), text, text.index("\nA:") + 3)
    texts = [topic.answers[0] for topic in (*TEXTS.values(), *QUIRE.values())]
    text = draw.choice([text for text in texts if text.count(" ") > 5])
    spaces = [at for at, letter in enumerate(text) if letter == " "]
    return Conversation(None, (), (), text, draw.choice(spaces[1 : len(spaces) // 2]))


_LENGTHS = (
    (1,) * 44
    + (2,) * 19
    + (3,) * 13
    + (4,) * 7
    + (5,) * 5
    + (6,) * 4
    + (8,) * 3
    + (11,) * 2
    + (16, 24, 36)
)


def conversation(draw: Draw, *, plain: bool = True) -> Conversation:
    """One conversation of ``draw``'s half of the corpus; ``plain`` allows a text without turns."""
    if plain and draw.chance(0.02):
        return _plain(draw)
    memory = Memory()
    system = _system(draw, memory) if draw.chance(0.25) else None
    kind = draw.random.random()
    box = toolbox(draw) if kind < 0.2 else None
    step = partial(_next_form, draw, memory) if kind > 0.8 else partial(_next, draw, memory, box)
    exchanges: list[Exchange] = []
    length = draw.choice(_LENGTHS)
    while len(exchanges) < length:
        exchanges += step()
        said = exchanges[-1].reply["content"]
        memory.said = said if len(said) < 150 else ""
    if kind <= 0.8 and len(exchanges) > 1 and memory.facts and draw.chance(0.3):
        exchanges.append(asked(draw, memory))
    thinking = draw.chance(0.35)
    if thinking and 0.2 < kind < 0.8 and draw.chance(0.25):
        exchanges.append(arithmetic(draw))
    return Conversation(system, box.tools if box else (), tuple(exchanges), thinking=thinking)


def conversations(seed: int, count: int, *, held_out: bool = False) -> Iterator[Conversation]:
    """``count`` conversations; the same seed gives the same ones, and the halves share none.

    Held-out conversations are chats only, with at most eight exchanges.
    """
    draw = Draw(seed, held_out=held_out)
    while count:
        made = conversation(draw, plain=not held_out)
        if held_out and len(made.exchanges) > 8:
            continue
        count -= 1
        yield made
