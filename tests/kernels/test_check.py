"""Variants are held to float64; a kernel that disagrees or does not compile is not used."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
import pytest
from metal_sim import simulated_kernels

from quire.kernels.choice import check, selection
from quire.kernels.choice.check import check_all, check_variant, checked_variants
from quire.kernels.choice.chips import DeviceName
from quire.kernels.choice.record import load_record, record_path
from quire.kernels.choice.selection import Choice, Why
from quire.kernels.gpu_kernel import GpuKernel
from quire.kernels.kv_write_spec import KV_WRITE, WriteShape, WriteVariant
from quire.kernels.mixed_attention_spec import MIXED_ATTENTION, MixedVariant
from quire.kernels.prompt_attention_spec import PROMPT_ATTENTION, PromptVariant
from quire.kernels.shared_context_spec import SHARED_CONTEXT, SharedVariant
from quire.kernels.specs import SPECS, find_spec

WRITE = WriteShape(5, 2, 64, 64, 16)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(selection, "_selectors", {})
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


def chosen(dtype: mx.Dtype, device: DeviceName) -> Choice[WriteVariant]:
    return selection.selector_for(device).select(KV_WRITE, WRITE, dtype)


@pytest.fixture
def writes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "SPECS", (replace(KV_WRITE, checked=(WRITE,)),))


@pytest.mark.long
def test_everything_agrees_on_the_cpu() -> None:
    verdicts = list(check_all("cpu", ["float32"]))
    assert {v.operation for v in verdicts} == {spec.name for spec in SPECS}
    for verdict in verdicts:
        assert not verdict.reason, verdict
        assert verdict.error is not None
        assert verdict.error <= 1e-5


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_a_wrong_result_is_seen(factor: float) -> None:
    right = PROMPT_ATTENTION.variants[PromptVariant.GATHER_SDPA]

    def run(problem: Any, settings: Any) -> list[mx.array]:
        return [part * factor for part in right.run(problem, settings)]

    variants = {**PROMPT_ATTENTION.variants, PromptVariant.GATHER_SDPA: replace(right, run=run)}
    spec = replace(PROMPT_ATTENTION, variants=variants)
    verdict = check_variant(spec, PromptVariant.GATHER_SDPA, "float32", "cpu")
    assert verdict is not None
    assert verdict.reason.startswith("its result is off by ")
    correct = check_variant(spec, PromptVariant.SDPA_TILED, "float32", "cpu")
    assert correct is not None
    assert not correct.reason


BROKEN = {
    "gather_pages": ("copy", "token % BLOCK_SIZE", "token % BLOCK_SIZE ^ 1"),
    "kv_write": (
        "in_place",
        "kept_values)[source] = moved",
        "kept_values)[source] = quire::Pack()",
    ),
    "take_rows": ("copy", "indices[row]", "indices[row ^ 1]"),
    "rotate_and_write": ("fused", "first * sine + ", "first * sine - "),
    "add_rms_norm": ("fused", "values[n * VEC + e] += other[e]", "values[n * VEC + e] -= other[e]"),
    "swiglu": ("fused", "exp2(-gate[e]", "exp2(gate[e]"),
    "top_experts": ("fused", "order[i] = quire::LOWEST;\n", ";\n"),
    "weigh_experts": ("fused", "sums[e] += weight * values[e]", "sums[e] += values[e]"),
    "conv_window": ("in_place", "row < begin + KEPT", "row < begin + KEPT - 1"),
    "delta_rule": ("in_place", "* beta_tile[n]", ""),
    "ssm_scan": ("in_place", "state[i] * decay", "state[i]"),
}


@pytest.mark.parametrize("operation", BROKEN)
def test_a_broken_kernel_of_a_block_is_seen(operation: str) -> None:
    name, old, new = BROKEN[operation]
    spec = find_spec(operation)
    variant = spec.variant(name)
    spec = replace(spec, checked=spec.checked[:1])
    with simulated_kernels(orders=1):
        right = check_variant(spec, variant, "float32", "metal")
    with simulated_kernels({operation: lambda text: text.replace(old, new)}, orders=1):
        wrong = check_variant(spec, variant, "float32", "metal")
    assert right is not None
    assert not right.reason
    assert wrong is not None
    assert "its result is off by" in wrong.reason


@pytest.mark.parametrize("is_broken", [False, True])
def test_a_broken_sum_of_what_rows_share_is_seen(is_broken: bool) -> None:
    spec = replace(SHARED_CONTEXT, checked=SHARED_CONTEXT.checked[1:2])
    broken = {"paged_decode": lambda text: text.replace("* keep + values", "+ values")}
    with simulated_kernels(broken if is_broken else None, orders=1):
        together = check_variant(spec, SharedVariant.CASCADE, "float16", "metal")
        each = check_variant(spec, SharedVariant.PER_ROW, "float16", "metal")
    assert together is not None
    assert ("its result is off by" in together.reason) == is_broken
    assert each is not None
    assert not each.reason


@pytest.mark.parametrize("is_broken", [False, True])
def test_hidden_keys_that_weigh_are_seen_beside_decodes(is_broken: bool) -> None:
    def broken(text: str) -> str:
        return text.replace("highest > quire::HIDDEN ? highest * scale : 0.0f", "highest * scale")

    with (
        simulated_kernels({"paged_prompt": broken} if is_broken else None, orders=1),
        mock.patch("quire.kernels.paged_prompt._num_stages", return_value=1),
    ):
        together = check_variant(MIXED_ATTENTION, MixedVariant.FUSED, "bfloat16", "metal")
    assert together is not None
    assert bool(together.reason) == is_broken
    assert not is_broken or "its result is off by" in together.reason
    apart = check_variant(MIXED_ATTENTION, MixedVariant.SEPARATE, "float32", "cpu")
    assert apart is not None
    assert not apart.reason


@pytest.mark.usefixtures("writes_only")
def test_a_kernel_is_checked_once(caplog: pytest.LogCaptureFixture) -> None:
    with simulated_kernels(orders=1):
        record = checked_variants("metal", ["float32"])
    (verdict,) = record.verdicts
    assert (verdict.variant, verdict.error, verdict.reason) == ("in_place", 0.0, "")
    assert chosen(mx.float32, "metal").variant is WriteVariant.IN_PLACE
    # The kernel cannot run here, so a second check would fail; the first one is remembered.
    assert checked_variants("metal", ["float32"]) == record == load_record("metal")
    assert not caplog.messages


@pytest.mark.usefixtures("writes_only")
def test_a_kernel_that_disagrees_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    neighbour = {
        "kv_write": lambda text: text.replace("slot % BLOCK_SIZE", "slot % BLOCK_SIZE ^ 1")
    }
    with simulated_kernels(neighbour, orders=1), caplog.at_level(logging.WARNING):
        record = checked_variants("metal", ["float32"])
    assert record.dropped() == {("kv_write", "in_place", "float32")}
    (message,) = caplog.messages
    assert message.startswith("not using kv_write.in_place for float32: its result is off by")
    choice = chosen(mx.float32, "metal")
    assert (choice.variant, choice.why) == (WriteVariant.SCATTER, Why.GAP)
    # Half precision has not been checked yet; what is known is not checked again.
    with simulated_kernels(orders=1):
        record = checked_variants("metal", ["float32", "float16"])
    assert record.dropped() == {("kv_write", "in_place", "float32")}
    assert chosen(mx.float16, "metal").variant is WriteVariant.IN_PLACE


@pytest.mark.usefixtures("writes_only")
def test_a_kernel_that_does_not_compile_is_dropped(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("unable to build the library")

    monkeypatch.setattr(GpuKernel, "launch", fail)
    record = checked_variants("cuda", ["bfloat16"])
    (verdict,) = record.verdicts
    assert verdict.reason == "RuntimeError: unable to build the library"
    assert "unable to build the library" in caplog.text
    choice = chosen(mx.bfloat16, "cuda")
    assert choice.variant is WriteVariant.SCATTER


@pytest.mark.parametrize(
    "reason",
    [
        "[METAL] Command buffer execution failed: Insufficient Memory "
        "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)",
        "[METAL] Command buffer execution failed: Caused GPU Timeout Error (00000002)",
        "[metal::malloc] Unable to allocate 1024 bytes",
        "cudaMallocAsync: out of memory",
    ],
)
@pytest.mark.usefixtures("writes_only")
def test_a_passing_failure_is_not_remembered(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise RuntimeError(reason)

    monkeypatch.setattr(GpuKernel, "launch", fail)
    record = checked_variants("metal", ["float32"])
    assert record.dropped() == {("kv_write", "in_place", "float32")}
    assert chosen(mx.float32, "metal").variant is WriteVariant.SCATTER
    # The next start asks again.
    assert load_record("metal").verdicts == ()
    monkeypatch.undo()


@pytest.mark.usefixtures("writes_only")
def test_a_record_that_cannot_be_written_holds_for_the_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "quire").touch()
    monkeypatch.setattr(GpuKernel, "launch", lambda *args, **options: [mx.zeros((1,))])
    checked_variants("metal", ["float32"])
    assert "the kernels will be checked again at the next start" in caplog.text
    assert not record_path(load_record("metal").key).exists()
    assert chosen(mx.float32, "metal").variant is WriteVariant.SCATTER
