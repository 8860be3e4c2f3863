"""API keys: who may use the server, how much of it, and whose requests share cached prompts.

A key file is TOML with one table for each key. It holds hashes, so whoever reads it cannot use it:

    [alice]
    sha256 = "5e88…"           # of the key
    admin = false              # may load and unload models
    requests_per_minute = 60   # on average; as many at once
    concurrency = 8            # requests at a time
    queue_share = 0.5          # of what may run and wait for a model
    shared_cache = false       # find prompts that other keys have cached, and be found

Keys are long and random (``quire keys``), so a plain hash does: there is nothing to guess.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from quire.serve.settings import SettingsError
from quire.serve.token_bucket import TokenBucket

logger = logging.getLogger("quire.serve")

_LOOK_EVERY: Final = 1.0  # seconds between two looks at the file's time of change
_NAME: Final = re.compile(r"[A-Za-z0-9._@-]{1,64}")


class ApiKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a key's table may say; ``name`` is the table's."""

    sha256: str
    name: str = ""
    admin: bool = False
    requests_per_minute: float | None = None
    concurrency: int | None = None
    queue_share: float = 1.0
    shared_cache: bool = False

    @property
    def cache_salt(self) -> str:
        """Keeps the cached prompts of this key apart from those of others."""
        return "" if self.shared_cache else self.sha256[:32]


class KeyUse:
    """What one key is using now."""

    def __init__(self, key: ApiKey) -> None:
        self.key = key
        self.running = 0  # requests
        per_minute = key.requests_per_minute
        self.bucket = None if per_minute is None else TokenBucket(per_minute / 60, per_minute)


def hash_key(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


class Keyring:
    """The keys that are valid now: ``fixed`` ones, and those of a file, which may change."""

    def __init__(self, fixed: Mapping[str, ApiKey], file: Path | None = None) -> None:
        """Raises :class:`SettingsError` for a file that cannot be used."""
        self._fixed = fixed
        self._file = file
        self._file_time = 0
        self._looked = time.monotonic()
        self._uses: dict[str, KeyUse] = {}
        self._replace({} if file is None else self._read(file))

    def identify(self, presented: str) -> KeyUse | None:
        """Whose key ``presented`` is. Takes the same time for all keys, right or wrong."""
        self._look_at_file()
        digest = hash_key(presented)
        found = None
        for use in self._uses.values():
            if hmac.compare_digest(digest, use.key.sha256):
                found = use
        return found

    def _replace(self, from_file: Mapping[str, ApiKey]) -> None:
        """What a key is using stays counted, unless the key itself has changed."""
        if twice := sorted(from_file.keys() & self._fixed.keys()):
            raise SettingsError(f"the API key {twice[0]} is given in a file and as a setting")
        keys = {**from_file, **self._fixed}
        before = self._uses
        self._uses = {
            name: before[name] if name in before and before[name].key == key else KeyUse(key)
            for name, key in keys.items()
        }

    def _look_at_file(self) -> None:
        now = time.monotonic()
        if self._file is None or now - self._looked < _LOOK_EVERY:
            return
        self._looked = now
        try:
            if self._file.stat().st_mtime_ns != self._file_time:
                self._replace(self._read(self._file))
                logger.info("the API keys in %s have been read again", self._file)
        except (SettingsError, OSError) as error:
            logger.error("the API keys stay as they were: %s", error)

    def _read(self, file: Path) -> dict[str, ApiKey]:
        try:
            self._file_time = file.stat().st_mtime_ns
            tables = tomllib.loads(file.read_text())
        except OSError as error:
            raise SettingsError(f"cannot read the API keys in {file}: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise SettingsError(f"{file} is not valid TOML: {error}") from error
        return {name: _read_key(file, name, table) for name, table in tables.items()}


def check_name(name: str) -> None:
    """Raises :class:`SettingsError`."""
    if not _NAME.fullmatch(name):
        raise SettingsError(f"{name!r}: a name has up to 64 letters, digits and . _ @ -")


def _read_key(file: Path, name: str, table: Any) -> ApiKey:
    if not isinstance(table, dict):
        raise SettingsError(f"{file}: {name} must be a table of a key, [{name}]")
    try:
        key = msgspec.convert({**table, "name": name}, ApiKey)
    except (msgspec.ValidationError, TypeError) as error:
        raise SettingsError(f"{file}: [{name}]: {error}") from error
    wrong = ""
    if not _NAME.fullmatch(name):
        wrong = "a name has up to 64 letters, digits and . _ @ -"
    elif not re.fullmatch("[0-9a-f]{64}", key.sha256):
        wrong = "sha256 must be 64 hexadecimal digits"
    elif key.requests_per_minute is not None and key.requests_per_minute < 1:
        wrong = "requests_per_minute must be at least 1"
    elif key.concurrency is not None and key.concurrency < 1:
        wrong = "concurrency must be at least 1"
    elif not 0 < key.queue_share <= 1:
        wrong = "queue_share must be above 0 and at most 1"
    if wrong:
        raise SettingsError(f"{file}: [{name}]: {wrong}")
    return key


def make_keyring(api_key: str | None, admin_key: str | None, file: str | None) -> Keyring | None:
    """None where nothing asks for keys. Raises :class:`SettingsError`."""
    for name, key in (("--api-key", api_key), ("--admin-key", admin_key)):
        if key is not None and not key.isascii():
            raise SettingsError(f"{name} must be ASCII: headers carry nothing else")
    fixed = {}
    if api_key is not None:
        fixed["default"] = ApiKey(sha256=hash_key(api_key), name="default")
    if admin_key is not None:
        fixed["admin"] = ApiKey(sha256=hash_key(admin_key), name="admin", admin=True)
    path = None if file is None else Path(file).expanduser()
    return Keyring(fixed, path) if fixed or path is not None else None
