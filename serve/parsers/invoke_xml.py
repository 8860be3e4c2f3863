"""MiniMax M2 and DeepSeek V3.2: invocations as tags with attributes.

<invoke name="f">\n<parameter name="n">1</parameter>\n</invoke>
"""

from __future__ import annotations

from typing import ClassVar

from quire.serve.parsers.reader import Wait
from quire.serve.parsers.schemas import Types
from quire.serve.parsers.syntax import CallSyntax


class InvokeXml(CallSyntax):
    prefix: ClassVar[str]  # of the tags inside the block

    def block(self, opener: str) -> Wait[None]:
        invoke = f'<{self.prefix}invoke name="'
        end = "</" + opener[1:]
        yield from self.expect(invoke)
        yield from self._invocation()
        while (yield from self.follows(invoke, end)) is not None:
            if (yield from self.expect(invoke, end)) != self.fold(invoke)[0]:
                return
            yield from self._invocation()

    def _invocation(self) -> Wait[None]:
        parameter, end = f'<{self.prefix}parameter name="', f"</{self.prefix}invoke>"
        name = yield from self.tool_name('"')
        yield from self.reader.collect_until(self.stops(">"))
        yield from self.require(parameter, end)
        arguments = self.arguments(name)
        tags = self.stops(parameter, end)
        [parameter_tag] = self.fold(parameter)
        while (yield from self.reader.until(tags, lambda text: None)) == parameter_tag:
            key, _ = yield from self.reader.collect_until(self.stops('"'))
            attributes, _ = yield from self.reader.collect_until(self.stops(">"))
            value = arguments.value(key, self.types(attributes))
            yield from self.element(f"</{self.prefix}parameter>", (parameter, end), value.write)
            value.end()
        arguments.end()
        self.end()

    def types(self, attributes: str) -> Types | None:
        """What the value's tag says of its type, for parameters that the schema does not name."""
        return None


class MiniMax(InvokeXml):
    prefix = ""
    openers = ("<minimax:tool_call>",)
    closers = ("</minimax:tool_call>",)


class DeepSeekDsml(InvokeXml):
    prefix = "｜DSML｜"
    openers = ("<｜DSML｜function_calls>", "<｜DSML｜tool_calls>")
    closers = ("</｜DSML｜function_calls>", "</｜DSML｜tool_calls>")
    marks = ("｜DSML｜",)

    def types(self, attributes: str) -> Types | None:
        return frozenset({"string"}) if 'string="true"' in attributes else None
