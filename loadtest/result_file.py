"""Results as JSON files with a format version."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

FORMAT_VERSION = 1


class ResultError(ValueError):
    """The file is not a result of this format version."""


class _Header(msgspec.Struct):
    format_version: int


def save(path: Path, result: msgspec.Struct) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.encode(result) + b"\n")


def load(path: Path, kind: Any, what: str) -> Any:
    """Read a result of the type ``kind``, which people call ``what``.

    Raises:
        ResultError: the message names the file and what is wrong.
    """
    data = path.read_bytes()
    try:
        version = msgspec.json.decode(data, type=_Header).format_version
        if version != FORMAT_VERSION:
            raise ResultError(f"{path}: format version {version}, expected {FORMAT_VERSION}")
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ResultError(f"{path}: not a {what}: {error}") from None
