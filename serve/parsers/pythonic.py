"""LFM2 and LFM2.5: a Python list of calls with keyword arguments.

<|tool_call_start|>[f(n=1, s='x'), g()]<|tool_call_end|>
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from typing import Final

from quire.serve.parsers.arguments import ArgumentsWriter
from quire.serve.parsers.reader import MarkupError, Wait
from quire.serve.parsers.syntax import CallSyntax

_IDENTIFIER = re.compile(r"[\w.-]*")
_TEXT = re.compile(r"""[^"'\\\ud800-\udfff]*""")
_BARE = re.compile(r"""[^"'()\[\]{},\ud800-\udfff]*""")
# Templates quote strings without escaping the quotes inside them, so that only a quote before the
# next argument or the call's end is a closing one.
_AFTER_TEXT = re.compile(r"\s*(?:\)\s*[,\]]|,\s*[\w.-]+\s*=)")
_MAYBE_AFTER_TEXT = re.compile(r"\s*(?:\)\s*|,\s*[\w.-]*\s*)?")
_NAMES: Final = {"true": True, "false": False, "null": None}


class Pythonic(CallSyntax):
    openers = ("<|tool_call_start|>",)
    closers = ("<|tool_call_end|>",)

    def block(self, opener: str) -> Wait[None]:
        yield from self.expect("[")
        while True:
            yield from self.reader.skip_space()
            name = yield from self.tool_name("(")
            yield from self.expect("(")
            yield from self._call(name)
            if (yield from self.expect(",", "]")) == "]":
                break
        if (yield from self.follows(*self.closers)) is not None:
            yield from self.expect(*self.closers)

    def _call(self, name: str) -> Wait[None]:
        keyword = yield from self._keyword()
        arguments = self.arguments(name)
        while keyword is not None:
            yield from self._value(arguments, keyword)
            if (yield from self.expect(",", ")")) == ")":
                break
            keyword = yield from self._keyword()
        arguments.end()
        self.end()

    def _keyword(self) -> Wait[str | None]:
        """The next argument's name, with its equals sign; None at the end of the arguments."""
        yield from self.reader.skip_space()
        if (yield from self.reader.accept(")")) is not None:
            return None
        parts: list[str] = []
        yield from self.reader.span(_IDENTIFIER, parts.append)
        self.reader.position -= 1
        yield from self.expect("=")  # a positional argument has no name to send it under
        return "".join(parts)

    def _value(self, arguments: ArgumentsWriter, keyword: str) -> Wait[None]:
        yield from self.reader.skip_space()
        value = arguments.value(keyword)
        quotation = yield from self.reader.accept('"', "'")
        if quotation is None:
            text = yield from self._bare_value()
            value.write(_json_literal(text) if text[:1] in "[{(" else text)
        else:
            while True:
                char = yield from self.reader.span(_TEXT, value.write)
                if char == "\\":
                    value.write(_unescaped(char + (yield from self.reader.next())))
                elif char != quotation:
                    value.write(self.markers.show(char))
                elif (yield from self.reader.matches(_AFTER_TEXT, _MAYBE_AFTER_TEXT)):
                    break
                else:
                    value.write(char)
        value.end()

    def _bare_value(self) -> Wait[str]:
        """The text up to a comma or closing bracket on its own level, which is not read."""
        parts: list[str] = []
        depth = 0
        while True:
            char = yield from self.reader.span(_BARE, parts.append)
            if char in ",)" and depth == 0:
                self.reader.position -= 1
                return "".join(parts).strip()
            if char in "([{":
                depth += 1
            elif char in ")]}":
                depth -= 1
            elif char in "\"'":
                parts.append(char)
                yield from self._quoted(char, parts)
            elif char != ",":
                raise MarkupError
            parts.append(char)

    def _quoted(self, quotation: str, parts: list[str]) -> Wait[None]:
        """A string inside a list or mapping, without its closing quote."""
        while True:
            char = yield from self.reader.span(_TEXT, parts.append)
            if char == quotation:
                return
            parts.append(self.markers.show(char))
            if char == "\\":
                parts.append(self.markers.show((yield from self.reader.next())))


def _unescaped(pair: str) -> str:
    """What a backslash and a character stand for; an escape that is none stays as it is."""
    simple = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", "'": "'", '"': '"'}
    return simple.get(pair[1], pair)


def _json_literal(text: str) -> str:
    """A Python literal, in which JSON's constants may stand too, as JSON; else the text itself."""
    try:
        with warnings.catch_warnings(action="ignore", category=SyntaxWarning):
            tree = ast.parse(text, mode="eval")
        return json.dumps(_evaluate(tree.body), ensure_ascii=False, separators=(",", ":"))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return text


def _evaluate(node: ast.expr) -> object:
    match node:
        case ast.Name(id=name) if name in _NAMES:
            return _NAMES[name]
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_evaluate(item) for item in items]
        case ast.Dict(keys=keys, values=values) if None not in keys:
            pairs = zip(keys, values, strict=True)
            return {str(_evaluate(key)): _evaluate(value) for key, value in pairs if key}
    value = ast.literal_eval(node)
    if value is not None and not isinstance(value, (bool, int, float, str)):
        raise ValueError
    return value
