"""``quire doctor`` through the real command, and what it says when a variant is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from metal_sim import simulated_kernels

import quire.engine
from quire.deploy import launchd
from quire.engine.memory import report
from quire.engine.memory.pressure import Pressure
from quire.kernels.choice import check, selection
from quire.kernels.choice.record import Record, Timing, Verdict, current_key, save_record
from quire.kernels.choice.selection import Selector, selecting
from quire.kernels.paged_decode_spec import PAGED_DECODE, DecodeVariant
from quire.kernels.prompt_attention_spec import PROMPT_ATTENTION, PromptShape, PromptVariant
from quire.kernels.specs import SPECS
from quire.loadtest import doctor
from quire.loadtest.doctor_model import ranges
from quire.loadtest.machine_lines import machine_lines


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(selection, "_selectors", {})
    monkeypatch.setattr(doctor, "start_device", lambda wanted: (wanted, None))
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


def quire_doctor(*argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "quire.serve.cli", "doctor", "--device", "cpu", *argv]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ)


def test_the_machine() -> None:
    result = quire_doctor()
    assert result.returncode == 0, result.stderr
    fields = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert fields["device"] == "cpu"
    assert fields["mlx"].startswith("0.")
    assert "mlx-lm" in fields["mlx"]
    assert fields["memory"].endswith(" GiB usable")
    assert fields["tuning"].startswith("nothing measured yet (`quire tune`)")
    if sys.platform == "linux":
        assert "OpenBLAS" in fields["blas"]


def test_a_macs_owner_is_told_what_stops_a_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchd.sys, "platform", "darwin")
    monkeypatch.setattr(report, "system_pressure", lambda: Pressure.CRITICAL)
    monkeypatch.setenv("SSH_CONNECTION", "1.2.3.4 22")
    lines = dict(machine_lines("cpu", None))
    assert "logged in at the screen" in lines["session"]
    assert "pmset" in lines["sleep"]
    assert "Documents" in lines["folders"]
    assert lines["pressure"].startswith("critical: ")
    monkeypatch.delenv("SSH_CONNECTION")
    assert "session" not in dict(machine_lines("cpu", None))


def test_the_kernels() -> None:
    result = quire_doctor("--kernels")
    assert result.returncode == 0, result.stdout + result.stderr
    for operation in (spec.name for spec in SPECS):
        assert operation in result.stdout
        # A check that takes minutes shows where it is, whoever reads it.
        assert f"checking what is in use: {operation}, " in result.stderr
    assert "All variants" not in result.stdout
    for word in ("default for this device", "only one that supports this shape", "e-0", "ok"):
        assert word in result.stdout
    assert "mixed_attention softcap: nothing supports it" in result.stdout


def test_all_variants_are_checked_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.run(Namespace(device="cpu", kernels="all", dtype=None, model=None)) == 0
    printed = capsys.readouterr()
    _, every = printed.out.split("All variants")
    for spec in SPECS:
        assert f"checking all variants: {spec.name}, " in printed.err
        for name, variant in spec.variants.items():
            assert "cpu" not in variant.devices or f" {name.value} " in every
    assert "softcap no" in every


def test_the_state_of_the_tuning(capsys: pytest.CaptureFixture[str]) -> None:
    shape = PromptShape(64, 64, 2, 1, 64, 64, 16)
    save_record(
        Record(
            current_key("cpu"),
            (Verdict("kv_write", "in_place", "float16", None, "RuntimeError: no"),),
            (Timing("prompt_attention", shape, "float32", "gather_sdpa", {}, 1.0, 2.0),),
        )
    )
    assert doctor.run(Namespace(device="cpu", kernels=None, model=None, dtype=None)) == 0
    output = capsys.readouterr().out
    assert "1 shapes measured, 1 kernels checked, not used: kv_write.in_place float16" in output


Run = Callable[[Any, Any], Sequence[mx.array]]


def replace_tiles(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    """Compute prompts by ``run``, which the CPU has tiles for."""
    tiled = replace(PROMPT_ATTENTION.variants[PromptVariant.SDPA_TILED], run=run)
    spec = replace(
        PROMPT_ATTENTION,
        variants={**PROMPT_ATTENTION.variants, PromptVariant.SDPA_TILED: tiled},
    )
    monkeypatch.setattr(check, "SPECS", (spec,))


def test_a_wrong_variant_in_use_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = PROMPT_ATTENTION.variants[PromptVariant.SDPA_TILED].run
    replace_tiles(monkeypatch, lambda *args: [part * 1.001 for part in right(*args)])
    assert doctor.run(Namespace(device="cpu", kernels="used", dtype=None, model=None)) == 1
    output = capsys.readouterr().out
    assert "disagrees" in output
    assert "variants in use disagree with the reference" in output


def test_a_variant_that_fails_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object) -> list[mx.array]:
        raise RuntimeError("out of registers")

    replace_tiles(monkeypatch, fail)
    assert doctor.run(Namespace(device="cpu", kernels="used", dtype=None, model=None)) == 1
    assert "RuntimeError: out of registers" in capsys.readouterr().out


def test_what_the_engines_selector_chooses_is_what_is_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one kernel over pages dropped, a model takes none of them."""
    monkeypatch.setattr(check, "SPECS", (replace(PAGED_DECODE, checked=PAGED_DECODE.checked[:1]),))
    dropped = Verdict("take_rows", "copy", "float32", None, "RuntimeError: no")
    record = Record(current_key("cpu"), (dropped,))
    for found, shown in ((None, DecodeVariant.PAGED_KERNEL), (record, DecodeVariant.REFERENCE)):
        with selecting(Selector("cuda", found)), simulated_kernels(orders=1):
            doctor.run(Namespace(device="cpu", kernels="used", dtype=["float32"], model=None))
        assert f" {shown.value} " in capsys.readouterr().out


def test_a_device_that_is_not_there() -> None:
    if mx.cuda.is_available():
        pytest.skip("this machine has it")
    command = [sys.executable, "-m", "quire.serve.cli", "doctor", "--device", "cuda"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("quire: error: device cuda is not available")


def test_the_layers_of_a_model() -> None:
    folder = Path(quire.engine.__path__[0]) / "demo" / "quire-demo"
    result = quire_doctor("--kernels", "--model", str(folder))
    assert result.returncode == 0, result.stderr
    (line,) = (line for line in result.stdout.splitlines() if "4 heads over 2 of 64" in line)
    assert "0-5" in line
    assert "MLX computes on the CPU" in line
    assert quire_doctor("--model", str(folder)).returncode == 2
    missing = quire_doctor("--kernels", "--model", str(folder / "nowhere"))
    assert missing.returncode == 1
    assert missing.stderr.startswith("quire: error: ")


def test_ranges_of_layers() -> None:
    assert ranges([0, 1, 2, 4, 6, 7]) == "0-2, 4, 6-7"
