"""The closed loop: each client sends its next request when the last one has ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence

from quire.loadtest.cacheable import SentTokens, count_cacheable
from quire.loadtest.chat import Message, Target, stream_chat
from quire.loadtest.records import RequestRecord
from quire.loadtest.workloads import Conversation


async def _converse(
    target: Target, conversation: Conversation, index: int, client: int, epoch: float
) -> list[SentTokens]:
    """Run one conversation to its end, or to its first failed turn."""
    history: list[Message] = []
    if conversation.system is not None:
        history.append({"role": "system", "content": conversation.system})
    sent, edit = [], conversation.edit
    for turn, text in enumerate(conversation.turns):
        if edit is not None and edit.turn == turn:
            _user_messages(history)[edit.message]["content"] = edit.text
        history.append({"role": "user", "content": text})
        record = RequestRecord(
            index=index,
            client=client,
            turn=turn,
            prompt_chars=sum(len(message["content"]) for message in history),
            max_tokens=conversation.max_tokens,
            chunk_ms=[],
        )
        answer = await stream_chat(target, history, record, epoch)
        sent.append(SentTokens(record, answer.prompt_token_ids, answer.token_ids))
        if record.error is not None:
            break
        history.append({"role": "assistant", "content": answer.text})
    return sent


def _user_messages(history: Sequence[Message]) -> list[Message]:
    return [message for message in history if message["role"] == "user"]


async def _client(
    target: Target, queue: Iterator[tuple[int, Conversation]], client: int, epoch: float
) -> list[SentTokens]:
    sent = []
    for index, conversation in queue:
        sent += await _converse(target, conversation, index, client, epoch)
    return sent


async def run_load(
    target: Target, conversations: Sequence[Conversation], clients: int
) -> tuple[list[RequestRecord], float]:
    """Send all conversations from ``clients`` concurrent clients.

    Returns the records in the order requests were sent, and the wall time in seconds.
    """
    queue = iter(enumerate(conversations))  # shared: an idle client takes the next conversation
    epoch = time.perf_counter()
    per_client = await asyncio.gather(
        *(_client(target, queue, client, epoch) for client in range(clients))
    )
    wall_s = time.perf_counter() - epoch
    sent = [each for requests in per_client for each in requests]
    count_cacheable(sent)
    records = [each.record for each in sent]
    return sorted(records, key=lambda record: record.start_ms), wall_s
