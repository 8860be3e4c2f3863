"""How a setting's value is read: from the text of a flag or variable, or as TOML gave it.

Each parser raises ValueError with what the value must be, without naming the setting.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from quire.serve.parsers.names import SWITCHES

Parser = Callable[[object], Any]


def text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("must be a non-empty string")
    if "\0" in value:
        raise ValueError("must not contain a NUL character")
    return value.strip()


def http_url(value: object) -> str:
    url = text(value)
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must look like http://host:port/path")
    return url


def integer(minimum: int, maximum: int | None = None) -> Parser:
    def parse(value: object) -> int:
        if isinstance(value, str) and re.fullmatch(r"\s*[+-]?[0-9]{1,18}\s*", value):
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError("must be a whole number")
        if value < minimum or (maximum is not None and value > maximum):
            limits = f"at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
            raise ValueError(f"must be {limits}")
        return value

    return parse


def seconds(minimum: int) -> Parser:
    def parse(value: object) -> float:
        if isinstance(value, str) and re.fullmatch(r"\s*[0-9]{1,18}(\.[0-9]+)?\s*", value):
            value = float(value)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ValueError("must be a number of seconds")
        if not minimum <= value <= 86_400:
            raise ValueError(f"must be from {minimum} to 86400 seconds")
        return float(value)

    return parse


def fraction(value: object) -> float:
    if isinstance(value, str) and re.fullmatch(r"\s*[0-9]{0,3}\.?[0-9]{1,9}\s*", value):
        value = float(value)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ValueError("must be a number")
    if not 0.05 <= value <= 1:
        raise ValueError("must be from 0.05 to 1")
    return float(value)


_UNITS = {
    "": 1,
    "b": 1,
    **{f"{prefix}b": 10 ** (3 * power) for power, prefix in enumerate("kmgt", start=1)},
    **{f"{prefix}ib": 2 ** (10 * power) for power, prefix in enumerate("kmgt", start=1)},
}


def parse_size(value: object) -> int:
    """Bytes from ``"2GiB"``, ``"1.5 GB"`` (decimal units) or a plain number of bytes.

    Raises ValueError for anything else, and for sizes below one byte.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    else:
        match = re.fullmatch(r"\s*([0-9]{1,18}(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", str(value))
        if not isinstance(value, str) or not match or match[2].lower() not in _UNITS:
            raise ValueError("must be a size such as 512MiB, 2GiB or 2GB")
        size = int(float(match[1]) * _UNITS[match[2].lower()])
    if not 1 <= size < 2**63:
        raise ValueError("must be a size of at least one byte")
    return size


def choice(*choices: str) -> Parser:
    def parse(value: object) -> str:
        text = value.strip().lower() if isinstance(value, str) else value
        if text not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        assert isinstance(text, str)
        return text

    return parse


def yes_or_no(value: object) -> bool:
    text = value.strip().lower() if isinstance(value, str) else value
    known = {"yes": True, "true": True, "no": False, "false": False}
    if isinstance(text, bool):
        return text
    if not isinstance(text, str) or text not in known:
        raise ValueError("must be yes or no")
    return known[text]


def host_names(value: object) -> tuple[str, ...]:
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise ValueError("must be host names, comma-separated (in TOML: a list of strings)")
    names = tuple(item.strip().lower() for item in items if item.strip())
    if not all(re.fullmatch(r"\*|(\*\.)?[\w.-]+|\[[0-9a-f:.]+\]", name) for name in names):
        raise ValueError("must be host names without scheme, port or path, such as llm.example")
    return names


def model_names(value: object) -> tuple[str, ...]:
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise ValueError("must be names of models, comma-separated (in TOML: a list of strings)")
    return tuple(item.strip() for item in items if item.strip())


def origins(value: object) -> tuple[str, ...]:
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise ValueError("must be origins, comma-separated (in TOML: a list of strings)")
    origins = tuple(item.strip().lower() for item in items if item.strip())
    if not all(re.fullmatch(r"\*|[a-z][a-z0-9+.-]*://[\w.\[\]:-]+", origin) for origin in origins):
        raise ValueError("must be origins such as https://chat.example or http://localhost:3000")
    return origins


def switches(value: object) -> tuple[tuple[str, str | int | bool], ...]:
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise ValueError("must be name=value pairs, comma-separated (in TOML: a list of strings)")
    switches: list[tuple[str, str | int | bool]] = []
    for item in filter(None, (item.strip() for item in items)):
        name, equals, text = (part.strip() for part in item.partition("="))
        if not equals or name not in SWITCHES:
            raise ValueError(f"must be name=value pairs with names out of {', '.join(SWITCHES)}")
        known: dict[str, bool] = {"true": True, "false": False}
        number = int(text) if re.fullmatch("[0-9]{1,9}", text) else text
        switches.append((name, known.get(text.lower(), number)))
    return tuple(switches)


def model_tables(value: object) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    """Names of models and what is set for each; see :mod:`quire.serve.model_options`."""
    if isinstance(value, str):
        pairs = [item.partition("=") for item in value.split(",") if item.strip()]
        if not all(equals and name.strip() and model.strip() for name, equals, model in pairs):
            raise ValueError("must be name=model pairs, comma-separated (in TOML: tables)")
        return tuple((name.strip(), {"model": model.strip()}) for name, _, model in pairs)
    if not isinstance(value, dict) or not all(isinstance(each, dict) for each in value.values()):
        raise ValueError("must be one table for each model, such as [models.small]")
    return tuple(value.items())
