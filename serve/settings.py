"""The settings of ``quire serve``: one table drives flags, environment variables and the file.

Precedence: command-line flags, then ``QUIRE_*`` variables, then a TOML file, then the defaults.
"""

from __future__ import annotations

import argparse
import difflib
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from quire.serve.parsers.names import REASONING_PARSERS, TOOL_PARSERS
from quire.serve.setting_paths import CACHE, FILES, PLACES, path_at, why_no_model
from quire.serve.setting_values import (
    Parser,
    choice,
    fraction,
    host_names,
    http_url,
    integer,
    model_names,
    model_tables,
    origins,
    parse_size,
    seconds,
    switches,
    text,
    yes_or_no,
)

ENV_PREFIX = "QUIRE_"
CONFIG_VARIABLE = "QUIRE_CONFIG"


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


def _row(default: Any, parse: Parser, help: str, metavar: str) -> Any:
    return field(default=default, metadata={"parse": parse, "help": help, "metavar": metavar})


# ---- the table


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """What ``quire serve`` needs to know. Sizes are in bytes, times in seconds."""

    model: str | None = _row(
        None, text, "Hugging Face name (owner/name) or folder; default: the demo model", "MODEL"
    )
    served_model_name: str | None = _row(
        None, text, "the model id that clients use; default: derived from the model", "NAME"
    )
    model_aliases: tuple[str, ...] = _row(
        ("claude-*",),
        model_names,
        "further names of the first model, comma-separated; * stands for anything",
        "NAMES",
    )
    models: tuple[tuple[str, Mapping[str, Any]], ...] = _row(
        (),
        model_tables,
        "more models, loaded when they are asked for; in a file: [models.NAME] tables",
        "NAME=MODEL,...",
    )
    models_from: str | None = _row(
        None,
        text,
        "serve, when asked for, every model in Hugging Face's cache too, or in a folder",
        "cache|FOLDER",
    )
    max_loaded_models: int | None = _row(
        None, integer(1), "models in memory at a time; default: as many as fit", "N"
    )
    model_idle_ttl: float | None = _row(
        None, seconds(1), "when a model that nobody uses is unloaded; default: never", "SECONDS"
    )
    host: str = _row("127.0.0.1", text, "address to listen on", "ADDRESS")
    port: int = _row(8000, integer(0, 65535), "port to listen on; 0 picks a free one", "PORT")
    max_model_len: int | None = _row(
        None, integer(1), "prompt + output tokens of one request; default: the model's", "TOKENS"
    )
    kv_cache_memory: int | None = _row(
        None, parse_size, "memory for the KV cache, e.g. 2GiB; default: from the device", "SIZE"
    )
    memory_fraction: float | None = _row(
        None,
        fraction,
        "share of the device's memory for everything; default: 0.85, and on Macs and CPUs the "
        "KV cache takes half of what the rest leaves",
        "0.05-1",
    )
    tool_parser: str = _row(
        "auto",
        choice(*TOOL_PARSERS),
        "how the model writes tool calls; auto: by its chat template",
        "NAME",
    )
    reasoning_parser: str = _row(
        "auto",
        choice(*REASONING_PARSERS),
        "how the model writes its reasoning; auto: by its chat template",
        "NAME",
    )
    chat_template_kwargs: tuple[tuple[str, str | int | bool], ...] = _row(
        (),
        switches,
        "the chat template's switches unless a request sets them, e.g. enable_thinking=false",
        "NAME=VALUE,...",
    )
    pooling: Literal["last", "mean"] = _row(
        "last",
        choice("last", "mean"),
        "what the vector of a text is: its last token's hidden state, or the mean of all",
        "last|mean",
    )
    block_size: int = _row(16, integer(1, 1024), "tokens in one KV block", "TOKENS")
    max_num_seqs: int = _row(64, integer(1), "requests that run at the same time", "N")
    max_num_batched_tokens: int | None = _row(
        None,
        integer(1),
        "tokens in one step, prompt chunks and decodes together; default: 512, on CUDA 2048",
        "TOKENS",
    )
    max_queue: int = _row(
        256, integer(0), "requests waiting beyond max-num-seqs before clients get 429", "N"
    )
    eviction_policy: Literal["lru", "fifo", "cost"] = _row(
        "lru", choice("lru", "fifo", "cost"), "which cached prefix goes first", "lru|fifo|cost"
    )
    device: Literal["auto", "metal", "cuda", "cpu"] = _row(
        "auto", choice("auto", "metal", "cuda", "cpu"), "where to run", "auto|metal|cuda|cpu"
    )
    log_level: Literal["debug", "info", "warning", "error"] = _row(
        "info",
        choice("debug", "info", "warning", "error"),
        "how much to log",
        "debug|info|warning|error",
    )
    log_format: Literal["text", "json"] = _row(
        "text", choice("text", "json"), "one line of text or one JSON object each", "text|json"
    )
    log_prompts: bool = _row(
        False, yes_or_no, "log what is asked, too; otherwise no content is logged", "yes|no"
    )
    drain_timeout: float = _row(
        30.0, seconds(0), "time that running requests get to finish at shutdown", "SECONDS"
    )
    step_timeout: float | None = _row(
        None,
        seconds(1),
        "when a step is taken to hang and the worker is replaced; default: 120 or more",
        "SECONDS",
    )
    allowed_hosts: tuple[str, ...] = _row(
        (),
        host_names,
        "more Host names to accept, comma-separated: name, *.domain or * for any",
        "NAMES",
    )
    api_key: str | None = _row(
        None, text, "the key that requests need; better given as QUIRE_API_KEY", "KEY"
    )
    api_key_file: str | None = _row(
        None, text, "the keys that requests need, with limits for each: see `quire keys`", "FILE"
    )
    admin_key: str | None = _row(None, text, "the key that may load and unload models", "KEY")
    allowed_origins: tuple[str, ...] = _row(
        (), origins, "web pages that may use the server, comma-separated; * for all", "ORIGINS"
    )
    tls_cert_file: str | None = _row(
        None, text, "certificate with its chain, in PEM: serve HTTPS", "FILE"
    )
    tls_key_file: str | None = _row(None, text, "the certificate's private key, in PEM", "FILE")
    vllm_metrics: bool = _row(
        False, yes_or_no, "show the metrics under vLLM's names, too", "yes|no"
    )
    otlp_traces_endpoint: str | None = _row(
        None,
        http_url,
        "send OpenTelemetry spans by OTLP, e.g. to http://localhost:4318/v1/traces; needs the "
        "extra quire[otel]",
        "URL",
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
        "--config",
        metavar="FILE",
        help=f"TOML file with settings; paths in it start at its folder [{CONFIG_VARIABLE}]",
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
    if isinstance(setting.default, bool):
        return "yes" if setting.default else "no"
    if isinstance(setting.default, tuple):
        return ",".join(setting.default)
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


def absolute(flags: Mapping[str, str], folder: Path) -> dict[str, str]:
    """``flags`` with paths that mean the same wherever a server is started.

    Args:
        folder: at which they start.

    Raises:
        SettingsError: a flag's value cannot be read.
    """
    found = dict(flags)
    for name, given in flags.items():
        if name == "config":
            found[name] = path_at(given, folder)
        elif name in PLACES:
            setting = _BY_NAME[name]
            value = PLACES[name](_parse(setting, given, f"flag {setting.flag}"), folder)
            if name == "models":
                value = ",".join(f"{model}={table['model']}" for model, table in value)
            found[name] = value
    return found


def check_models(settings: ServeSettings) -> None:
    """Raise :class:`SettingsError` for a model that is no folder and cannot be on the Hub."""
    if settings.model is not None and (reason := why_no_model(settings.model)):
        raise SettingsError(reason)
    for name, table in settings.models:
        model = table.get("model")
        if isinstance(model, str) and (reason := why_no_model(model.strip())):
            raise SettingsError(f"models.{name}: {reason}")


def check_files(settings: ServeSettings) -> None:
    """Raise :class:`SettingsError` for a file, or a folder of models, that is not there."""
    for name in FILES:
        file = getattr(settings, name)
        if file is not None and not os.path.isfile(file):
            raise SettingsError(f"{_BY_NAME[name].flag} {file}: no such file")
    folder = settings.models_from
    if folder is not None and folder != CACHE and not os.path.isdir(os.path.expanduser(folder)):
        raise SettingsError(f"--models-from {folder}: no such folder")


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
    for name, given in flags.items():
        if name != "config":
            setting = _BY_NAME[name]
            values[name] = _parse(setting, given, f"flag {setting.flag}")
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
        if key in PLACES:
            values[key] = PLACES[key](values[key], path.parent)
    return values


def _parse(setting: Setting, value: object, source: str) -> Any:
    try:
        return setting.parse(value)
    except ValueError as error:
        raise SettingsError(f"{source} {error}, not {value!r}") from error
