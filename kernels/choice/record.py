"""What this machine has been found to do: which variants agree with float64, which are fast.

One JSON file per chip and device in the user's cache folder. It holds for one version of MLX and
one text of the kernels; in any other case it is as if it were not there.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import re
import tempfile
from collections.abc import Collection, Iterable
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated

import mlx.core as mx
import msgspec

from quire.kernels.cache_folder import cache_folder
from quire.kernels.choice.chips import DeviceName, current_chip
from quire.kernels.choice.spec import DTYPES, AnySpec
from quire.kernels.specs import find_spec

logger = logging.getLogger("quire.kernels")

_FORMAT = 2

Size = Annotated[float, msgspec.Meta(ge=0)]


class Key(msgspec.Struct, frozen=True):
    """What a record holds for."""

    chip: str
    device: str
    mlx: str
    kernels: str  # hash of the package's text
    system: str = ""  # of a Mac, whose compiler of kernels is a part of it


class Verdict(msgspec.Struct, frozen=True):
    """Whether a variant agrees with float64; ``reason`` says why not, and is "" if it does.

    ``error`` is the largest error seen, relative to the largest value of the result.
    """

    operation: str
    variant: str
    dtype: str
    error: Size | None
    reason: str
    # What names the shapes of a model that it was checked for; "": those of the specification.
    shapes: str = ""


class Timing(msgspec.Struct, frozen=True):
    """The fastest variant and settings measured for a bucket, in microseconds per call."""

    operation: str
    shape: tuple[int | bool, ...]  # in the order of the operation's shape
    dtype: str
    variant: str
    settings: dict[str, int]
    time: Size
    default_time: Size


class Record(msgspec.Struct, frozen=True):
    key: Key
    verdicts: tuple[Verdict, ...] = ()
    timings: tuple[Timing, ...] = ()
    format: int = _FORMAT

    def dropped(self) -> set[tuple[str, str, str]]:
        """(operation, variant, dtype) of the variants that disagreed."""
        return {(v.operation, v.variant, v.dtype) for v in self.verdicts if v.reason}

    def for_shapes(self, names: Collection[str]) -> Record:
        """Without the verdicts on other models' shapes."""
        own = tuple(v for v in self.verdicts if not v.shapes or v.shapes in names)
        return msgspec.structs.replace(self, verdicts=own)

    def timings_by_bucket(self) -> dict[tuple[str, tuple[int | bool, ...], str], Timing]:
        return {(t.operation, tuple(t.shape), t.dtype): t for t in self.timings}

    def with_verdicts(self, verdicts: Iterable[Verdict]) -> Record:
        """This record with ``verdicts`` in place of any others on the same variants."""
        both = *self.verdicts, *verdicts
        known = {(v.operation, v.variant, v.dtype, v.shapes): v for v in both}
        return msgspec.structs.replace(self, verdicts=tuple(known.values()))

    def with_timing(self, timing: Timing) -> Record:
        """This record with ``timing`` in place of any other for the same bucket."""
        timings = self.timings_by_bucket()
        timings[timing.operation, tuple(timing.shape), timing.dtype] = timing
        return msgspec.structs.replace(self, timings=tuple(timings.values()))


def current_key(device: DeviceName) -> Key:
    version: str = mx.__version__  # type: ignore[attr-defined]
    release, _, _ = platform.mac_ver()
    system = f"macOS {release}, {platform.version()}" if release else ""
    return Key(current_chip().name, device, version, _text_hash(), system)


def record_path(key: Key) -> Path:
    chip = re.sub(r"[^a-z0-9]+", "-", key.chip.lower()).strip("-")
    return cache_folder() / "kernels" / f"{chip}-{key.device}.json"


def load_record(device: DeviceName) -> Record:
    """This machine's record; an empty one, with a warning, if the file cannot be used."""
    key = current_key(device)
    path = record_path(key)
    try:
        record = _decode(path.read_bytes())
    except FileNotFoundError:
        return Record(key)
    except (OSError, ValueError, msgspec.MsgspecError) as error:
        logger.warning("ignoring %s, which cannot be used: %s", path, error)
        return Record(key)
    if record.key != key:
        found = f"{record.key.chip}, MLX {record.key.mlx}, kernels {record.key.kernels}"
        logger.warning("ignoring %s: it is for %s; run `quire tune`", path, found)
        return Record(key)
    return record


def save_record(record: Record) -> Path:
    """Replace the file in one step, so that a reader sees the old one or the new one.

    Raises:
        OSError: it cannot be written.
    """
    path = record_path(record.key)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(record), indent=1))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path


def _decode(data: bytes) -> Record:
    """Read a record, whose entries must be of operations, variants and settings that exist.

    Raises:
        ValueError, msgspec.MsgspecError: the text is not a record.
    """
    record = msgspec.json.decode(data, type=Record)
    if record.format != _FORMAT:
        raise ValueError(f"its format is {record.format}, not {_FORMAT}")
    for verdict in record.verdicts:
        _check_names(verdict)
    for timing in record.timings:
        spec = _check_names(timing)
        msgspec.convert(list(timing.shape), spec.shape)
        if not spec.variants[spec.variant(timing.variant)].has_settings(timing.settings):
            name = f"{timing.operation}.{timing.variant}"
            raise ValueError(f"{name} does not have {timing.settings}")
    return record


def _check_names(entry: Verdict | Timing) -> AnySpec:
    if entry.dtype not in DTYPES:
        raise ValueError(f"there is no type {entry.dtype}")
    spec = find_spec(entry.operation)
    spec.variant(entry.variant)
    return spec


@cache
def _text_hash() -> str:
    """Of the kernels' source, the Python that launches them and their specifications."""
    digest = hashlib.blake2b(digest_size=8)
    folder = resources.files("quire.kernels")
    for place, suffix in ((folder, ".py"), (folder.joinpath("source"), ".h")):
        for file in sorted(place.iterdir(), key=lambda file: file.name):
            if file.name.endswith(suffix):
                digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
