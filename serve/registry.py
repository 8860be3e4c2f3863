"""Which models are served, by the name that clients use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Protocol

from starlette.requests import Request

from quire.serve import request_record
from quire.serve.backend import Backend, Unavailable
from quire.serve.disconnect import unless_disconnected
from quire.serve.errors import ApiError, invalid
from quire.serve.output_form import Wanted
from quire.serve.served_model import ServedModel


@dataclass(frozen=True)
class Served:
    """One model: its text side, and the engine that generates its tokens."""

    model: ServedModel
    backend: Backend

    @property
    def id(self) -> str:
        return self.model.id

    @property
    def names(self) -> Sequence[str]:
        return (self.model.id,)

    @property
    def created(self) -> int:
        return self.model.created

    @property
    def alive(self) -> bool:
        return self.backend.alive

    @property
    def served(self) -> Served:
        return self

    def why_unavailable(self) -> Unavailable | None:
        return self.backend.why_unavailable()

    async def open(self, name: str) -> Served:
        return self

    async def unload(self) -> None:
        raise ApiError(409, f"The model {self.id} is always loaded.", code="model_pinned")

    async def check_output(self, wanted: Wanted | None) -> str:
        """The grammar of what a request wants, "" for nothing. Raises :class:`ApiError`."""
        if wanted is None:
            return ""
        grammars = self.model.grammars
        if grammars is None or not self.backend.admit().abilities.grammars:
            raise invalid(
                wanted.param, f"{wanted.param} is not available: this model takes no grammars."
            )
        if wanted.alone is not None:
            await grammars.check(wanted.alone.request, wanted.alone.param)
        return await grammars.check(wanted.request, wanted.param)


class Entry(Protocol):
    """A model that may be served, loaded or not; :class:`Served` is one that is."""

    @property
    def id(self) -> str: ...

    @property
    def names(self) -> Sequence[str]:
        """All that clients may call it, ``id`` first."""
        ...

    @property
    def created(self) -> int:
        """Seconds since the epoch."""
        ...

    @property
    def alive(self) -> bool:
        """Whether every process that should exist does."""
        ...

    @property
    def served(self) -> Served | None:
        """None while it is not in memory."""
        ...

    def why_unavailable(self) -> Unavailable | None:
        """Why a request would be refused now; None if it is taken, even if it first has to wait for
        the model to be loaded."""
        ...

    async def open(self, name: str) -> Served:
        """The model under one of its names, loaded if need be, and kept while the current request
        lasts.

        Raises :class:`Unavailable` and :class:`ApiError`.
        """
        ...

    async def unload(self) -> None:
        """Give its memory back. Raises :class:`ApiError` (409) while requests run."""
        ...


class Registry:
    """Name -> :class:`Entry`, in the order given. Names are unique and there is at least one."""

    def __init__(self, entries: Iterable[Entry], aliases: Sequence[str] = ()) -> None:
        """``aliases`` are patterns such as "claude-*" of names that mean the first model."""
        self._aliases = aliases
        self._entries = list(entries)
        self._by_name: dict[str, Entry] = {}
        for entry in self._entries:
            for name in entry.names:
                if name in self._by_name:
                    raise ValueError(f"two models are called {name!r}")
                self._by_name[name] = entry
        if not self._entries:
            raise ValueError("a server needs a model")

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries)

    @property
    def first(self) -> Entry:
        return self._entries[0]

    def find(self, name: str) -> Entry:
        """Raises :class:`ApiError` (404) that lists the names which are served."""
        entry = self._by_name.get(name)
        if entry is None and any(fnmatchcase(name, pattern) for pattern in self._aliases):
            entry = self.first
        if entry is None:
            raise ApiError(
                404,
                f"The model {name[:200]!r} is not served here; use {self._names()}.",
                param="model",
                code="model_not_found",
            )
        if (record := request_record.current()) is not None:
            record.model = entry.id
        return entry

    async def open(self, request: Request, name: str) -> Served:
        """The model that ``request`` wants, whose body has been read.

        Raises what :meth:`find` and :meth:`Entry.open` raise, and :class:`ClientDisconnect` where
        the client leaves while the model is being loaded.
        """
        entry = self.find(name)
        if entry.served is not None and entry.served.backend.info is not None:
            return await entry.open(name)
        return await unless_disconnected(request, entry.open(name))

    async def open_or_only(self, request: Request, name: str | None) -> Served:
        """Like :meth:`open`; a request that names no model means the only one there is."""
        if name is None and len(self._entries) > 1:
            raise invalid("model", f"model is required; this server has {self._names()}.")
        return await self.open(request, self.first.id if name is None else name)

    def _names(self) -> str:
        return " or ".join(repr(entry.id) for entry in self._entries)
