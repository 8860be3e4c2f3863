"""Requests of every kind for a soak, and what their clients saw of the answers."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from random import Random
from typing import Any, Final

import msgspec

from quire.loadtest.http import BaseURL, EventParser, ProtocolError, Truncated, send
from quire.loadtest.workloads import words

Body = Mapping[str, Any]

_PATIENCE: Final = 180.0  # seconds for one request, after which the server is taken to be wedged
_LONG_ANSWER: Final = 1500  # tokens; nobody waits for the end of such a one
_PAUSE: Final = 0.5  # seconds until a client leaves that has no answer yet
_MAX_PROBLEMS: Final = 50
# What a server without a worker may answer, or send as an event.
_WORKER_IS_GONE: Final = (500, 503)
_FINISHES: Final = {"tool_calls": "stop", "end_turn": "stop", "tool_use": "stop"} | {
    "completed": "stop",
    "max_tokens": "length",
    "incomplete": "length",
}
_ADD: Final[Body] = {
    "name": "add",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
}
_FORM: Final[Body] = {
    "type": "object",
    "properties": {"answer": {"type": "integer", "minimum": 0, "maximum": 999}},
    "required": ["answer"],
    "additionalProperties": False,
}


class Tally(msgspec.Struct):
    """What all clients together saw. Sequences are counted, of which a request may have several."""

    responses: dict[str, int]  # by "POST /v1/models 200"
    finishes: dict[str, int]  # by the engine's reason
    kinds: dict[str, int]
    prompt_tokens: int = 0
    generated_tokens: int = 0  # seen
    unseen_prompt_tokens: int = 0  # of those who left before anything told them of it
    unseen_tokens: int = 0  # that may have been generated at most after clients had left
    hang_ups: int = 0
    lost: int = 0  # requests whose end told of a worker that was gone
    skipped: int = 0  # not sent since too many others were running
    problems: list[str] = []

    @classmethod
    def empty(cls) -> Tally:
        return cls(Counter(), Counter(), Counter(), problems=[])


class _Failed(Exception):
    """The answer is not what this request must get."""


class _Lost(Exception):
    """The worker that had the request is gone, and the answer says so."""


class Traffic:
    """Sends requests to one server. ``model`` may be changed meanwhile.

    ``key`` goes with every request. ``workers_die`` says that answers may be the error of a worker
    that was killed.
    """

    def __init__(
        self, base: BaseURL, model: str, seed: int, key: str = "", workers_die: bool = False
    ) -> None:
        self.model = model
        self.tally = Tally.empty()
        self._base = base
        self._draw = Random(seed)
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._workers_die = workers_die
        self._kinds: list[tuple[int, Callable[[], Awaitable[None]]]] = [
            (6, self._chat_stream),
            (4, self._chat_whole),
            (3, self._hang_up),
            (1, self._hang_up_unanswered),
            (3, self._refused),
            (2, self._tools),
            (2, self._schema),
            (3, self._completions),
            (2, self._responses),
            (2, self._messages),
            (1, self._small_ones),
        ]

    async def one(self) -> None:
        """Send a request of a random kind; what is wrong with its answer goes into the tally."""
        (kind,) = self._draw.choices(
            [kind for _, kind in self._kinds], [weight for weight, _ in self._kinds]
        )
        name = kind.__name__.strip("_")
        self.tally.kinds[name] += 1
        try:
            async with asyncio.timeout(_PATIENCE):
                await kind()
        except _Lost as error:
            self.tally.lost += 1
            if not self._workers_die:
                self._problem(f"{name}: {error}")
        except TimeoutError:
            self._problem(f"{name}: no end within {_PATIENCE:g} s")
        except (_Failed, Truncated, ProtocolError, OSError, ValueError, LookupError) as error:
            self._problem(f"{name}: {type(error).__name__}: {error}")

    def _problem(self, text: str) -> None:
        if len(self.tally.problems) < _MAX_PROBLEMS:
            self.tally.problems.append(text[:500])

    async def still_answers(self) -> int:
        """The status of one more request, once a worker that is starting had its time."""
        for _ in range(int(_PATIENCE)):
            status, _ = await self._read_whole(self._CHAT, json.dumps(self._chat()).encode())
            if status != 503:
                break
            await asyncio.sleep(1.0)
        return status

    # ---- kinds of requests

    async def _chat_stream(self) -> None:
        usage = {"stream_options": {"include_usage": True}}
        chunks = await self._stream(self._CHAT, {**self._chat(), **usage, "stream": True})
        reasons = [c["finish_reason"] for chunk in chunks for c in chunk["choices"]]
        self._ended(reasons, chunks[-1]["usage"])

    async def _chat_whole(self) -> None:
        n = self._draw.choice((1, 1, 2))
        answer = await self._ask(self._CHAT, {**self._chat(), "n": n})
        self._ended([choice["finish_reason"] for choice in answer["choices"]], answer["usage"], n)

    async def _hang_up(self) -> None:
        stats = {"include_usage": True, "continuous_usage_stats": True}
        body = {**self._chat(), "max_tokens": _LONG_ANSWER, "ignore_eos": True, "stream": True}
        chunks = await self._stream(
            self._CHAT, {**body, "stream_options": stats}, leave_after=self._draw.randint(2, 20)
        )
        usage = chunks[-1]["usage"]
        self._left()
        self.tally.prompt_tokens += usage["prompt_tokens"]
        self.tally.generated_tokens += usage["completion_tokens"]
        self.tally.unseen_tokens += _LONG_ANSWER - usage["completion_tokens"]

    async def _hang_up_unanswered(self) -> None:
        """Leaves while a whole answer is generated; the server notes that as status 499."""
        body = {**self._chat("abc"), "max_tokens": _LONG_ANSWER, "ignore_eos": True}
        prompt = await self._ask("/tokenize", {"model": self.model, "messages": body["messages"]})
        try:
            async with asyncio.timeout(_PAUSE):
                status, data = await self._read_whole(self._CHAT, json.dumps(body).encode())
        except TimeoutError:
            self._count("POST", self._CHAT, 499)
            self._left()
            self.tally.unseen_prompt_tokens += prompt["count"]
            self.tally.unseen_tokens += _LONG_ANSWER
            return
        self._count("POST", self._CHAT, status)
        self._check(status, 499, self._CHAT, data)

    async def _refused(self) -> None:
        messages = [{"role": "user", "content": "hi"}]
        body: dict[str, Any] = {"model": self.model, "messages": messages}
        path, raw, status = self._draw.choice(
            [
                (self._CHAT, json.dumps({**body, "temperature": "hot"}), 400),
                (self._CHAT, json.dumps({**body, "no_such_field": 1}), 400),
                (self._CHAT, json.dumps({**body, "max_tokens": -1}), 400),
                (self._CHAT, json.dumps({**body, "model": "nobody"}), 404),
                (self._CHAT, json.dumps(body)[:-3], 400),
                (self._CHAT, json.dumps({**body, "response_format": {"type": "?"}}), 400),
                ("/v1/completions", json.dumps({"model": self.model, "prompt": "x" * 40000}), 400),
                ("/v1/nothing", "{}", 404),
            ]
        )
        got, _ = await self._read_whole(path, raw.encode())
        self._count("POST", path if path != "/v1/nothing" else "unmatched", got)
        self._check(got, status, path)

    async def _tools(self) -> None:
        tools = {"tools": [{"type": "function", "function": _ADD}], "tool_choice": "required"}
        body = {**self._chat("What is 3 plus 4?"), **tools, "max_tokens": 200}
        answer = await self._ask(self._CHAT, body)
        (choice,) = answer["choices"]
        self._ended([choice["finish_reason"]], answer["usage"])
        if choice["finish_reason"] == "tool_calls":
            json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"])

    async def _schema(self) -> None:
        form = {"type": "json_schema", "json_schema": {"name": "form", "schema": _FORM}}
        body = {**self._chat(), "response_format": form, "max_tokens": 100}
        answer = await self._ask(self._CHAT, body)
        (choice,) = answer["choices"]
        self._ended([choice["finish_reason"]], answer["usage"])
        if choice["finish_reason"] == "stop":
            json.loads(choice["message"]["content"])

    async def _completions(self) -> None:
        body = {
            "model": self.model,
            "prompt": words(self._draw, self._draw.randint(20, 600)),
            "max_tokens": self._draw.randint(1, 40),
            "logprobs": self._draw.choice((None, 2)),
            "ignore_eos": True,
        }
        answer = await self._ask("/v1/completions", body)
        self._ended([choice["finish_reason"] for choice in answer["choices"]], answer["usage"])

    async def _responses(self) -> None:
        """Two turns; what is stored of the first is deleted, so that the store does not fill."""
        path = "/v1/responses"
        body = {"model": self.model, "input": words(self._draw, 40), "max_output_tokens": 30}
        first = await self._ask(path, body)
        self._ended([first["status"]], _openai_usage(first["usage"]))
        follow = {**body, "previous_response_id": first["id"], "store": False, "stream": True}
        events = await self._stream(path, follow, ends_with_done=False)
        last = events[-1].get("response", {})
        if last.get("status") == "failed":
            raise _Lost(str(last["error"]))
        self._ended([last["status"]], _openai_usage(last["usage"]))
        got, _ = await self._read_whole(f"{path}/{first['id']}", b"", method="DELETE")
        self._count("DELETE", path + "/{id}", got)
        self._check(got, 200, "DELETE")

    async def _messages(self) -> None:
        messages = [{"role": "user", "content": words(self._draw, 40)}]
        body = {"model": self.model, "messages": messages, "max_tokens": 30}
        answer = await self._ask("/v1/messages", body)
        self._ended([answer["stop_reason"]], _openai_usage(answer["usage"]))

    async def _small_ones(self) -> None:
        for path in ("/health", "/v1/models", "/metrics", "/openapi.json"):
            got, _ = await self._read_whole(path, b"", method="GET")
            self._count("GET", path, got)
            self._check(got, 200, path)

    # ---- how they are sent

    _CHAT: Final = "/v1/chat/completions"

    def _chat(self, text: str | None = None) -> dict[str, Any]:
        """A conversation of one turn, sampled; its texts begin alike now and then."""
        shared = words(Random(self._draw.randrange(4)), 200) if self._draw.random() < 0.5 else ""
        said = text or f"{shared} {words(self._draw, self._draw.randint(20, 300))}"
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": said}],
            "max_tokens": self._draw.randint(2, 60),
            "temperature": self._draw.choice((0, 1)),
            "seed": self._draw.randrange(1000),
        }

    async def _ask(self, path: str, body: Body) -> dict[str, Any]:
        """The decoded answer, which must be a 200."""
        status, data = await self._read_whole(path, json.dumps(body).encode())
        self._count("POST", path, status)
        self._check(status, 200, path, data)
        answer: dict[str, Any] = json.loads(data)
        return answer

    async def _read_whole(self, path: str, raw: bytes, method: str = "POST") -> tuple[int, bytes]:
        async with send(self._base, method, path, raw, self.headers) as response:
            return response.status, await response.read()

    async def _stream(
        self, path: str, body: Body, leave_after: int | None = None, ends_with_done: bool = True
    ) -> list[dict[str, Any]]:
        """The decoded events, the first ``leave_after`` of them if that is given."""
        parser, events, done = EventParser(), list[dict[str, Any]](), False
        raw = json.dumps(body).encode()
        async with send(self._base, "POST", path, raw, self.headers) as response:
            self._count("POST", path, response.status)
            if response.status != 200:
                self._check(response.status, 200, path, await response.read())
            async for data in response:
                for event in parser.feed(data):
                    done = done or event == b"[DONE]"
                    if event != b"[DONE]":
                        events.append(json.loads(event))
                if leave_after is not None and len(events) >= leave_after:
                    return events
        if "error" in events[-1]:
            raise _Lost(str(events[-1]["error"]))
        if leave_after is not None:
            raise _Failed(f"the stream ended after {len(events)} events")
        if ends_with_done and not done:
            raise _Failed("the stream ended without [DONE]")
        return events

    def _check(self, got: int, wanted: int, path: str, data: bytes = b"") -> None:
        if got in _WORKER_IS_GONE:
            raise _Lost(f"{path}: status {got}: {data[:200]!r}")
        if got != wanted:
            raise _Failed(f"{path}: status {got}, not {wanted}: {data[:200]!r}")

    def _count(self, method: str, route: str, status: int) -> None:
        self.tally.responses[f"{method} {route} {status}"] += 1

    def _left(self) -> None:
        self.tally.hang_ups += 1
        self.tally.finishes["abort"] += 1

    def _ended(self, reasons: list[str | None], usage: Body, n: int = 1) -> None:
        """``n`` sequences share a prompt that the usage counts once."""
        self.tally.prompt_tokens += n * usage["prompt_tokens"]
        self.tally.generated_tokens += usage["completion_tokens"]
        found = [reason for reason in reasons if reason is not None]
        if len(found) != n:
            raise _Failed(f"finish reasons {reasons}")
        for reason in found:
            self.tally.finishes[_FINISHES.get(reason, reason)] += 1


def _openai_usage(usage: Body) -> Body:
    """A usage of responses and messages under the names of chat completions."""
    cached = usage.get("cache_read_input_tokens") or 0  # which Anthropic does not count as input
    return {
        "prompt_tokens": usage["input_tokens"] + cached,
        "completion_tokens": usage["output_tokens"],
    }
