"""What a client's protocol calls the fields of the chat that its request was made into."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from quire.serve.errors import ApiError

_TOOL: Final = re.compile(r"tools\[(\d+)\]\.function\.parameters")


@dataclass(frozen=True, slots=True)
class FieldNames:
    parameters: str  # of a tool: the key of its schema
    tools: Sequence[str]  # where each of the chat's tools stood, behind "tools"
    others: Mapping[str, str]

    def rename(self, error: ApiError) -> ApiError:
        """``error`` with the client's own names, in its message too."""
        if error.param is None:
            return error
        return ApiError(error.status, self._own(error.message), param=self._own(error.param))

    def _own(self, text: str) -> str:
        text = _TOOL.sub(lambda match: f"tools{self.tools[int(match[1])]}.{self.parameters}", text)
        for name, own in self.others.items():
            text = text.replace(name, own)
        return text
