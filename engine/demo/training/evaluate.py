"""Measure the demo model on held-out conversations:
``python -m quire.engine.demo.training.evaluate``.

Every reply of a conversation is generated at temperature 0 after the right replies before it, and
a conversation counts only if all its replies are right.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlx_lm import batch_generate, load

from quire.engine.demo.training.corpus import Conversation, conversations
from quire.engine.demo.training.corpus_exchange import Exchange

DEMO = Path(__file__).parent.parent / "quire-demo"
_MAX_TOKENS = 320  # more than the longest reply of the corpus


class Outcome(NamedTuple):
    """One generated reply and whether it is right."""

    conversation: int
    exchange: Exchange
    generated: str
    right: bool


def is_right(exchange: Exchange, generated: str, tokenizer: Any) -> bool:
    """Whether ``generated`` answers ``exchange``.

    A tool call has to parse to the right name and arguments, JSON to the right value; any other
    reply has to be one of those the corpus accepts, letter for letter.
    """
    if calls := exchange.reply.get("tool_calls"):
        wanted = [call["function"] for call in calls]
        return parse_tool_calls(generated, tokenizer) == wanted
    if exchange.ability == "json":
        try:
            return bool(json.loads(generated) == json.loads(exchange.reply["content"]))
        except json.JSONDecodeError:
            return False
    return generated.strip() in exchange.accepted


def parse_tool_calls(text: str, tokenizer: Any) -> list[Any] | None:
    """The calls in ``text`` by the parser that mlx-lm chose for ``tokenizer``; None if broken."""
    calls = []
    for part in text.split(tokenizer.tool_call_start)[1:]:
        body, end, _ = part.partition(tokenizer.tool_call_end)
        if not end:
            return None
        try:
            calls.append(tokenizer.tool_parser(body, None))
        except json.JSONDecodeError:
            return None
    return calls


def evaluate(
    model: Any, tokenizer: Any, chats: Sequence[Conversation], batch_size: int = 64
) -> list[Outcome]:
    """The outcome of every reply of ``chats``."""
    turns = [(i, n) for i, chat in enumerate(chats) for n in range(1, len(chat.exchanges) + 1)]
    prompts = [
        tokenizer.apply_chat_template(
            chats[i].messages(n),
            tools=list(chats[i].tools) or None,
            add_generation_prompt=True,
            return_dict=False,
        )
        for i, n in turns
    ]
    outcomes = []
    # Similar lengths together, so that a batch is not mostly padding.
    order = sorted(range(len(turns)), key=lambda at: len(prompts[at]))
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        texts = batch_generate(
            model, tokenizer, [prompts[at] for at in chosen], max_tokens=_MAX_TOKENS
        ).texts
        for at, text in zip(chosen, texts, strict=True):
            i, n = turns[at]
            exchange = chats[i].exchanges[n - 1]
            outcomes.append(Outcome(i, exchange, text, is_right(exchange, text, tokenizer)))
    return outcomes


def conversation_score(outcomes: Sequence[Outcome]) -> float:
    """The share of conversations of which every reply is right."""
    wrong = {outcome.conversation for outcome in outcomes if not outcome.right}
    return 1 - len(wrong) / len({outcome.conversation for outcome in outcomes})


def report(outcomes: Sequence[Outcome]) -> str:
    """A table: the share of right replies per ability, and of right conversations."""
    total = Counter(outcome.exchange.ability for outcome in outcomes)
    right = Counter(outcome.exchange.ability for outcome in outcomes if outcome.right)
    lines = [f"{'ability':14} {'right':>6} {'of':>6} {'share':>8}"]
    for ability in sorted(total):
        share = right[ability] / total[ability]
        lines.append(f"{ability:14} {right[ability]:6} {total[ability]:6} {share:8.1%}")
    replies = sum(right.values()) / len(outcomes)
    lines.append(f"{'all replies':14} {sum(right.values()):6} {len(outcomes):6} {replies:8.1%}")
    count = len({outcome.conversation for outcome in outcomes})
    score = conversation_score(outcomes)
    lines.append(f"{'conversations':14} {round(score * count):6} {count:6} {score:8.1%}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m quire.engine.demo.training.evaluate", description=__doc__
    )
    parser.add_argument("--model", type=Path, default=DEMO, help="folder of the model")
    parser.add_argument("--conversations", type=int, default=500)
    parser.add_argument("--seed", type=int, default=2024)
    parser.add_argument("--show", type=int, default=0, help="wrong replies to print")
    args = parser.parse_args()
    model, tokenizer = load(str(args.model))
    chats = list(conversations(args.seed, args.conversations, held_out=True))
    outcomes = evaluate(model, tokenizer, chats)
    for outcome in [outcome for outcome in outcomes if not outcome.right][: args.show]:
        print(f"{outcome.exchange.ability}: {outcome.exchange.prompt[-1]['content']}")
        print(f"  generated: {outcome.generated}")
        print(f"  expected:  {outcome.exchange.reply}")
    print(report(outcomes))


if __name__ == "__main__":
    main()
