"""GLM 4.5 and later, Laguna: keys and values as tags; 4.5 and 4.6 add line ends between the tags.

<tool_call>f<arg_key>n</arg_key><arg_value>1</arg_value></tool_call>
"""

from __future__ import annotations

from quire.serve.parsers.reader import Wait
from quire.serve.parsers.syntax import CallSyntax


class Glm(CallSyntax):
    openers = ("<tool_call>",)
    closers = ("</tool_call>",)
    marks = ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")

    def block(self, opener: str) -> Wait[None]:
        name = yield from self.tool_name("\n", " ", "<arg_key>", "</tool_call>")
        yield from self.require("<arg_key>", "</tool_call>")
        arguments = self.arguments(name)
        tags = self.stops("<arg_key>", "</tool_call>")
        [key_tag] = self.fold("<arg_key>")
        while (yield from self.reader.until(tags, lambda text: None)) == key_tag:
            key, _ = yield from self.reader.collect_until(self.stops("</arg_key>"))
            yield from self.expect("<arg_value>")
            value = arguments.value(key.strip())
            yield from self.element("</arg_value>", ("<arg_key>", "</tool_call>"), value.write)
            value.end()
        arguments.end()
        self.end()
