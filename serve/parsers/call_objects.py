"""Calls written as JSON objects: {"name": "f", "arguments": {...}}.

Hermes (Qwen 2.5, Qwen 3, Granite 4) writes one object between tags; Granite 3 and the first Mistral
tokenizers write an array; Llama 3 writes bare objects.
"""

from __future__ import annotations

from typing import ClassVar

from quire.serve.parsers.reader import MarkupError, Wait
from quire.serve.parsers.syntax import CallSyntax, UnknownName

_ARGUMENTS = ("arguments", "parameters")
# Members that models add and that say nothing about the call.
_IGNORED = ("id", "type", "index")


class CallObjects(CallSyntax):
    def objects(self) -> Wait[None]:
        """An array of call objects, or objects in a row; stops in front of anything else."""
        yield from self.reader.skip_space()
        in_array = (yield from self.reader.accept("[")) is not None
        yield from self.expect("{")
        yield from self.call_object()
        while True:
            # White space is left alone unless another object follows.
            separator = yield from self.follows("{", ",", ";", "]" if in_array else "{")
            if separator is None:
                return
            yield from self.expect(separator)
            if separator == "]":
                return
            if separator != "{":
                yield from self.expect("{")
            yield from self.call_object()

    def call_object(self) -> Wait[None]:
        """One call, after its opening brace. The members may stand in any order."""
        name: str | None = None
        early: str | None = None  # arguments that came before the name
        ended = False
        while (key := (yield from self._key())) is not None:
            if key == "name" and name is None:
                name = yield from self._name()
                if early is not None:
                    self._whole_call(name, early)
                    ended = True
            elif key in _ARGUMENTS and not ended and early is None:
                if name is None:
                    early = yield from self._early_arguments()
                else:
                    yield from self._arguments(name)
                    ended = True
            elif key in _IGNORED or ended:
                yield from self.json.value(lambda text: None)
            else:
                raise MarkupError
        if name is None:
            raise MarkupError
        if not ended:
            self._whole_call(name, "{}")

    def _key(self) -> Wait[str | None]:
        """The next member's name, with its colon; None at the object's end."""
        reader = self.reader
        mark = yield from self.expect('"', ",", "}")
        if mark == "}":
            return None
        if mark == ",":
            yield from self.expect('"')
        parts: list[str] = []
        yield from self.json.string(parts.append)
        yield from self.expect(":")
        yield from reader.skip_space()
        return "".join(parts)

    def _name(self) -> Wait[str]:
        name = yield from self.json.short_string()
        if name not in self.tools:
            raise UnknownName
        assert name is not None
        return name

    def _arguments(self, name: str) -> Wait[None]:
        opening = yield from self.reader.accept("{", '"', "null")
        if opening is None:
            raise MarkupError
        if opening == "null":
            self._whole_call(name, "{}")
            return
        self.start(name)
        yield from self.json_object(opening, self.events.arguments)
        self.end()

    def _early_arguments(self) -> Wait[str]:
        parts: list[str] = []
        opening = yield from self.reader.accept("{", '"', "null")
        if opening is None:
            raise MarkupError
        if opening == "null":
            return "{}"
        yield from self.json_object(opening, parts.append)
        return "".join(parts)

    def _whole_call(self, name: str, arguments: str) -> None:
        self.start(name)
        self.events.arguments(arguments)
        self.end()


class Hermes(CallObjects):
    openers: ClassVar[tuple[str, ...]] = ("<tool_call>",)
    closers = ("</tool_call>",)

    def block(self, opener: str) -> Wait[None]:
        yield from self.objects()
        # Models close a bracket too many now and then.
        while (yield from self.follows("}", "]", "</tool_call>")) is not None:
            if (yield from self.expect("}", "]", "</tool_call>")) not in "}]":
                return


class Granite3(Hermes):
    openers = ("<|tool_call|>", "<tool_call>")


class Llama3(CallObjects):
    openers = ("<|python_tag|>",)
    first_openers = ("{",)

    def block(self, opener: str) -> Wait[None]:
        yield from self.objects()
