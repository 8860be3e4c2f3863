"""Conversations as rows of token ids, made by worker processes while the trainer computes."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from jinja2 import Template
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from quire.engine.demo.training.corpus import Conversation, conversations
from quire.engine.demo.training.tokenizer import (
    CHAT_TEMPLATE,
    END_OF_TEXT,
    IM_END,
    IM_START,
    THINK,
    THINK_END,
)

# Few lengths, since every shape is compiled once.
LENGTHS = (64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
_PER_TASK = 1000  # conversations


class Row(NamedTuple):
    tokens: npt.NDArray[np.uint16]  # (length,)
    learnt: npt.NDArray[np.bool_]  # (length,): the tokens that the model has to predict


class Encoder:
    """Renders conversations with the chat template and marks what the assistant says."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        environment = ImmutableSandboxedEnvironment()
        # As transformers has it; jinja's own escapes for HTML and sorts the keys.
        environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
        self.template: Template = environment.from_string(CHAT_TEMPLATE)
        self.start = tokenizer.token_to_id(IM_START)
        self.end = tokenizer.token_to_id(IM_END)
        self.end_of_text = tokenizer.token_to_id(END_OF_TEXT)
        self.role = tokenizer.encode("assistant\n").ids
        self.think = tokenizer.encode(f"{THINK}\n").ids
        self.think_end = tokenizer.encode(f"{THINK_END}\n\n").ids

    def render(self, conversation: Conversation) -> str:
        if conversation.text:
            return conversation.text
        return self.template.render(
            messages=conversation.messages(), tools=conversation.tools or None
        )

    def row(self, conversation: Conversation) -> Row:
        encoding = self.tokenizer.encode(self.render(conversation))
        if conversation.text:
            learnt = [begin >= conversation.given for begin, _ in encoding.offsets]
            ids = [*encoding.ids, self.end_of_text]
            return Row(np.array(ids, np.uint16), np.array([*learnt, True]))
        tokens = np.array(encoding.ids, np.uint16)
        marks = np.zeros(len(tokens), np.bool_)
        ends = np.flatnonzero(tokens == self.end)
        for start in np.flatnonzero(tokens == self.start):
            head = start + 1 + len(self.role)
            if np.array_equal(tokens[start + 1 : head], self.role):
                end = ends[np.searchsorted(ends, head)]
                # The template opens a thought; the model only goes on with one.
                if np.array_equal(tokens[head : head + len(self.think)], self.think):
                    head += len(self.think)
                marks[head : end + 1] = True
                # That an answer is JSON is the grammar's doing: nothing in the prompt says so.
                if conversation.has_form:
                    marks[self._begin_of_answer(tokens, int(head), int(end))] = False
        return Row(tokens, marks)

    def _begin_of_answer(self, tokens: npt.NDArray[np.uint16], head: int, end: int) -> int:
        closed = np.flatnonzero(tokens[head:end] == self.think_end[0])
        return head + int(closed[0]) + len(self.think_end) if len(closed) else head


_encoder: Encoder | None = None


def _start(tokenizer: str) -> None:
    global _encoder
    _encoder = Encoder(Tokenizer.from_str(tokenizer))


def _encode(seed: int, plain: float) -> list[Row]:
    assert _encoder is not None
    draw = random.Random(seed)
    return [
        _encoder.row(made)
        for made in conversations(seed, _PER_TASK)
        if made.thinking or made.has_form or made.tools or draw.random() < plain
    ]


def batches(
    tokenizer: Tokenizer, seed: int, tokens: int, workers: int, longest: int, plain: float
) -> Iterator[tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]]:
    """Endless batches of rows of similar length: ids and marks, both (rows, length).

    A batch has about ``tokens`` ids with the padding. Conversations of more than ``longest`` tokens
    are left out, and of those without thoughts, schemas and tools all but a share of ``plain``.
    """
    waiting: dict[int, list[Row]] = {length: [] for length in LENGTHS if length <= longest}
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start, (tokenizer.to_str(),)) as pool:
        ahead: list[Future[list[Row]]] = []
        while True:
            while len(ahead) < 3 * workers:
                ahead.append(pool.submit(_encode, seed, plain))
                seed += 1
            for row in ahead.pop(0).result():
                length = next((n for n in waiting if len(row.tokens) <= n), None)
                if length is None:
                    continue
                waiting[length].append(row)
                if len(waiting[length]) == max(1, tokens // length):
                    yield _stack(waiting[length], length)
                    waiting[length] = []


def _stack(rows: list[Row], length: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    ids = np.zeros((len(rows), length), np.int32)
    learnt = np.zeros((len(rows), length), np.bool_)
    for i, row in enumerate(rows):
        ids[i, : len(row.tokens)] = row.tokens
        learnt[i, : len(row.tokens)] = row.learnt
    return ids, learnt
