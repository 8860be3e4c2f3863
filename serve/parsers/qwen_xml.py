"""Qwen 3 Coder, Qwen 3.5 and later, Nemotron 3: functions and parameters as tags.

<tool_call>\n<function=f>\n<parameter=n>\n1\n</parameter>\n</function>\n</tool_call>
"""

from __future__ import annotations

from quire.serve.parsers.reader import Wait
from quire.serve.parsers.syntax import CallSyntax

_FUNCTION = "<function="
_PARAMETER = "<parameter="


class QwenXml(CallSyntax):
    # Qwen 3 Coder often leaves the outer tag out.
    openers = ("<tool_call>", _FUNCTION)
    closers = ("</tool_call>",)

    def block(self, opener: str) -> Wait[None]:
        if opener == "<tool_call>":
            yield from self.expect(_FUNCTION)
        yield from self._function()
        while (yield from self.follows(_FUNCTION, "</tool_call>")) is not None:
            if (yield from self.expect(_FUNCTION, "</tool_call>")) != _FUNCTION:
                return
            yield from self._function()

    def _function(self) -> Wait[None]:
        name = yield from self.tool_name(">")
        yield from self.expect(">")
        yield from self.require(_PARAMETER, "</function>")
        arguments = self.arguments(name)
        declared = self.tools.parameters(name)
        known = [f"{_PARAMETER}{key}>" for key in declared] or [_PARAMETER]
        after_value = (*known, "</function>", "</tool_call>")
        tags = self.stops(_PARAMETER, "</function>", "</tool_call>")
        while (yield from self.reader.until(tags, lambda text: None)) == _PARAMETER:
            key, _ = yield from self.reader.collect_until(self.stops(">"))
            value = arguments.value(key)
            # Text that begins on a line of its own ends with its line, too.
            own_line = (yield from self.reader.accept("\n")) is not None
            if not (own_line and value.may_be_text):
                yield from self.element("</parameter>", after_value, value.write)
            elif (yield from self.reader.accept("</parameter>")) is None:
                yield from self.element("\n</parameter>", after_value, value.write)
            value.end()
        arguments.end()
        self.end()
