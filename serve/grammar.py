"""What a request may ask of its output's form, checked in helper processes before it is queued.

The checked grammar's text goes to the worker with the request. What cannot be honoured is a 400
with the reason and the place in the schema. Answers, good and bad, are kept by what was asked.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from typing import Final

import msgspec

from quire.serve.errors import ApiError, invalid, unavailable
from quire.serve.grammar_check import CheckerConfig, CheckRefusal, CheckRequest, Tool, Tools
from quire.serve.helper_answers import RETRY_AFTER
from quire.serve.helper_errors import (
    HelperBusy,
    HelperCrashed,
    HelperError,
    HelperOutOfMemory,
    HelperRefused,
    HelperTimeout,
)
from quire.serve.helpers import HelperLimits, HelperPool
from quire.serve.tool_grammar import CallRules

MAX_BYTES: Final = 64 << 10  # of one schema, pattern or grammar
MAX_TOOLS_BYTES: Final = 256 << 10  # of all tools together
CHECK_LIMITS: Final = HelperLimits(
    processes=2, waiting=128, seconds=2.0, memory=512 << 20, eager=False
)

_MAX_KEPT: Final = 256
_MAX_KEPT_BYTES: Final = 16 << 20
JSON_OBJECT: Final = CheckRequest("json_schema", '{"type":"object"}')


def choice_request(choices: list[str]) -> CheckRequest:
    """Output that is one of these texts."""
    return CheckRequest("choice", msgspec.json.encode(choices).decode())


def tools_request(rules: CallRules, tools: list[Tool]) -> CheckRequest:
    """Output that calls tools by ``rules``; ``tools`` are those that may be called."""
    return CheckRequest("tools", msgspec.json.encode(Tools(rules, tools)).decode())


class GrammarChecker:
    """Checks what requests ask for, for one model.

    Args:
        tokenizer: path of the model's tokenizer.json.
        markers: of :func:`quire.serve.lark.markers_of`.
    """

    def __init__(
        self,
        tokenizer: str,
        eos_token_ids: list[int],
        markers: dict[str, int],
        limits: HelperLimits = CHECK_LIMITS,
    ) -> None:
        config = CheckerConfig(tokenizer, eos_token_ids, markers)
        self._pool = HelperPool(
            "quire.serve.grammar_check:make_checker", msgspec.to_builtins(config), limits
        )
        self._kept: OrderedDict[bytes, asyncio.Task[str | CheckRefusal]] = OrderedDict()
        self._kept_bytes = 0

    async def __aenter__(self) -> GrammarChecker:
        self._pool.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._pool.close()

    async def check(self, wanted: CheckRequest, param: str) -> str:
        """The text of the grammar for :class:`quire.engine.messages.GenerateRequest`.

        Args:
            param: the request's field that says so, for errors.

        Raises:
            ApiError: 400 with the reason; 503 where too many checks wait.
        """
        size = len(wanted.text.encode())
        limit = MAX_TOOLS_BYTES if wanted.kind == "tools" else MAX_BYTES
        if size > limit:
            raise invalid(param, f"{param} has {size} bytes; {limit} are allowed.")
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
                "Too many schemas wait to be checked; try again.", RETRY_AFTER
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
            answer = await self._pool.call_surviving(wanted)
        except HelperRefused as refused:
            answer = msgspec.convert(refused.details, CheckRefusal)
        except (HelperTimeout, HelperOutOfMemory) as error:
            answer = CheckRefusal(f"it is too complex (its check was {error})")
        except HelperCrashed as error:  # twice: llguidance aborts where memory ends
            answer = CheckRefusal(f"it is too complex ({error})")
        except BaseException:
            self._kept.pop(key, None)  # this says nothing about the grammar
            raise
        self._keep_within_limits(answer)
        return answer

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
