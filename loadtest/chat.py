"""Chat completions over HTTP: find the model, and time one streamed answer."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from typing import Any, NamedTuple

import msgspec

from quire.loadtest.http import BaseURL, EventParser, ProtocolError, Truncated, send
from quire.loadtest.records import RequestError, RequestRecord

Message = dict[str, str]

_MODELS_TIMEOUT = 10.0  # seconds


class ServerError(Exception):
    """The server cannot be measured; the message is one line that says why.

    ``retryable`` where it may only be starting: it does not answer, or answers 503.
    """

    def __init__(self, message: str, retryable: bool = False) -> None:
        super().__init__(message)
        self.retryable = retryable


class Target(msgspec.Struct, frozen=True):
    """A server, a model on it, and what every request asks for."""

    base: BaseURL
    model: str
    temperature: float = 0.0
    ignore_eos: bool = False  # an extension: vLLM and Quire take it, others may refuse it
    token_ids: bool = False  # of each chunk, so that those without text count; an extension too
    own_salts: bool = False  # of each request, so that none finds another's prefix; likewise
    include_usage: bool = True
    timeout: float = 600.0  # seconds for one request
    headers: dict[str, str] = {}
    fields: dict[str, Any] = {}  # of every request, beside these

    def body(self, messages: list[Message], max_tokens: int, stream: bool = True) -> bytes:
        request: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "max_tokens": max_tokens,
            "temperature": self.temperature,
            "stream": stream,
            **self.fields,
        }
        if self.ignore_eos:
            request["ignore_eos"] = True
        if self.token_ids:
            request["return_token_ids"] = True
        if self.own_salts:
            request["cache_salt"] = secrets.token_hex(8)
        if stream and self.include_usage:
            request["stream_options"] = {"include_usage": True}
        return msgspec.json.encode(request)


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # mlx_lm.server's name for it

    @property
    def text(self) -> str:
        return (self.reasoning_content or self.reasoning or "") + (self.content or "")


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: _PromptDetails | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    prompt_token_ids: list[int] | None = None
    usage: _Usage | None = None
    error: Any = None


class Answer(NamedTuple):
    """Token ids where they were asked for and told."""

    text: str
    prompt_token_ids: list[int]
    token_ids: list[int]


class _Model(msgspec.Struct):
    id: str


class _ModelList(msgspec.Struct):
    data: list[_Model]


_decode_chunk = msgspec.json.Decoder(_Chunk).decode
_decode_models = msgspec.json.Decoder(_ModelList).decode


def error_message(body: bytes | Any) -> str:
    """The message in an error body of OpenAI's shape or a near relative, on one line."""
    value = body
    if isinstance(body, bytes):
        try:
            value = msgspec.json.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError):
            value = body.decode("utf-8", "replace")
    for key in ("error", "message", "detail"):
        if isinstance(value, dict) and key in value:
            value = value[key]
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return " ".join(text.split())[:300] or "(empty body)"


class _Stream:
    """Feeds one answer's events into its record."""

    def __init__(self, record: RequestRecord, began: float) -> None:
        self.record = record
        self.began = began
        self.text: list[str] = []
        self.prompt_token_ids: list[int] = []
        self.token_ids: list[int] = []
        self.done = False

    def feed(self, event: bytes, now: float) -> None:
        if event == b"[DONE]":
            self.done = True
            return
        chunk = _decode_chunk(event)
        if chunk.error is not None:
            raise _StreamError(error_message({"error": chunk.error}))
        self.prompt_token_ids += chunk.prompt_token_ids or []
        text, has_tokens = "", False
        for choice in chunk.choices:
            has_tokens = has_tokens or bool(choice.token_ids)
            self.token_ids += choice.token_ids or []
            text += choice.delta.text if choice.delta else ""
            self.record.finish_reason = choice.finish_reason or self.record.finish_reason
        if text or has_tokens:  # a chunk with only a role is not a token
            self.text.append(text)
            self.record.chunk_ms.append(round((now - self.began) * 1e3, 3))
        if (usage := chunk.usage) is not None:
            self.record.prompt_tokens = usage.prompt_tokens
            self.record.completion_tokens = usage.completion_tokens
            if usage.prompt_tokens_details is not None:
                self.record.cached_tokens = usage.prompt_tokens_details.cached_tokens


class _StreamError(Exception):
    pass


async def _receive(target: Target, body: bytes, stream: _Stream) -> RequestError | None:
    events = EventParser()
    async with send(target.base, "POST", "/v1/chat/completions", body, target.headers) as response:
        if response.status != 200:
            message = error_message(await response.read())
            return RequestError("http", message, response.status)
        async for data in response:
            now = time.perf_counter()
            for event in events.feed(data):
                stream.feed(event, now)
            if stream.done:
                return None
    return RequestError("truncated", "the stream ended without [DONE]")


async def stream_chat(
    target: Target, messages: list[Message], record: RequestRecord, epoch: float
) -> Answer:
    """Send one streamed request, fill ``record`` as chunks arrive, and return the answer.

    ``epoch`` is the ``time.perf_counter()`` that ``record.start_ms`` counts from. Failures are
    written to ``record.error``, never raised.
    """
    body = target.body(messages, record.max_tokens)
    began = time.perf_counter()
    record.start_ms = round((began - epoch) * 1e3, 3)
    stream = _Stream(record, began)
    try:
        async with asyncio.timeout(target.timeout):
            record.error = await _receive(target, body, stream)
    except TimeoutError:
        record.error = RequestError("timeout", f"no whole answer in {target.timeout:g} s")
    except Truncated as error:
        record.error = RequestError("truncated", str(error))
    except (ProtocolError, msgspec.DecodeError, UnicodeDecodeError) as error:
        record.error = RequestError("protocol", str(error))
    except _StreamError as error:
        record.error = RequestError("stream", str(error))
    except OSError as error:
        record.error = RequestError("connect", str(error))
    record.end_ms = round((time.perf_counter() - began) * 1e3, 3)
    text = "".join(stream.text)
    if record.error is None:
        record.answer_digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    return Answer(text, stream.prompt_token_ids, stream.token_ids)


async def find_model(base: BaseURL, headers: dict[str, str]) -> str:
    """The id of the one model at ``/v1/models``; ``default_model`` where it lists none.

    ``default_model`` is the name by which mlx_lm.server serves what it was started with; its
    list is empty, or an error, where there is no download cache. Raises :class:`ServerError`
    where the server lists several, since asking for the wrong one may load it.
    """
    try:
        async with (
            asyncio.timeout(_MODELS_TIMEOUT),
            send(base, "GET", "/v1/models", headers=headers) as response,
        ):
            status, body = response.status, await response.read()
        models = [model.id for model in _decode_models(body).data] if status == 200 else []
    except (Truncated, ProtocolError, msgspec.DecodeError):
        models = []
    except OSError as error:
        raise ServerError(
            f"no server answers at {base.host}:{base.port}: {error}", retryable=True
        ) from None
    if len(models) > 1:
        raise ServerError(f"the server lists several models; choose with --model: {models}")
    return models[0] if models else "default_model"


async def probe(target: Target) -> tuple[Target, dict[str, str]]:
    """Send one short request; return a target the server accepts, and its response headers.

    ``stream_options`` is left out where the server refuses it. Raises :class:`ServerError` where
    no request succeeds.
    """
    message = [{"role": "user", "content": "hello"}]
    try:
        async with (
            asyncio.timeout(target.timeout),
            send(
                target.base,
                "POST",
                "/v1/chat/completions",
                target.body(message, 1),
                target.headers,
            ) as response,
        ):
            status, headers, body = response.status, response.headers, await response.read()
    except TimeoutError:
        raise ServerError(f"no answer within {target.timeout:g} s") from None
    except (OSError, Truncated, ProtocolError) as error:
        raise ServerError(
            f"{target.base.host}:{target.base.port}: {error}", retryable=True
        ) from None
    if status == 200:
        return target, headers
    reason = error_message(body)
    if status in (400, 422) and target.include_usage and "stream_options" in reason:
        return await probe(msgspec.structs.replace(target, include_usage=False))
    raise ServerError(
        f"the server answers {status} to a chat completion: {reason}", retryable=status == 503
    )
