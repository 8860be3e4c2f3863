"""Mistral: a marker, the name, JSON arguments. The end of the answer ends the last call.

v11 and later   [TOOL_CALLS]f[ARGS]{"n": 1}
Small 3.2       [TOOL_CALLS]f[CALL_ID]abc123456[ARGS]{"n": 1}
v3 to v7        [TOOL_CALLS][{"name": "f", "arguments": {"n": 1}}]
"""

from __future__ import annotations

import secrets
import string

from quire.serve.parsers.call_objects import CallObjects
from quire.serve.parsers.reader import Wait

_ALPHANUMERIC = string.ascii_letters + string.digits


def new_mistral_id() -> str:
    """The templates raise an error for ids of any other form."""
    return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(9))


class Mistral(CallObjects):
    openers = ("[TOOL_CALLS]",)
    marks = ("[ARGS]", "[CALL_ID]")

    def block(self, opener: str) -> Wait[None]:
        yield from self.reader.skip_space()
        if (yield from self.reader.peek(("[",))) is not None:
            yield from self.objects()
            return
        name = yield from self.tool_name("[ARGS]", "[CALL_ID]", "{", " ")
        call_id: str | None = None
        mark = yield from self.expect("[ARGS]", "[CALL_ID]", "{")
        if mark == self.fold("[CALL_ID]")[0]:
            call_id, _ = yield from self.reader.collect_until(self.stops("[ARGS]"))
        elif mark == "{":
            self.reader.position -= 1
        yield from self.json_arguments(name, call_id)
