"""One exchange of a conversation: what is said to the model and what it has to answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]


@dataclass(frozen=True)
class Exchange:
    """What the user (and a tool) says, the reply, and every reply that would be right.

    With a ``schema`` the reply is JSON that fits it, and the schema is enforced from outside.
    """

    ability: str
    prompt: list[Message]
    reply: Message
    accepted: tuple[str, ...] = ()
    thought: str = ""  # before the reply, if the model is asked to think; "" for the ability's own
    schema: dict[str, Any] | None = None


@dataclass
class Memory:
    """What the model has been told so far in one conversation."""

    facts: dict[str, str] = field(default_factory=dict)
    recent: str | None = None  # the fact told last, which is asked for more often
    said: str = ""  # the reply before this one, unless it was long


def say(ability: str, question: str, answer: str, *others: str) -> Exchange:
    """One question and its answer; ``others`` are answers that are right as well."""
    return Exchange(
        ability,
        [{"role": "user", "content": question}],
        {"role": "assistant", "content": answer},
        (answer, *others),
    )
