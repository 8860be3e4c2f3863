"""What this machine has been found to do: which variants agree with the reference, which are fast.

One JSON file per chip and device in the user's cache folder. It holds for one version of MLX and
one text of the kernels; in any other case it is as if it were not there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import mlx.core as mx

from quire.kernels.choice.chips import DeviceName, current_chip
from quire.kernels.choice.manifest import DTYPES, load_manifest
from quire.kernels.choice.shapes import SHAPES, AnyShape

logger = logging.getLogger("quire.kernels")

_FORMAT = 1


@dataclass(frozen=True)
class Key:
    """What a record holds for."""

    chip: str
    device: str
    mlx: str
    kernels: str  # hash of the package's text


@dataclass(frozen=True)
class Verdict:
    """Whether a variant agrees with the reference; ``reason`` says why not, and is "" if it does.

    ``error`` is the largest error seen, relative to the largest value of the result.
    """

    operation: str
    variant: str
    dtype: str
    error: float | None
    reason: str


@dataclass(frozen=True)
class Timing:
    """The fastest variant and settings measured for a bucket, in microseconds per call."""

    operation: str
    shape: AnyShape
    dtype: str
    variant: str
    settings: Mapping[str, int]
    time: float
    default_time: float


@dataclass(frozen=True)
class Record:
    key: Key
    verdicts: tuple[Verdict, ...] = ()
    timings: tuple[Timing, ...] = ()

    def dropped(self) -> set[tuple[str, str, str]]:
        """(operation, variant, dtype) of the variants that disagreed."""
        return {(v.operation, v.variant, v.dtype) for v in self.verdicts if v.reason}

    def timings_by_bucket(self) -> dict[tuple[str, AnyShape, str], Timing]:
        return {(t.operation, t.shape, t.dtype): t for t in self.timings}

    def with_verdicts(self, verdicts: Iterable[Verdict]) -> Record:
        """This record with ``verdicts`` in place of any others on the same variants."""
        known = {(v.operation, v.variant, v.dtype): v for v in self.verdicts}
        known |= {(v.operation, v.variant, v.dtype): v for v in verdicts}
        return replace(self, verdicts=tuple(known.values()))

    def with_timing(self, timing: Timing) -> Record:
        """This record with ``timing`` in place of any other for the same bucket."""
        timings = self.timings_by_bucket()
        timings[timing.operation, timing.shape, timing.dtype] = timing
        return replace(self, timings=tuple(timings.values()))


def current_key(device: DeviceName) -> Key:
    version: str = mx.__version__  # type: ignore[attr-defined]
    return Key(current_chip().name, device, version, _text_hash())


def cache_folder() -> Path:
    """Where Quire keeps what it can find out again."""
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "quire"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "quire"
    return Path.home() / ".cache" / "quire"


def record_path(key: Key) -> Path:
    chip = re.sub(r"[^a-z0-9]+", "-", key.chip.lower()).strip("-")
    return cache_folder() / "kernels" / f"{chip}-{key.device}.json"


def load_record(device: DeviceName) -> Record:
    """This machine's record; an empty one, with a warning, if the file cannot be used."""
    key = current_key(device)
    path = record_path(key)
    try:
        return _decode(path.read_text(encoding="utf-8"), key)
    except FileNotFoundError:
        pass
    except _OtherMachine as error:
        logger.warning("ignoring %s: it is for %s; run `quire tune`", path, error)
    except (OSError, ValueError) as error:
        logger.warning("ignoring %s, which cannot be used: %s", path, error)
    return Record(key)


def save_record(record: Record) -> Path:
    """Replace the file in one step, so that a reader sees the old one or the new one.

    Raises:
        OSError: it cannot be written.
    """
    path = record_path(record.key)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = asdict(replace(record, timings=())) | {
        "format": _FORMAT,
        "timings": [asdict(t) | {"shape": t.shape._asdict()} for t in record.timings],
    }
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path


class _OtherMachine(Exception):
    """The file is in order, but for another chip, MLX or text."""


def _decode(text: str, key: Key) -> Record:
    """Read a record and check every entry against the manifest.

    Raises:
        ValueError: the text is not a record; _OtherMachine: it is not this machine's.
    """
    content = json.loads(text)
    try:
        if content["format"] != _FORMAT:
            raise ValueError(f"its format is {content['format']}, not {_FORMAT}")
        found = Key(**content["key"])
        if found != key:
            raise _OtherMachine(f"{found.chip}, MLX {found.mlx}, kernels {found.kernels}")
        return Record(
            key,
            tuple(_verdict(entry) for entry in content["verdicts"]),
            tuple(_timing(entry) for entry in content["timings"]),
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _verdict(entry: dict[str, Any]) -> Verdict:
    verdict = Verdict(**entry)
    _check_names(verdict.operation, verdict.variant, verdict.dtype)
    if verdict.error is not None:
        _number(verdict.error)
    if not isinstance(verdict.reason, str):
        raise ValueError("a verdict's reason must be text")
    return verdict


def _timing(entry: dict[str, Any]) -> Timing:
    timing = Timing(**entry)
    _check_names(timing.operation, timing.variant, timing.dtype)
    shape = SHAPES[timing.operation](**entry["shape"])
    if not all(isinstance(value, int) for value in shape):
        raise ValueError(f"{timing.operation}: {shape} is not a shape")
    if not load_manifest()[timing.operation].variants[timing.variant].has_settings(timing.settings):
        raise ValueError(f"{timing.operation}.{timing.variant} does not have {timing.settings}")
    _number(timing.time)
    _number(timing.default_time)
    return replace(timing, shape=shape)


def _check_names(operation: str, variant: str, dtype: str) -> None:
    if variant not in load_manifest()[operation].variants or dtype not in DTYPES:
        raise ValueError(f"there is no {operation}.{variant} for {dtype}")


def _number(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not value >= 0:
        raise ValueError(f"{value!r} is not a size")
    return float(value)


@cache
def _text_hash() -> str:
    """Of the manifest, the kernels' source and the Python that launches them."""
    digest = hashlib.blake2b(digest_size=8)
    folder = resources.files("quire.kernels")
    for place in (folder, folder.joinpath("choice"), folder.joinpath("source")):
        for file in sorted(place.iterdir(), key=lambda file: file.name):
            if not file.name.endswith((".py", ".toml", ".h")):
                continue
            content = file.read_bytes()
            launches = b"class GpuKernel" in content or b"gpu_kernel import GpuKernel" in content
            if launches or not file.name.endswith(".py"):
                digest.update(file.name.encode() + b"\0" + content)
    return digest.hexdigest()
