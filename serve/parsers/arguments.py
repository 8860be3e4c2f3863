"""The JSON text of a call's arguments, written while the model still writes their values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from quire.serve.parsers.schemas import ANY, Types, json_of, quote

Emit = Callable[[str], None]
_NULL: Final = "null"


class ValueWriter:
    """One value that the model writes as bare text.

    A value that can only be a string is passed on piece by piece; any other is kept until it ends,
    since only the whole says what it is.
    """

    def __init__(self, emit: Emit, types: Types) -> None:
        self._emit = emit
        self._types = types
        self._held: list[str] = []
        self._may_be_null = "null" in types
        self._streams = types == {"string"}
        if self._streams:
            emit('"')

    def write(self, text: str) -> None:
        if self._streams:
            self._emit(quote(text)[1:-1])
            return
        self._held.append(text)
        if "string" in self._types and not self._could_be_null():
            self._streams = True
            self._emit('"' + quote("".join(self._held))[1:-1])

    @property
    def may_be_text(self) -> bool:
        return not self._types or "string" in self._types

    def _could_be_null(self) -> bool:
        return self._may_be_null and _NULL.startswith("".join(self._held))

    def end(self) -> None:
        self._emit('"' if self._streams else json_of("".join(self._held), self._types))


class ArgumentsWriter:
    """An object of named values: ``{"key":value,...}``, without white space."""

    def __init__(self, emit: Emit, parameters: Mapping[str, Types]) -> None:
        self._emit = emit
        self._parameters = parameters
        self._opened = False

    def key(self, name: str) -> None:
        self._emit(f"{',' if self._opened else '{'}{quote(name)}:")
        self._opened = True

    def value(self, name: str, types: Types | None = None) -> ValueWriter:
        """Writes the key; the value follows. ``types`` count where the schema is silent."""
        self.key(name)
        return ValueWriter(self._emit, self._parameters.get(name) or types or ANY)

    def end(self) -> None:
        self._emit("}" if self._opened else "{}")
