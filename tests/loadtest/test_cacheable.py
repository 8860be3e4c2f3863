"""What earlier requests had computed of a prompt, by the tokens that the server tells."""

from __future__ import annotations

import asyncio
import json

import pytest
from fake_chat_server import CHUNKED_HEAD, DONE, Request, as_chunks, event, serving, usage

from quire.loadtest.cacheable import SentTokens, count_cacheable
from quire.loadtest.records import RequestRecord
from quire.loadtest.results import LoadResult
from quire.loadtest.serve import LoadOptions, find_target, measure_load
from quire.loadtest.workloads import WorkloadSpec


def sent(
    prompt: list[int], answer: list[int], start: float, first: float, end: float
) -> SentTokens:
    record = RequestRecord(0, 0, 0, 0, 8, start_ms=start, chunk_ms=[first], end_ms=end)
    return SentTokens(record, prompt, answer)


TEXT = list(range(100))


@pytest.mark.parametrize(
    ("start", "known"),
    [(5.0, 0), (12.0, 64), (30.0, 80)],
    ids=["before its first token", "while it answers", "behind it"],
)
def test_a_prompt_is_known_from_its_first_token_and_an_answer_from_its_end(
    start: float, known: int
) -> None:
    earlier = sent(TEXT[:70], TEXT[70:90], 0.0, 10.0, 20.0)
    later = sent(TEXT, [], start, 1.0, 2.0)
    count_cacheable([later, earlier])
    assert later.record.cacheable_tokens == known
    assert earlier.record.cacheable_tokens == 0


def test_neither_an_answers_last_token_nor_a_prompts_is_known() -> None:
    earlier = sent(TEXT[:40], TEXT[40:49], 0.0, 1.0, 2.0)
    same, longer = (sent(TEXT[:n], [], 10.0, 1.0, 2.0) for n in (48, 49))
    count_cacheable([earlier, same, longer])
    assert same.record.cacheable_tokens == 32
    assert longer.record.cacheable_tokens == 48


def test_the_longest_of_all_prefixes_counts() -> None:
    others = [sent([*TEXT[:n], 7, *TEXT[n + 1 :]], [1], 0.0, 1.0, 2.0) for n in (20, 55, 40)]
    asked = sent(TEXT, [1], 5.0, 1.0, 2.0)
    count_cacheable([*others, asked])
    assert asked.record.cacheable_tokens == 48


def test_what_a_server_does_not_tell_is_not_counted() -> None:
    asked = sent([], [], 0.0, 1.0, 2.0)
    count_cacheable([asked])
    assert asked.record.cacheable_tokens is None


async def _measure(options: LoadOptions) -> tuple[LoadResult, list[Request]]:
    """A server whose tokens are characters, and whose answers are "ab"."""

    async def answer(request: Request, writer: asyncio.StreamWriter) -> None:
        text = json.dumps(request.body["messages"])
        events = [
            {"choices": [{"delta": {"content": part}, "token_ids": [ord(part)]}]} for part in "ab"
        ]
        if request.body.get("return_token_ids"):
            events[0]["prompt_token_ids"] = list(text.encode())
        data = b"".join(map(event, events)) + usage(len(text), 2, 16) + DONE
        writer.write(CHUNKED_HEAD + as_chunks(data, 4000))

    async with serving(answer) as server:
        target, header = await find_target(server.base, None, options)
        result = await measure_load(target, header, options)
        return result, server.requests


def test_turns_know_the_turns_before_up_to_what_was_edited() -> None:
    spec = WorkloadSpec(name="agent", requests=6, turns=6, system_chars=100, edit_turn=4)
    options = LoadOptions(spec, clients=1, count_cacheable=True)
    result, _ = asyncio.run(_measure(options))
    prompts = [record.prompt_tokens or 0 for record in result.records]
    known = [record.cacheable_tokens or 0 for record in result.records]
    for turn in (1, 2, 3, 5):
        assert prompts[turn - 1] - 24 < known[turn] < prompts[turn - 1] + 8
    assert prompts[1] < known[4] < prompts[2]
    assert result.summary.cacheable_prompt_tokens == sum(known)


def test_without_a_prefix_cache_every_request_has_a_salt_of_its_own() -> None:
    spec = WorkloadSpec(requests=3)
    _, requests = asyncio.run(_measure(LoadOptions(spec, prefix_cache=False)))
    salts = [request.body["cache_salt"] for request in requests if request.body]
    assert len(set(salts)) == len(salts) > 3
    result, requests = asyncio.run(_measure(LoadOptions(spec)))
    assert not any("cache_salt" in request.body for request in requests)
    assert result.summary.cacheable_prompt_tokens is None
