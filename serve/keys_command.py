"""``quire keys``: makes an API key, shows it once, and adds its hash to a key file."""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import tomllib
from pathlib import Path

from quire.serve.api_keys import Keyring, check_name, hash_key
from quire.serve.settings import SettingsError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="who it is for; stands in the log")
    parser.add_argument("--file", required=True, metavar="FILE", help="made if it does not exist")
    parser.add_argument("--admin", action="store_true", help="may load and unload models")


def run(args: argparse.Namespace) -> int:
    """0; the key is all of standard output."""
    file = Path(args.file).expanduser()
    check_name(args.name)
    key = f"sk-quire-{secrets.token_urlsafe(32)}"
    try:
        before = file.read_text() if file.exists() else ""
        if args.name in tomllib.loads(before):
            raise SettingsError(f"{file} has a key {args.name!r} already; remove it first")
        admin = "admin = true\n" if args.admin else ""
        gap = "\n" if before else ""
        table = f'{gap}["{args.name}"]\nsha256 = "{hash_key(key)}"\n{admin}'
        _write(file, before + table)
    except OSError as error:
        raise SettingsError(f"cannot write {file}: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{file} is not valid TOML: {error}") from error
    print(key)
    print(f"Its hash is in {file}; the key itself is not shown again.", file=sys.stderr)
    return 0


def _write(file: Path, text: str) -> None:
    """All of it or nothing, and only if a server could use it. Raises :class:`SettingsError`."""
    fresh = file.with_name(f".{file.name}.new")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(descriptor, "w") as stream:
            stream.write(text)
        Keyring({}, fresh)
        os.replace(fresh, file)
    finally:
        fresh.unlink(missing_ok=True)
