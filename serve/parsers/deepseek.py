"""DeepSeek V3, R1 and V3.1: JSON arguments between tokens.

V3.1      <｜tool▁call▁begin｜>f<｜tool▁sep｜>{"n": 1}<｜tool▁call▁end｜>
V3, R1    <｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"n": 1}\n```<｜tool▁call▁end｜>
"""

from __future__ import annotations

from quire.serve.parsers.reader import MarkupError, Wait
from quire.serve.parsers.syntax import CallSyntax, UnknownName

_BEGIN = "<｜tool▁call▁begin｜>"
_SEPARATOR = "<｜tool▁sep｜>"
_END = "<｜tool▁call▁end｜>"
_BLOCK_END = "<｜tool▁calls▁end｜>"
_FENCE = "\n```json"


class DeepSeek(CallSyntax):
    openers = ("<｜tool▁calls▁begin｜>", _BEGIN)
    closers = (_BLOCK_END,)
    marks = (_SEPARATOR, _END)

    def block(self, opener: str) -> Wait[None]:
        if opener != _BEGIN:
            yield from self.expect(_BEGIN)
        yield from self._call()
        while (yield from self.follows(_BEGIN, _BLOCK_END)) is not None:
            if (yield from self.expect(_BEGIN, _BLOCK_END)) != self.fold(_BEGIN)[0]:
                return
            yield from self._call()

    def _call(self) -> Wait[None]:
        name, stop = yield from self.reader.collect_until(self.stops(_SEPARATOR, _END))
        if stop != self.fold(_SEPARATOR)[0]:
            raise MarkupError
        name = name.strip()
        if name == "function" and (yield from self.follows("{")) is None:
            name, stop = yield from self.reader.collect_until(self.stops(_FENCE, _END))
            if stop != _FENCE:
                raise MarkupError
        if name not in self.tools:
            raise UnknownName
        yield from self.json_arguments(name)
        yield from self.reader.until(self.stops(_END), lambda text: None)
