"""What is set for each of several models: by ``--models``, or in the settings file.

[models.small]
model = "mlx-community/Qwen3-0.6B-4bit"   # or a folder, seen from that of the file
aliases = ["gpt-4o-mini"]
pinned = true            # loaded at the start, never unloaded to make room or for idleness
idle_ttl = 600           # seconds; otherwise --model-idle-ttl
temperature = 0.2        # for requests that do not say; also top_k, top_p, min_p
kv_cache_memory = "1GiB" # and other settings of a model

[models.small.presets.creative]   # served as "small:creative"
temperature = 1.1
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import msgspec

from quire.engine.messages import SamplingParams
from quire.serve.local_models import models_in
from quire.serve.served_model import ModelFilesError
from quire.serve.setting_paths import DEMO_NAME
from quire.serve.setting_values import seconds, yes_or_no
from quire.serve.settings import SETTINGS, ServeSettings, SettingsError

# Settings that each model may have of its own.
_OWN_SETTINGS: Final = (
    *("model", "max_model_len", "kv_cache_memory", "block_size", "max_num_seqs", "max_queue"),
    *("max_num_batched_tokens", "eviction_policy", "device", "step_timeout"),
    *("tool_parser", "reasoning_parser", "chat_template_kwargs", "pooling"),
)
_SAMPLING: Final = ("temperature", "top_k", "top_p", "min_p")
_NAME: Final = re.compile(r"[\w./-]{1,200}")


class Sampling(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What requests that leave a field out get; None is left to the model's own files."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def over(self, default: SamplingParams) -> SamplingParams:
        fields = msgspec.structs.asdict(self).items()
        given = {name: value for name, value in fields if value is not None}
        return msgspec.structs.replace(default, **given)


_NO_SAMPLING: Final = Sampling()


@dataclass(frozen=True)
class ModelOptions:
    """One model; times in seconds."""

    name: str  # what clients call it
    settings: ServeSettings  # with the model's own
    aliases: tuple[str, ...] = ()
    pinned: bool = False
    at_start: bool = False  # loaded before anybody asks
    idle_ttl: float | None = None
    sampling: Sampling = _NO_SAMPLING
    presets: Mapping[str, Sampling] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """All that clients may call it."""
        own = (self.name, *self.aliases)
        return (*own, *(f"{name}:{preset}" for name in own for preset in self.presets))


def all_options(settings: ServeSettings) -> list[ModelOptions]:
    """The models to serve; the first one is loaded at the start.

    Raises :class:`SettingsError`.
    """
    tables = dict(settings.models)
    options = [_read(name, table, settings) for name, table in tables.items()]
    if settings.model is not None or not options:
        name = settings.served_model_name or _name_of(settings.model)
        ttl = settings.model_idle_ttl
        # A server of one model keeps it, unless it is told when to let go of it.
        is_only = not options and settings.models_from is None
        only = ModelOptions(name, settings, pinned=is_only and ttl is None, idle_ttl=ttl)
        options.insert(0, only)
    options[0] = replace(options[0], at_start=True)
    if settings.models_from is not None:
        options += _found(settings, {name for model in options for name in model.names})
    seen: set[str] = set()
    for model in options:
        for name in model.names:
            if name in seen:
                raise SettingsError(f"two models are called {name!r}")
            seen.add(name)
    return options


def _found(settings: ServeSettings, taken: set[str]) -> Iterator[ModelOptions]:
    """The models of ``models_from`` but for those that are set by name."""
    assert settings.models_from is not None
    try:
        for name, folder in models_in(settings.models_from):
            if name not in taken:
                own = replace(settings, model=str(folder), served_model_name=name)
                yield ModelOptions(name, own, idle_ttl=settings.model_idle_ttl)
    except ModelFilesError as error:
        raise SettingsError(f"--models-from {error}") from error


def _name_of(model: str | None) -> str:
    if model is None:
        return DEMO_NAME
    folder = Path(model).expanduser()
    return folder.resolve().name if folder.is_dir() else model


def _read(name: str, table: Mapping[str, Any], settings: ServeSettings) -> ModelOptions:
    source = f"models.{name}"
    if not _NAME.fullmatch(name):
        raise SettingsError(f"{source}: a name has letters, digits and _ . / -")
    rest = dict(table)
    if "model" not in rest:
        close = difflib.get_close_matches("model", rest, n=1)
        hint = f"; did you mean that by {close[0]}?" if close else ""
        raise SettingsError(f"{source}: model is missing: a folder or a Hugging Face name{hint}")
    own = {
        setting.name: _parse(source, setting.name, setting.parse, rest.pop(setting.name))
        for setting in SETTINGS
        if setting.name in _OWN_SETTINGS and setting.name in rest
    }
    pinned = _parse(source, "pinned", yes_or_no, rest.pop("pinned", False))
    ttl = rest.pop("idle_ttl", None)
    aliases = rest.pop("aliases", [])
    if not isinstance(aliases, list) or not all(
        isinstance(alias, str) and _NAME.fullmatch(alias) for alias in aliases
    ):
        raise SettingsError(f"{source}: aliases must be a list of names")
    presets = rest.pop("presets", {})
    if not isinstance(presets, dict):
        raise SettingsError(f"{source}: presets must be tables")
    sampling = {key: rest.pop(key) for key in _SAMPLING if key in rest}
    if rest:
        raise SettingsError(f"{source}: unknown key {next(iter(rest))!r}")
    return ModelOptions(
        name,
        replace(settings, served_model_name=name, **own),
        tuple(aliases),
        pinned,
        at_start=pinned,
        idle_ttl=settings.model_idle_ttl
        if ttl is None
        else _parse(source, "idle_ttl", seconds(1), ttl),
        sampling=_sampling(source, sampling),
        presets={key: _sampling(f"{source}.presets.{key}", each) for key, each in presets.items()},
    )


def _parse(source: str, name: str, parse: Any, value: object) -> Any:
    try:
        return parse(value)
    except ValueError as error:
        raise SettingsError(f"{source}: {name} {error}, not {value!r}") from error


def _sampling(source: str, table: object) -> Sampling:
    try:
        sampling = msgspec.convert(table, Sampling)
    except msgspec.ValidationError as error:
        raise SettingsError(f"{source}: {error}") from error
    temperature, top_k = sampling.temperature or 0.0, sampling.top_k or 0
    top_p, min_p = sampling.top_p, sampling.min_p or 0.0
    in_range = 0 <= temperature <= 2 and top_k >= 0 and 0 <= min_p <= 1
    if not in_range or not (top_p is None or 0 < top_p <= 1):
        raise SettingsError(f"{source}: temperature, top_k, top_p or min_p is out of range")
    return sampling
