"""`manifest.toml` as checked, immutable objects: which variants exist and what each supports."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Any

from quire.kernels.choice.shapes import HEADS_IN_ROWS, ROUNDED, SHAPES, AnyShape

DEVICES = ("metal", "cuda", "cpu")
DTYPES = ("float32", "float16", "bfloat16")
KINDS = ("kernel", "mlx")

_NO_SETTINGS: Mapping[str, int] = MappingProxyType({})


class ManifestError(ValueError):
    """The manifest is wrong; the message names the entry."""


@dataclass(frozen=True)
class Limit:
    """What one field of a shape may be."""

    values: tuple[int, ...] | None = None
    min: int | None = None
    max: int | None = None
    multiple_of: int | None = None

    def allows(self, value: int) -> bool:
        return (
            (self.values is None or value in self.values)
            and (self.min is None or value >= self.min)
            and (self.max is None or value <= self.max)
            and (self.multiple_of is None or value % self.multiple_of == 0)
        )


@dataclass(frozen=True)
class Setting:
    """A number a variant can be tuned by."""

    values: tuple[int, ...]
    default: int | None  # None: whoever launches the variant decides by the shape


@dataclass(frozen=True)
class Variant:
    """One way to compute an operation."""

    name: str
    kind: str  # "kernel": Quire's own for GPUs; "mlx": made of MLX's operations
    devices: tuple[str, ...]
    dtypes: tuple[str, ...]
    limits: Mapping[str, Limit]
    settings: Mapping[str, Setting]

    def supports(self, bucket: AnyShape, dtype: str, device: str) -> bool:
        return (
            device in self.devices
            and dtype in self.dtypes
            and all(limit.allows(getattr(bucket, name)) for name, limit in self.limits.items())
        )

    @property
    def default_settings(self) -> Mapping[str, int]:
        return MappingProxyType(
            {name: s.default for name, s in self.settings.items() if s.default is not None}
        )

    def has_settings(self, settings: Mapping[str, object]) -> bool:
        """Whether ``settings`` are allowed; those without a default may be missing."""
        return self.default_settings.keys() <= settings.keys() <= self.settings.keys() and all(
            value in self.settings[name].values for name, value in settings.items()
        )


@dataclass(frozen=True)
class Default:
    """The variant and settings for some buckets, where nothing has been measured."""

    devices: tuple[str, ...]
    variant: str
    when: Mapping[str, Limit]
    settings: Mapping[str, int]

    def matches(self, bucket: AnyShape, device: str) -> bool:
        return device in self.devices and all(
            limit.allows(getattr(bucket, name)) for name, limit in self.when.items()
        )


@dataclass(frozen=True)
class Operation:
    name: str
    reference: str  # the variant that runs everywhere and is never dropped
    once: bool  # chosen when a model is loaded, not for each call
    variants: Mapping[str, Variant]
    defaults: tuple[Default, ...]


Manifest = Mapping[str, Operation]


@cache
def load_manifest() -> Manifest:
    """The manifest that ships with the package."""
    return parse_manifest(
        resources.files("quire.kernels.choice")
        .joinpath("manifest.toml")
        .read_text(encoding="utf-8")
    )


def parse_manifest(text: str) -> Manifest:
    """Read and check a manifest.

    Raises:
        ManifestError: it is not TOML, or an entry is wrong.
    """
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ManifestError(f"the manifest is not TOML: {error}") from error
    return MappingProxyType({name: _operation(name, table) for name, table in tables.items()})


def _operation(name: str, table: Any) -> Operation:
    if name not in SHAPES:
        raise ManifestError(f"{name}: no such operation; there are {', '.join(SHAPES)}")
    fields = _fields(name, table, {"reference", "variants"}, {"defaults", "once"})
    variants: dict[str, Variant] = {}
    for index, entry in enumerate(_list(f"{name}.variants", fields["variants"])):
        variant = _variant(name, index, entry)
        if variant.name in variants:
            raise ManifestError(f"{name}.{variant.name}: named twice")
        variants[variant.name] = variant
    reference = fields["reference"]
    if reference not in variants:
        raise ManifestError(f"{name}.reference: no variant is named {reference!r}")
    oracle = variants[reference]
    if set(oracle.devices) != set(DEVICES) or set(oracle.dtypes) != set(DTYPES):
        raise ManifestError(f"{name}.{reference}: the reference must run everywhere")
    once = fields.get("once", False)
    if not isinstance(once, bool):
        raise ManifestError(f"{name}.once: must be true or false")
    defaults = tuple(
        _default(f"{name}.defaults[{index}]", name, variants, entry)
        for index, entry in enumerate(_list(f"{name}.defaults", fields.get("defaults", [])))
    )
    return Operation(name, reference, once, MappingProxyType(variants), defaults)


def _variant(operation: str, index: int, table: Any) -> Variant:
    where = f"{operation}.variants[{index}]"
    required = {"name", "kind", "devices"}
    fields = _fields(where, table, required, {"dtypes", "limits", "settings"})
    name = fields["name"]
    if not isinstance(name, str) or not name.isidentifier():
        raise ManifestError(f"{where}.name: must be an identifier, not {name!r}")
    where = f"{operation}.{name}"
    if fields["kind"] not in KINDS:
        raise ManifestError(f"{where}.kind: must be one of {', '.join(KINDS)}")
    devices = _names(f"{where}.devices", fields["devices"], DEVICES)
    if fields["kind"] == "kernel" and "cpu" in devices:
        raise ManifestError(f"{where}.devices: kernels run on GPUs only")
    settings = {
        key: _setting(f"{where}.settings.{key}", value)
        for key, value in _table(f"{where}.settings", fields.get("settings", {})).items()
    }
    return Variant(
        name=name,
        kind=fields["kind"],
        devices=devices,
        dtypes=_names(f"{where}.dtypes", fields.get("dtypes", list(DTYPES)), DTYPES),
        limits=_limits(f"{where}.limits", operation, fields.get("limits", {}), on_support=True),
        settings=MappingProxyType(settings),
    )


def _default(where: str, operation: str, variants: Mapping[str, Variant], table: Any) -> Default:
    fields = _fields(where, table, {"devices", "variant"}, {"when", "settings"})
    variant = variants.get(fields["variant"])
    if variant is None:
        raise ManifestError(f"{where}.variant: no variant is named {fields['variant']!r}")
    devices = _names(f"{where}.devices", fields["devices"], DEVICES)
    if missing := set(devices) - set(variant.devices):
        raise ManifestError(f"{where}.devices: {variant.name} does not run on {missing.pop()}")
    settings = dict(variant.default_settings)
    settings |= _table(f"{where}.settings", fields.get("settings", {}))
    if not variant.has_settings(settings):
        raise ManifestError(f"{where}.settings: {variant.name} does not have {settings}")
    return Default(
        devices=devices,
        variant=variant.name,
        when=_limits(f"{where}.when", operation, fields.get("when", {}), on_support=False),
        settings=MappingProxyType(settings) if settings else _NO_SETTINGS,
    )


def _limits(where: str, operation: str, table: Any, *, on_support: bool) -> Mapping[str, Limit]:
    limits = {}
    known = {*SHAPES[operation]._fields, "group"}
    for name, value in _table(where, table).items():
        if name not in known or not hasattr(SHAPES[operation], name):
            raise ManifestError(f"{where}.{name}: a shape of {operation} has no such field")
        limit = limits[name] = _limit(f"{where}.{name}", value)
        if name not in ROUNDED:
            continue
        if on_support and name == "rows" and operation in HEADS_IN_ROWS:
            raise ManifestError(f"{where}.rows: buckets of {operation} count heads as rows")
        if on_support and (limit.values or limit.min or limit.multiple_of):
            raise ManifestError(f"{where}.{name}: is rounded up, so only max can be told")
        if limit.max is not None and limit.max & (limit.max - 1):
            raise ManifestError(f"{where}.{name}.max: must be a power of two")
    return MappingProxyType(limits)


def _limit(where: str, value: Any) -> Limit:
    if isinstance(value, bool):
        return Limit(values=(value,))
    if isinstance(value, list):
        return Limit(values=_integers(where, value))
    fields = _fields(where, value, set(), {"min", "max", "multiple_of"})
    if not fields:
        raise ManifestError(f"{where}: limits nothing")
    _integers(where, list(fields.values()))
    return Limit(**fields)


def _setting(where: str, value: Any) -> Setting:
    fields = _fields(where, value, {"values"}, {"default"})
    values = _integers(f"{where}.values", _list(f"{where}.values", fields["values"]))
    default = fields.get("default")
    if default is not None and default not in values:
        raise ManifestError(f"{where}.default: must be one of {list(values)}")
    return Setting(values, default)


def _fields(where: str, value: Any, required: set[str], optional: set[str]) -> dict[str, Any]:
    table = _table(where, value)
    if missing := required - table.keys():
        raise ManifestError(f"{where}: lacks {', '.join(sorted(missing))}")
    if unknown := table.keys() - required - optional:
        raise ManifestError(f"{where}: has no {', '.join(sorted(unknown))}")
    return table


def _table(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ManifestError(f"{where}: must be a table")
    return value


def _list(where: str, value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ManifestError(f"{where}: must be a list with something in it")
    return value


def _names(where: str, value: Any, known: Iterable[str]) -> tuple[str, ...]:
    for name in _list(where, value):
        if name not in known:
            raise ManifestError(f"{where}: {name!r} is none of {', '.join(known)}")
    return tuple(value)


def _integers(where: str, values: list[Any]) -> tuple[int, ...]:
    for value in _list(where, values):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ManifestError(f"{where}: {value!r} is not a positive whole number")
    return tuple(values)
