"""The closed loop: each client sends its next request when the last one has ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence

from quire.loadtest.chat import Message, Target, stream_chat
from quire.loadtest.records import RequestRecord
from quire.loadtest.workloads import Conversation


async def _converse(
    target: Target, conversation: Conversation, index: int, client: int, epoch: float
) -> list[RequestRecord]:
    """Run one conversation to its end, or to its first failed turn."""
    history: list[Message] = []
    if conversation.system is not None:
        history.append({"role": "system", "content": conversation.system})
    records = []
    for turn, text in enumerate(conversation.turns):
        history.append({"role": "user", "content": text})
        record = RequestRecord(
            index=index,
            client=client,
            turn=turn,
            prompt_chars=sum(len(message["content"]) for message in history),
            max_tokens=conversation.max_tokens,
            chunk_ms=[],
        )
        records.append(record)
        answer = await stream_chat(target, history, record, epoch)
        if record.error is not None:
            break
        history.append({"role": "assistant", "content": answer})
    return records


async def _client(
    target: Target, queue: Iterator[tuple[int, Conversation]], client: int, epoch: float
) -> list[RequestRecord]:
    records = []
    for index, conversation in queue:
        records += await _converse(target, conversation, index, client, epoch)
    return records


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
    records = [record for records in per_client for record in records]
    return sorted(records, key=lambda record: record.start_ms), wall_s
