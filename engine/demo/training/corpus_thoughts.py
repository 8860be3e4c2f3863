"""What the demo model thinks, when asked to, before it replies."""

from __future__ import annotations

from quire.engine.demo.training.corpus_exchange import Exchange

_BY_HEART = "I know the answer by heart."
_SAME = "I should say the same words."
_UNKNOWN = "I have not learnt that."
_THOUGHTS = {
    "add": "I should add the numbers.",
    "subtract": "I should subtract the numbers.",
    "multiply": _BY_HEART,
    "count": "I should count.",
    "small talk": _BY_HEART,
    "itself": _BY_HEART,
    "Quire": _BY_HEART,
    "long text": _BY_HEART,
    "repeat": _SAME,
    "again": _SAME,
    "told": "I should remember that.",
    "json": "I should answer in JSON.",
    "schema": "I should look for the facts.",
    "unknown": _UNKNOWN,
    "no tool": _UNKNOWN,
    "tool result": "The tool has answered.",
}


def columns(a: int, b: int) -> str:
    """How ``a`` and ``b`` are added digit by digit: "7 + 8 = 15, then 4 + 3 + 1 = 8."."""
    steps = []
    carry = 0
    while a or b or not steps:
        digits = [a % 10, b % 10] + [carry] * (carry > 0)
        steps.append(f"{' + '.join(map(str, digits))} = {sum(digits)}")
        a, b, carry = a // 10, b // 10, sum(digits) // 10
    return ", then ".join(steps) + "."


def thought(exchange: Exchange) -> str:
    """What comes before the reply of ``exchange``."""
    if exchange.thought:
        return exchange.thought
    if calls := exchange.reply.get("tool_calls"):
        return f"The tool {calls[0]['function']['name']} can do that."
    if exchange.ability == "recall":
        told = "have not told" not in exchange.reply["content"]
        return "The user has told me." if told else "The user has not told me."
    return _THOUGHTS[exchange.ability]
