"""The file that remembers what was checked and measured."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from quire.kernels.choice import record as records
from quire.kernels.choice.record import (
    Record,
    Timing,
    Verdict,
    cache_folder,
    current_key,
    load_record,
    record_path,
    save_record,
)
from quire.kernels.paged_decode_spec import DecodeShape
from quire.kernels.prompt_attention_spec import PromptShape

PROMPT = PromptShape(64, 64, 2, 1, 64, 64, 16)
DECODE = DecodeShape(8, 1024, 4, 1, 128, 128, 16)


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def full_record() -> Record:
    settings = {"simdgroups": 2, "unroll_keys": 8, "split": 256}
    return Record(
        current_key("cpu"),
        (
            Verdict("paged_decode", "paged_kernel", "float16", 1e-4, ""),
            Verdict("kv_write", "in_place", "bfloat16", None, "RuntimeError: does not compile"),
        ),
        (
            Timing("prompt_attention", PROMPT, "float32", "sdpa_tiled", {}, 10.5, 12.0),
            Timing("paged_decode", DECODE, "float16", "paged_kernel", settings, 3.0, 4.0),
        ),
    )


def test_what_is_saved_is_read_back() -> None:
    assert load_record("cpu") == Record(current_key("cpu"))
    path = save_record(full_record())
    assert load_record("cpu") == full_record()
    assert load_record("cpu").dropped() == {("kv_write", "in_place", "bfloat16")}
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_newer_timing_replaces_the_older() -> None:
    newer = Timing("prompt_attention", PROMPT, "float32", "gather_sdpa", {}, 9.0, 12.0)
    changed = full_record().with_timing(newer)
    assert len(changed.timings) == 2
    assert changed.timings_by_bucket()["prompt_attention", PROMPT, "float32"] is newer


def edited(path: Path, *keys: str | int, value: object) -> None:
    content = json.loads(path.read_text())
    target = content
    for key in keys[:-1]:
        target = target[key]
    target[keys[-1]] = value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b"\xff\xfe\x00garbage"),
        lambda path: path.write_text(""),
        lambda path: path.write_text(path.read_text()[:-40]),
        lambda path: path.write_text("[]"),
        lambda path: path.write_text("null"),
        lambda path: edited(path, "format", value=1),
        lambda path: edited(path, "key", value="Apple M1"),
        lambda path: edited(path, "timings", value={"0": 1}),
        lambda path: edited(path, "timings", 0, "operation", value="paged_encode"),
        lambda path: edited(path, "timings", 0, "variant", value="in_place"),
        lambda path: edited(path, "timings", 0, "time", value="fast"),
        lambda path: edited(path, "timings", 0, "shape", 0, value="many"),
        lambda path: edited(path, "timings", 0, "shape", value=[1] * 12),
        lambda path: edited(path, "timings", 0, "shape", 0, value=True),
        lambda path: edited(path, "timings", 0, "time", value=-1.0),
        lambda path: edited(path, "timings", 1, "settings", "split", value=99),
        lambda path: edited(path, "timings", 1, "settings", value=None),
        lambda path: edited(path, "verdicts", 0, "dtype", value="int8"),
        lambda path: edited(path, "verdicts", 0, "error", value=[]),
        lambda path: edited(path, "verdicts", 0, "reason", value=7),
    ],
)
def test_a_spoiled_file_is_ignored_with_a_warning(spoil, caplog: pytest.LogCaptureFixture) -> None:
    path = save_record(full_record())
    spoil(path)
    with caplog.at_level(logging.WARNING):
        assert load_record("cpu") == Record(current_key("cpu"))
    (message,) = caplog.messages
    assert str(path) in message
    save_record(full_record())
    assert load_record("cpu") == full_record()


@pytest.mark.parametrize("field", ["chip", "mlx", "kernels", "device", "system"])
def test_another_machines_file_is_ignored_with_a_warning(
    field: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = save_record(full_record())
    edited(path, "key", field, value="another")
    with caplog.at_level(logging.WARNING):
        assert load_record("cpu") == Record(current_key("cpu"))
    (message,) = caplog.messages
    assert "another" in message or field in ("device", "system")
    assert "quire tune" in message


def test_a_macs_record_is_for_one_build_of_its_system(monkeypatch: pytest.MonkeyPatch) -> None:
    save_record(full_record())
    monkeypatch.setattr(records.platform, "mac_ver", lambda: ("15.5", ("", "", ""), "arm64"))
    monkeypatch.setattr(records.platform, "version", lambda: "Darwin Kernel Version 24.5.0")
    assert current_key("cpu").system == "macOS 15.5, Darwin Kernel Version 24.5.0"
    assert not load_record("cpu").verdicts
    save_record(msgspec.structs.replace(full_record(), key=current_key("cpu")))
    assert load_record("cpu").verdicts
    monkeypatch.setattr(records.platform, "version", lambda: "Darwin Kernel Version 24.6.0")
    assert not load_record("cpu").verdicts


def test_each_chip_and_device_has_its_own_file() -> None:
    key = current_key("cpu")
    paths = {
        record_path(replace(key, chip=chip, device=device))
        for chip in ("Apple M4", "Apple M4 Max")
        for device in ("cpu", "metal")
    }
    assert len(paths) == 4
    assert (
        record_path(replace(key, chip="Intel(R) Xeon(R) / x")).name == "intel-r-xeon-r-x-cpu.json"
    )


def test_a_failed_write_leaves_the_old_file(monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_record(full_record())

    def fail(source: str, target: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        save_record(Record(current_key("cpu")))
    assert load_record("cpu") == full_record()
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "quire"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache_folder() == Path("/home/ann/.cache/quire")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_folder() == Path("/home/ann/Library/Caches/quire")
