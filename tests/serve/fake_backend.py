"""A backend that plays scripts of token ids, the model around it, and a server in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import itertools
import json
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
import uvicorn
from starlette.applications import Starlette
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from quire.engine.messages import Abilities, GenerateRequest, Ready, TokenLogprobs, TokenOutput
from quire.serve.app import create_app
from quire.serve.backend import BackendError, Unavailable
from quire.serve.detokenizer import TokenBytes
from quire.serve.http_protocol import ConnectionGuard, HttpLimits
from quire.serve.metrics import Metrics
from quire.serve.openai_protocol import Message
from quire.serve.parsers.families import ParserFactory, infer_family
from quire.serve.prompt import ChatTemplate, Rendered
from quire.serve.registry import Registry, Served
from quire.serve.served_model import ServedModel
from quire.serve.text_encoder import TextEncoder

MODEL = "test/model"
EOS = "<|end|>"
MAX_MODEL_LEN = 256
HIDDEN_SIZE = 6

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_level_tokenizer(words: Sequence[str] = ()) -> Tokenizer:
    """Byte-level BPE with the 256 bytes, ``words`` and nothing else; EOS is special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(EOS, special=True)])
    tokenizer.add_tokens(list(words))
    return tokenizer


class RenderHere:
    """A chat template in this process, for templates that can be trusted."""

    def __init__(self, source: str, special_tokens: Mapping[str, object]) -> None:
        self._template = ChatTemplate(source, special_tokens)

    @property
    def source(self) -> str:
        return self._template.source

    async def render(
        self,
        messages: Sequence[Message],
        tools: Any = None,
        switches: Any = None,
        ending: Any = "answer",
    ) -> Rendered:
        return self._template.render(messages, tools, switches, ending)


def served_model(words: Sequence[str] = (), template: str | None = TEMPLATE) -> ServedModel:
    tokenizer = byte_level_tokenizer(words)
    family = infer_family(template, tokenizer)
    return ServedModel(
        id=MODEL,
        encoder=TextEncoder(tokenizer),
        chat_template=None if template is None else RenderHere(template, {"eos_token": EOS}),
        eos_token_ids=(tokenizer.token_to_id(EOS),),
        created=1_700_000_000,
        token_bytes=TokenBytes(tokenizer),
        parsers=ParserFactory(family, tokenizer),
    )


def ready(
    vocab_size: int = 1000, max_model_len: int = MAX_MODEL_LEN, hidden_size: int = HIDDEN_SIZE
) -> Ready:
    return Ready(
        architecture="fake",
        device="cpu",
        dtype="float32",
        vocab_size=vocab_size,
        max_model_len=max_model_len,
        max_num_seqs=8,
        block_size=16,
        num_blocks=64,
        weight_bytes=0,
        kv_cache_bytes=0,
        abilities=Abilities(hidden_size=hidden_size),
    )


Step = Sequence[int] | BackendError | Literal["hang", "hold"]


@dataclass
class Script:
    """What one request generates, one step for each output.

    A step is token ids, an error to raise, "hang" until the stream is closed, or "hold" until the
    script is ``released``. Tokens end as the worker's would, at a stop token or at max_tokens, and
    after the last step with ``finish_reason``.
    """

    steps: Sequence[Step]
    finish_reason: Literal["stop", "length", "abort", "error"] = "length"
    cached_tokens: int = 0
    error: str | None = None
    released: bool = False


def logprobs_of(token_id: int, num_top: int) -> TokenLogprobs:
    """Made up, but another for each token."""
    others = list(range(num_top))
    return TokenLogprobs(-token_id / 1000, others, [-other / 100 for other in others])


class FakeStream:
    def __init__(self, request: GenerateRequest, script: Script) -> None:
        self.request = request
        self.close_reasons: list[str] = []
        self.outputs_sent = 0
        self.finished = False
        self._script = script
        self._closed = asyncio.Event()

    @property
    def active(self) -> bool:
        return not self.finished and not self.close_reasons

    def close(self, reason: Literal["stop", "abort"] = "abort") -> None:
        if self.active:
            self.close_reasons.append(reason)
        self._closed.set()

    async def __aiter__(self) -> AsyncIterator[TokenOutput]:
        left = self.request.max_tokens
        if (pooling := self.request.pooling) is not None:
            async for output in self._pooled(pooling.dimensions or HIDDEN_SIZE):
                yield output
            return
        for number, step in enumerate(self._script.steps, start=1):
            await asyncio.sleep(0)
            if isinstance(step, BackendError):
                self.finished = True
                raise step
            if step == "hold":
                while not self._script.released:  # noqa: ASYNC110 - set from another thread
                    await asyncio.sleep(0.005)
                continue
            if step == "hang":
                await self._closed.wait()
                return
            assert not isinstance(step, str)
            token_ids: list[int] = []
            reason: Any = None
            for token_id in step:
                token_ids.append(token_id)
                left -= 1
                if token_id in self.request.stop_token_ids:
                    reason = "stop"
                elif left == 0:
                    reason = "length"
                if reason is not None:
                    break
            if reason is None and number == len(self._script.steps):
                reason = self._script.finish_reason
            self.outputs_sent += 1
            self.finished = reason is not None
            yield TokenOutput(
                self.request.request_id,
                token_ids,
                reason,
                self._script.cached_tokens,
                self._script.error if reason in ("error", "abort") else None,
                logprobs=[logprobs_of(token_id, self.request.logprobs) for token_id in token_ids]
                if self.request.logprobs is not None
                else [],
                prompt_logprobs=[
                    logprobs_of(token_id, self.request.prompt_logprobs)
                    for token_id in self.request.prompt_token_ids[1:]
                ]
                if number == 1 and self.request.prompt_logprobs is not None
                else [],
            )
            if self.finished:
                return

    async def _pooled(self, dimensions: int) -> AsyncIterator[TokenOutput]:
        """The prompt's first token and its length, as often as there is room for."""
        ids = self.request.prompt_token_ids
        for step in self._script.steps:
            await asyncio.sleep(0)
            if isinstance(step, BackendError):
                self.finished = True
                raise step
            if step == "hang":
                await self._closed.wait()
                return
        self.outputs_sent += 1
        self.finished = True
        values = ([float(ids[0]), float(len(ids))] * HIDDEN_SIZE)[:dimensions]
        vector = struct.pack(f"<{dimensions}f", *values)
        yield TokenOutput(self.request.request_id, [], "stop", vector=vector)


@dataclass
class FakeBackend:
    """Plays ``scripts`` to requests in order; the last one is repeated."""

    scripts: list[Script] = field(default_factory=lambda: [Script([[0]])])
    alive: bool = True
    max_in_flight: int = 320
    info: Ready | None = field(default_factory=ready)
    refusal: BackendError | None = None  # raised by submit, after ``accept`` submissions
    accept: int = 0
    streams: list[FakeStream] = field(default_factory=list)
    _ids: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def why_unavailable(self) -> Unavailable | None:
        return Unavailable("Still loading.", 3) if self.info is None else None

    def admit(self) -> Ready:
        if (reason := self.why_unavailable()) is not None:
            raise reason
        assert self.info is not None
        return self.info

    def check_room(self, count: int) -> None:
        pass

    def submit(self, request: GenerateRequest) -> FakeStream:
        if self.refusal is not None and len(self.streams) >= self.accept:
            raise self.refusal
        request = msgspec.structs.replace(request, request_id=next(self._ids))
        script = self.scripts[min(len(self.streams), len(self.scripts) - 1)]
        stream = FakeStream(request, script)
        self.streams.append(stream)
        return stream

    @property
    def active(self) -> int:
        return sum(stream.active for stream in self.streams)

    def wait_until_idle(self) -> None:
        """Returns once every submitted request has ended or was closed; fails after a while."""
        deadline = time.monotonic() + 10
        while self.active:
            assert time.monotonic() < deadline, "a request is still running"
            time.sleep(0.005)


def one_model_app(backend: FakeBackend, model: ServedModel, **options: Any) -> Starlette:
    """The application over one model, with metrics of its own."""
    registry = Registry([Served(model, backend)], ["claude-*"])
    return create_app(registry, Metrics(), **options)


@dataclass(frozen=True)
class Server:
    host: str
    port: int
    uvicorn: uvicorn.Server

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def request(
        self,
        method: str,
        path: str,
        body: object = None,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """One request on a connection of its own; a body that is not bytes is sent as JSON."""
        sent = dict(headers or {})
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        if body is not None:
            sent.setdefault("Content-Type", "application/json")
        with contextlib.closing(
            http.client.HTTPConnection(self.host, self.port, timeout=20)
        ) as connection:
            connection.request(method, path, body, sent)
            with connection.getresponse() as response:
                return Reply(response.status, dict(response.getheaders()), response.read())

    def events(self, path: str, body: object) -> list[Any]:
        """The events of a stream, decoded; ``[DONE]`` stays text."""
        reply = self.request("POST", path, body)
        assert reply.status == 200, reply.body
        *events, rest = reply.body.decode().split("\n\n")
        assert rest == ""
        payloads = [event.removeprefix("data: ") for event in events if not event.startswith(":")]
        return [text if text == "[DONE]" else json.loads(text) for text in payloads]

    @contextlib.contextmanager
    def connect(self, data: bytes) -> Iterator[socket.socket]:
        """A connection on which ``data`` has been sent; closed in the end."""
        with socket.create_connection((self.host, self.port), timeout=20) as connection:
            connection.sendall(data)
            yield connection


@dataclass(frozen=True)
class Reply:
    status: int
    headers: Mapping[str, str]  # names in lower case, as uvicorn sends them
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        """The error's fields, which must have the envelope's exact shape."""
        assert self.headers["content-type"] == "application/json"
        [(key, detail)] = self.json.items()
        assert key == "error"
        assert set(detail) == {"message", "type", "param", "code"}
        assert isinstance(detail["message"], str)
        assert isinstance(detail["type"], str)
        return detail


def post(path: str, body: object) -> bytes:
    """The bytes of a POST, for tests that do not wait for the answer."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


@contextlib.contextmanager
def serving(app: Starlette, guard: ConnectionGuard | None = None) -> Iterator[Server]:
    """The app behind uvicorn on a free port of the loopback interface."""
    guard = guard or ConnectionGuard(HttpLimits())
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_level="warning",
                timeout_graceful_shutdown=2,
                http=guard.protocol(),
                ws="none",
            )
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            deadline = time.monotonic() + 10
            while not server.started:
                assert thread.is_alive()
                assert time.monotonic() < deadline
                time.sleep(0.005)
            yield Server("127.0.0.1", listener.getsockname()[1], server)
        finally:
            server.should_exit = True
            thread.join()
