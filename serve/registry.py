"""Which models are served, by the name that clients use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from quire.serve.backend import Backend
from quire.serve.errors import ApiError, invalid
from quire.serve.output_form import Wanted
from quire.serve.served_model import ServedModel


@dataclass(frozen=True)
class Served:
    """One model: its text side, and the engine that generates its tokens."""

    model: ServedModel
    backend: Backend

    async def check_output(self, wanted: Wanted | None) -> str:
        """The grammar of what a request wants, "" for nothing. Raises :class:`ApiError`."""
        if wanted is None:
            return ""
        grammars = self.model.grammars
        if grammars is None or not self.backend.admit().grammars:
            raise invalid(
                wanted.param, f"{wanted.param} is not available: this model takes no grammars."
            )
        if wanted.alone is not None:
            await grammars.check(wanted.alone.request, wanted.alone.param)
        return await grammars.check(wanted.request, wanted.param)


class Registry:
    """Name -> :class:`Served`, in the order given. Names are unique and there is at least one."""

    def __init__(self, served: Iterable[Served], aliases: Sequence[str] = ()) -> None:
        """``aliases`` are patterns such as "claude-*" of names that mean the first model."""
        self._aliases = aliases
        self._by_name: dict[str, Served] = {}
        for entry in served:
            if entry.model.id in self._by_name:
                raise ValueError(f"two models are called {entry.model.id!r}")
            self._by_name[entry.model.id] = entry
        if not self._by_name:
            raise ValueError("a server needs a model")

    def __iter__(self) -> Iterator[Served]:
        return iter(self._by_name.values())

    def find(self, name: str) -> Served:
        """Raises :class:`ApiError` (404) that lists the names which are served."""
        if (served := self._by_name.get(name)) is None:
            if any(fnmatchcase(name, pattern) for pattern in self._aliases):
                return next(iter(self))
            raise ApiError(
                404,
                f"The model {name[:200]!r} is not served here; use {self._names()}.",
                param="model",
                code="model_not_found",
            )
        return served

    def find_or_only(self, name: str | None) -> Served:
        """Like :meth:`find`; a request that names no model means the only one there is."""
        if name is not None:
            return self.find(name)
        if len(self._by_name) > 1:
            raise invalid("model", f"model is required; this server has {self._names()}.")
        return next(iter(self))

    def _names(self) -> str:
        return " or ".join(map(repr, self._by_name))
