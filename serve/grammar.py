"""What a request may ask of its output's form, checked in helper processes before it is queued.

The checked grammar's text goes to the worker with the request. What cannot be honoured is a 400
with the reason and the place in the schema. Answers, good and bad, are kept by what was asked.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import msgspec

from quire.serve.errors import ApiError, invalid, unavailable
from quire.serve.grammar_check import CheckerConfig, CheckRefusal, CheckRequest
from quire.serve.helpers import (
    HelperBusy,
    HelperCrashed,
    HelperError,
    HelperLimits,
    HelperOutOfMemory,
    HelperPool,
    HelperRefused,
    HelperTimeout,
)
from quire.serve.lark import Lark

MAX_BYTES: Final = 64 << 10  # of one schema, pattern or grammar
CHECK_LIMITS: Final = HelperLimits(processes=2, waiting=128, seconds=2.0, memory=512 << 20)

_MAX_KEPT: Final = 256
_MAX_KEPT_BYTES: Final = 16 << 20
_RETRY_AFTER: Final = 1  # seconds, where too many wait for a check

JSON_OBJECT: Final = CheckRequest("json_schema", '{"type":"object"}')


@dataclass(frozen=True, slots=True)
class ReasoningForm:
    """How the model writes what it thinks before it answers."""

    opener: str
    closer: str
    is_open: bool  # the prompt ends inside
    before_answer: str = ""  # what stands between reasoning and answer, such as a channel's header


def reasoning_frame(form: ReasoningForm, markers: Mapping[str, int]) -> str:
    """A frame for :class:`CheckRequest`: reasoning, then the output, in one pass.

    Args:
        markers: of :func:`quire.serve.lark.markers_of`.
    """
    lark = Lark(markers)
    thought = lark.text_before(form.closer)
    blank = lark.rule(r"/\n{0,3}/")
    answer = f"{blank} {lark.literal(form.before_answer)} @output"
    if form.is_open:
        return lark.build(f"{thought} {answer}")
    opened = lark.rule(f"{lark.literal(form.opener)} {thought} {blank}")
    return lark.build(f"{opened}? {lark.literal(form.before_answer)} @output")


def choice_request(choices: list[str]) -> CheckRequest:
    """Output that is one of these texts."""
    return CheckRequest("choice", msgspec.json.encode(choices).decode())


class GrammarChecker:
    """Checks what requests ask for, for one model.

    Args:
        tokenizer: path of the model's tokenizer.json.
    """

    def __init__(
        self, tokenizer: str, eos_token_ids: list[int], limits: HelperLimits = CHECK_LIMITS
    ) -> None:
        config = CheckerConfig(tokenizer, eos_token_ids)
        self._pool = HelperPool(
            "quire.serve.grammar_check:make_checker", msgspec.to_builtins(config), limits
        )
        self._kept: OrderedDict[bytes, asyncio.Task[str | CheckRefusal]] = OrderedDict()
        self._kept_bytes = 0

    async def __aenter__(self) -> GrammarChecker:
        self._pool.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    def start(self) -> None:
        self._pool.start()

    async def close(self) -> None:
        await self._pool.close()

    async def check(self, wanted: CheckRequest, param: str) -> str:
        """The text of the grammar for :class:`quire.engine.messages.GenerateRequest`.

        Args:
            param: the request's field that says so, for errors.

        Raises:
            ApiError: 400 with the reason; 503 where too many checks wait.
        """
        size = len(wanted.text.encode())
        if size > MAX_BYTES:
            raise invalid(param, f"{param} has {size} bytes; {MAX_BYTES} are allowed.")
        key = hashlib.blake2b(msgspec.msgpack.encode(wanted), digest_size=16).digest()
        task = self._kept.get(key)
        if task is None:
            task = self._kept[key] = asyncio.create_task(self._ask(key, wanted))
            # Its exception is no news if everybody who waited has left.
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._kept.move_to_end(key)
        try:
            # Others may wait for the same answer: a client that leaves does not end the check.
            answer = await asyncio.shield(task)
        except HelperBusy:
            raise unavailable(
                "Too many schemas wait to be checked; try again.", _RETRY_AFTER
            ) from None
        except HelperError as error:
            raise ApiError(500, f"{param} could not be checked: {error}.") from error
        if isinstance(answer, str):
            return answer
        where = param + answer.path
        raise invalid(where, f"{where} cannot be used: {answer.reason.rstrip('.')}.")

    async def _ask(self, key: bytes, wanted: CheckRequest) -> str | CheckRefusal:
        answer: str | CheckRefusal
        try:
            answer = await self._ask_once_more_after_a_crash(wanted)
        except HelperRefused as refused:
            answer = msgspec.convert(refused.details, CheckRefusal)
        except (HelperTimeout, HelperOutOfMemory) as error:
            answer = CheckRefusal(f"it is too complex (its check was {error})")
        except BaseException:
            self._kept.pop(key, None)  # this says nothing about the grammar
            raise
        self._keep_within_limits(answer)
        return answer

    async def _ask_once_more_after_a_crash(self, wanted: CheckRequest) -> str:
        request = msgspec.to_builtins(wanted)
        try:
            grammar: str = await self._pool.call(request)
        except HelperCrashed:  # perhaps it had died before
            grammar = await self._pool.call(request)
        return grammar

    def _keep_within_limits(self, answer: str | CheckRefusal) -> None:
        self._kept_bytes += _size(answer)
        for key, task in list(self._kept.items()):
            if len(self._kept) <= _MAX_KEPT and self._kept_bytes <= _MAX_KEPT_BYTES:
                break
            if task.done():
                del self._kept[key]
                self._kept_bytes -= _size(task.result())


def _size(answer: str | CheckRefusal) -> int:
    return len(answer if isinstance(answer, str) else answer.reason)
