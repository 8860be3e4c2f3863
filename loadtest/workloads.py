"""Deterministic traffic: the same seed gives the same conversations on every machine.

Texts are ASCII words. Lengths are in characters, which a byte-level tokenizer turns into as many
tokens; with a trained vocabulary a token is four or five characters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from typing import Literal

import msgspec

WorkloadName = Literal["uniform", "mixed", "shared", "multiturn", "agent"]
WORKLOADS: tuple[WorkloadName, ...] = ("uniform", "mixed", "shared", "multiturn", "agent")

# mixed: the median of 170 lets two standard deviations span 20 to 1,500 characters.
# agent: what a tool brings back, spread like mixed.
DEFAULT_PROMPT_CHARS: dict[WorkloadName, int] = {
    "uniform": 128,
    "mixed": 170,
    "shared": 64,
    "multiturn": 128,
    "agent": 800,
}
DEFAULT_SYSTEM_CHARS: dict[WorkloadName, int] = {"shared": 780, "agent": 4000}
DEFAULT_TURNS: dict[WorkloadName, int] = {"multiturn": 4, "agent": 12}
_TASK_CHARS = 120  # agent: what the user asks for
MIN_PROMPT_CHARS = 20  # room for the serial number that makes each prompt distinct
MIXED_SIGMA = math.log(1500 / 170) / 2
MIXED_SPREAD = 1500 / 170
MIXED_MIN_OUTPUT = 4

_WORDS = tuple(
    word
    for line in (
        "about after again air animal answer around ask away back begin below between book both",
        "bring build call carry change city close cold country cover cross cut day differ door",
        "draw earth eat end enough every example eye face family far father feel few find fire",
        "first follow food form found friend give good ground grow half hand hard head hear help",
        "high home horse house idea keep kind know land large late learn leave letter life light",
    )
    for word in line.split()
)


class WorkloadSpec(msgspec.Struct, frozen=True):
    """What to send; None is the workload's default.

    :func:`conversations` raises ValueError where it makes no sense.
    """

    name: WorkloadName = "uniform"
    requests: int = 64  # multiturn and agent round this up to whole conversations
    max_tokens: int = 64  # mixed draws 4 to twice this
    seed: int = 0
    prompt_chars: int | None = None  # per user message; the median for mixed and agent
    system_chars: int | None = None  # shared, agent: length of the common system prompt
    turns: int | None = None  # multiturn, agent: requests per conversation
    # multiturn, agent: in front of this turn, from 0, a message in the middle is changed
    edit_turn: int | None = None


class Edit(msgspec.Struct, frozen=True):
    """In front of ``turn`` the user's ``message``, from 0, becomes ``text``."""

    turn: int
    message: int
    text: str


class Conversation(msgspec.Struct, frozen=True):
    """User messages sent in order, each with the whole history before it."""

    system: str | None
    turns: tuple[str, ...]
    max_tokens: int  # per turn
    edit: Edit | None = None


def words(rng: Random, length: int) -> str:
    """Exactly ``length`` characters of random words."""
    parts: list[str] = []
    total = 0
    while total <= length:  # the last word's space is not part of the text
        parts.append(rng.choice(_WORDS))
        total += len(parts[-1]) + 1
    text = " ".join(parts)[:length]
    # Servers may strip trailing white space, which would change the length.
    return text[:-1] + "." if text.endswith(" ") else text


def _message(rng: Random, length: int) -> str:
    # A random number first: two prompts must not share more than the chat template by accident.
    head = f"{rng.getrandbits(32):08x} "
    return head + words(rng, length - len(head))


def _mixed_length(rng: Random, median: int) -> int:
    length = rng.lognormvariate(math.log(median), MIXED_SIGMA)
    shortest = max(MIN_PROMPT_CHARS, round(median / MIXED_SPREAD))
    return min(max(round(length), shortest), round(median * MIXED_SPREAD))


def _edit(spec: WorkloadSpec, index: int, texts: Sequence[str]) -> Edit | None:
    """The second half of a message in the middle becomes another."""
    if spec.edit_turn is None:
        return None
    message = spec.edit_turn // 2
    text = texts[message]
    kept = text[: len(text) // 2]
    rng = Random(f"{spec.seed}/{spec.name}/{index}/edit")
    return Edit(spec.edit_turn, message, kept + _message(rng, len(text) - len(kept)))


def conversations(spec: WorkloadSpec) -> list[Conversation]:
    """All conversations of a run. Each depends on (seed, name, its index) only."""
    chars = DEFAULT_PROMPT_CHARS[spec.name] if spec.prompt_chars is None else spec.prompt_chars
    turns = DEFAULT_TURNS.get(spec.name, 1) if spec.turns is None else spec.turns
    system_chars = DEFAULT_SYSTEM_CHARS.get(spec.name)
    if system_chars is not None and spec.system_chars is not None:
        system_chars = spec.system_chars
    if spec.requests < 1:
        raise ValueError("--requests must be at least 1")
    if spec.max_tokens < 1:
        raise ValueError("--max-tokens must be at least 1")
    if chars < MIN_PROMPT_CHARS:
        raise ValueError(f"--prompt-chars must be at least {MIN_PROMPT_CHARS}")
    if system_chars is not None and system_chars < 1:
        raise ValueError(f"--system-chars must be at least 1 for the {spec.name} workload")
    if turns < 1:
        raise ValueError("--turns must be at least 1")
    if spec.name not in DEFAULT_TURNS:
        turns = 1
    if spec.edit_turn is not None and not 1 <= spec.edit_turn < turns:
        raise ValueError(f"--edit-turn must be one of the turns 1 to {turns - 1} of a chat")
    system = None
    if system_chars is not None:
        system = words(Random(f"{spec.seed}/{spec.name}/system"), system_chars)
    made = []
    for index in range(math.ceil(spec.requests / turns)):
        rng = Random(f"{spec.seed}/{spec.name}/{index}")
        lengths, max_tokens = [chars] * turns, spec.max_tokens
        if spec.name == "mixed":
            lengths = [_mixed_length(rng, chars)]
            max_tokens = rng.randint(
                min(MIXED_MIN_OUTPUT, 2 * spec.max_tokens), 2 * spec.max_tokens
            )
        if spec.name == "agent":
            lengths = [_TASK_CHARS, *(_mixed_length(rng, chars) for _ in range(turns - 1))]
        texts = tuple(_message(rng, length) for length in lengths)
        made.append(Conversation(system, texts, max_tokens, _edit(spec, index, texts)))
    return made
