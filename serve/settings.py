"""The settings of ``quire serve``: one table drives flags, environment variables and the file.

Precedence: command-line flags, then ``QUIRE_*`` variables, then a TOML file, then the defaults.
"""

from __future__ import annotations

import argparse
import difflib
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from quire.serve.parsers.names import REASONING_PARSERS, SWITCHES, TOOL_PARSERS

ENV_PREFIX = "QUIRE_"
CONFIG_VARIABLE = "QUIRE_CONFIG"

# Takes the text of a flag or variable, or a value as TOML read it; raises ValueError.
Parser = Callable[[object], Any]


class SettingsError(ValueError):
    """A setting is unknown or has a bad value; the message names where it came from."""


@dataclass(frozen=True)
class Setting:
    """One row of the table: a field of :class:`ServeSettings` and how it is read."""

    name: str
    default: Any
    parse: Parser
    help: str
    metavar: str

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return ENV_PREFIX + self.name.upper()


# ---- parsers


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("must be a non-empty string")
    if "\0" in value:
        raise ValueError("must not contain a NUL character")
    return value.strip()


def _integer(minimum: int, maximum: int | None = None) -> Parser:
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


def _seconds(value: object) -> float:
    if isinstance(value, str) and re.fullmatch(r"\s*[0-9]{1,18}(\.[0-9]+)?\s*", value):
        value = float(value)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ValueError("must be a number of seconds")
    if not 0 <= value <= 86_400:
        raise ValueError("must be from 0 to 86400 seconds")
    return float(value)


def _fraction(value: object) -> float:
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


def _choice(*choices: str) -> Parser:
    def parse(value: object) -> str:
        text = value.strip().lower() if isinstance(value, str) else value
        if text not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        assert isinstance(text, str)
        return text

    return parse


def _names(value: object) -> tuple[str, ...]:
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise ValueError("must be host names, comma-separated (in TOML: a list of strings)")
    names = tuple(item.strip().lower() for item in items if item.strip())
    if not all(re.fullmatch(r"\*|(\*\.)?[\w.-]+|\[[0-9a-f:.]+\]", name) for name in names):
        raise ValueError("must be host names without scheme, port or path, such as llm.example")
    return names


def _model_names(value: object) -> tuple[str, ...]:
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise ValueError("must be names of models, comma-separated (in TOML: a list of strings)")
    return tuple(item.strip() for item in items if item.strip())


def _switches(value: object) -> tuple[tuple[str, str | int | bool], ...]:
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


def _row(default: Any, parse: Parser, help: str, metavar: str) -> Any:
    return field(default=default, metadata={"parse": parse, "help": help, "metavar": metavar})


# ---- the table


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """What ``quire serve`` needs to know. Sizes are in bytes, times in seconds."""

    model: str | None = _row(
        None, _text, "Hugging Face name (owner/name) or folder; default: the demo model", "MODEL"
    )
    served_model_name: str | None = _row(
        None, _text, "the model id that clients use; default: derived from the model", "NAME"
    )
    model_aliases: tuple[str, ...] = _row(
        ("claude-*",),
        _model_names,
        "further names of the model, comma-separated; * stands for anything",
        "NAMES",
    )
    host: str = _row("127.0.0.1", _text, "address to listen on", "ADDRESS")
    port: int = _row(8000, _integer(0, 65535), "port to listen on; 0 picks a free one", "PORT")
    max_model_len: int | None = _row(
        None, _integer(1), "prompt + output tokens of one request; default: the model's", "TOKENS"
    )
    kv_cache_memory: int | None = _row(
        None, parse_size, "memory for the KV cache, e.g. 2GiB; default: from the device", "SIZE"
    )
    memory_fraction: float | None = _row(
        None,
        _fraction,
        "share of the device's memory for everything; default: 0.85, and on Macs and CPUs the "
        "KV cache takes half of what the rest leaves",
        "0.05-1",
    )
    tool_parser: str = _row(
        "auto",
        _choice(*TOOL_PARSERS),
        "how the model writes tool calls; auto: by its chat template",
        "NAME",
    )
    reasoning_parser: str = _row(
        "auto",
        _choice(*REASONING_PARSERS),
        "how the model writes its reasoning; auto: by its chat template",
        "NAME",
    )
    chat_template_kwargs: tuple[tuple[str, str | int | bool], ...] = _row(
        (),
        _switches,
        "the chat template's switches unless a request sets them, e.g. enable_thinking=false",
        "NAME=VALUE,...",
    )
    block_size: int = _row(16, _integer(1, 1024), "tokens in one KV block", "TOKENS")
    max_num_seqs: int = _row(64, _integer(1), "requests that run at the same time", "N")
    max_num_batched_tokens: int | None = _row(
        None,
        _integer(1),
        "tokens in one step, prompt chunks and decodes together; default: 512, on CUDA 2048",
        "TOKENS",
    )
    max_queue: int = _row(
        256, _integer(0), "requests waiting beyond max-num-seqs before clients get 429", "N"
    )
    eviction_policy: Literal["lru", "fifo", "cost"] = _row(
        "lru", _choice("lru", "fifo", "cost"), "which cached prefix goes first", "lru|fifo|cost"
    )
    device: Literal["auto", "metal", "cuda", "cpu"] = _row(
        "auto", _choice("auto", "metal", "cuda", "cpu"), "where to run", "auto|metal|cuda|cpu"
    )
    log_level: Literal["debug", "info", "warning", "error"] = _row(
        "info",
        _choice("debug", "info", "warning", "error"),
        "how much to log",
        "debug|info|warning|error",
    )
    drain_timeout: float = _row(
        30.0, _seconds, "time that running requests get to finish at shutdown", "SECONDS"
    )
    allowed_hosts: tuple[str, ...] = _row(
        (),
        _names,
        "more Host names to accept, comma-separated: name, *.domain or * for any",
        "NAMES",
    )
    max_body_size: int = _row(32 * 2**20, parse_size, "largest request body, e.g. 2MiB", "SIZE")


SETTINGS: tuple[Setting, ...] = tuple(
    Setting(
        name=row.name,
        default=row.default,
        parse=row.metadata["parse"],
        help=row.metadata["help"],
        metavar=row.metadata["metavar"],
    )
    for row in fields(ServeSettings)
)
_BY_NAME = {setting.name: setting for setting in SETTINGS}


# ---- sources


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One flag per setting, and ``--config``. Values stay text until :func:`load` reads them."""
    parser.add_argument(
        "model_name", nargs="?", metavar="MODEL", help="what to serve; the same as --model MODEL"
    )
    parser.add_argument(
        "--config", metavar="FILE", help=f"TOML file with settings [{CONFIG_VARIABLE}]"
    )
    for setting in SETTINGS:
        shown = "" if setting.default in (None, ()) else f" (default: {_show(setting)})"
        parser.add_argument(
            setting.flag,
            dest=setting.name,
            metavar=setting.metavar,
            help=f"{setting.help}{shown} [{setting.variable}]".replace("%", "%%"),
        )


def _show(setting: Setting) -> str:
    if setting.parse is parse_size and setting.default % 2**20 == 0:
        return f"{setting.default // 2**20}MiB"
    return f"{setting.default:g}" if isinstance(setting.default, float) else str(setting.default)


def flags_of(args: argparse.Namespace) -> dict[str, str]:
    """The flags that were given, by setting name, with ``config`` among them.

    Raises :class:`SettingsError` for two models.
    """
    names = ["config", *_BY_NAME]
    flags = {name: value for name in names if (value := getattr(args, name, None)) is not None}
    named = getattr(args, "model_name", None)
    if named is not None and flags.setdefault("model", named) != named:
        raise SettingsError(f"two models are named, {named!r} and --model {flags['model']!r}")
    return flags


def load(flags: Mapping[str, str], environ: Mapping[str, str]) -> ServeSettings:
    """Merge all sources. Raises :class:`SettingsError` with one line that names the source."""
    values: dict[str, Any] = {}
    # An empty variable counts as unset, as it does for most programs.
    config = flags.get("config") or environ.get(CONFIG_VARIABLE)
    if config:
        values.update(_read_file(Path(config).expanduser()))
    for setting in SETTINGS:
        if environ.get(setting.variable):
            source = setting.variable
            values[setting.name] = _parse(setting, environ[setting.variable], source)
    for name, text in flags.items():
        if name != "config":
            setting = _BY_NAME[name]
            values[name] = _parse(setting, text, f"flag {setting.flag}")
    return ServeSettings(**values)


def misspelt_variables(environ: Mapping[str, str]) -> list[str]:
    """One line for each QUIRE_* variable that is no setting but is spelt nearly like one."""
    known = [CONFIG_VARIABLE, *(setting.variable for setting in SETTINGS)]
    lines = []
    for name in sorted(environ):
        if name.startswith(ENV_PREFIX) and name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
            if close:
                lines.append(f"{name} is not a setting; did you mean {close[0]}?")
    return lines


def _read_file(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            document = tomllib.load(file)
    except OSError as error:
        raise SettingsError(f"cannot read the settings file {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not valid TOML: {error}") from error
    values = {}
    for key, value in document.items():
        if key not in _BY_NAME:
            close = difflib.get_close_matches(key, _BY_NAME, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise SettingsError(f"{path}: unknown key {key!r}{hint}")
        values[key] = _parse(_BY_NAME[key], value, f"{path}: {key}")
    return values


def _parse(setting: Setting, value: object, source: str) -> Any:
    try:
        return setting.parse(value)
    except ValueError as error:
        raise SettingsError(f"{source} {error}, not {value!r}") from error
