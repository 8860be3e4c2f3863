"""Measure the demo model on held-out conversations:
``python -m quire.engine.demo.training.evaluate``.

Every reply of a conversation is generated at temperature 0 after the right replies before it, and
a conversation counts only if all its replies are right. A schema is enforced while the reply is
generated, by the library that the server uses too.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from quire.engine.startup.boot import prepare_mlx

if "mlx.core" not in sys.modules:
    prepare_mlx(settings=False)  # else a CPU is thirty times slower

import mlx.core as mx
import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from mlx_lm import batch_generate, generate, load

from quire.engine.demo.training.corpus import Conversation, conversations
from quire.engine.demo.training.corpus_exchange import Exchange
from quire.engine.demo.training.tokenizer import THINK_END
from quire.engine.grammar_tokens import make_tokenizer

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

    Args:
        generated: without the thought before it.
    """
    if calls := exchange.reply.get("tool_calls"):
        wanted = [call["function"] for call in calls]
        return parse_tool_calls(generated, tokenizer) == wanted
    if exchange.ability in ("json", "schema"):
        try:
            right = {exchange.reply["content"], *exchange.accepted}
            return json.loads(generated) in map(json.loads, right)
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


class Form:
    """A logits processor of mlx-lm that lets only what fits a schema through."""

    def __init__(self, schema: dict[str, Any], tokenizer: LLTokenizer) -> None:
        self._matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_json_schema(schema))
        self._mask = allocate_token_bitmask(1, tokenizer.vocab_size)
        self._num_seen: int | None = None

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        if self._num_seen is not None:
            self._matcher.consume_tokens([int(token) for token in tokens[self._num_seen :]])  # type: ignore[attr-defined]
        self._num_seen = tokens.size
        fill_next_token_bitmask(self._matcher, self._mask)
        allowed = np.unpackbits(self._mask.view(np.uint8), axis=1, bitorder="little")
        return mx.where(mx.array(allowed[:, : logits.shape[-1]]) != 0, logits, -mx.inf)


def part(text: str, thinking: bool) -> tuple[str, str]:
    """A thought and what is said after it; a thought that does not end is followed by nothing."""
    if not thinking:
        return "", text
    thought_, _, said = text.partition(THINK_END)
    return thought_.strip(), said.strip()


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
            enable_thinking=chats[i].thinking,
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
            thought_, said = part(text, chats[i].thinking)
            if exchange.schema:
                said = fill_form(model, tokenizer, prompts[at], thought_, exchange.schema)
            right = is_right(exchange, said, tokenizer)
            if chats[i].thinking:
                # The columns of a sum can be wrong; of other thoughts none is the only right one.
                right &= thought_ == exchange.thought if exchange.thought else thought_ != ""
            outcomes.append(Outcome(i, exchange, text if not exchange.schema else said, right))
    return outcomes


def fill_form(
    model: Any, tokenizer: Any, prompt: list[int], thought_: str, schema: dict[str, Any]
) -> str:
    """The reply to ``prompt`` as ``schema`` lets it be, after ``thought_`` if there is one."""
    rust = tokenizer.backend_tokenizer
    if thought_:
        prompt = prompt + rust.encode(f"{thought_}\n{THINK_END}\n\n").ids
    grammar_tokens = make_tokenizer(rust.to_str(), list(tokenizer.eos_token_ids))
    processors = [Form(schema, grammar_tokens)]
    return str(
        generate(model, tokenizer, prompt, max_tokens=_MAX_TOKENS, logits_processors=processors)
    )


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
