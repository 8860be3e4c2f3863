"""What was found wrong on this machine is not used, said, and not needed for right tokens."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from unittest import mock

import mlx.core as mx
import pytest
from metal_sim import simulated_kernels
from model_zoo import build
from model_zoo_traffic import reference_generate

from quire.engine.engine import Engine, EngineConfig
from quire.engine.messages import GenerateRequest, SamplingParams
from quire.engine.model.paged_model import PagedModel
from quire.engine.model.paging import page_model
from quire.engine.startup.kernel_check import avoid_dropped, check_kernels
from quire.kernels.choice import check, selection
from quire.kernels.choice.record import Record, Verdict, current_key, load_record, save_record
from quire.kernels.choice.spec import AnySpec, Kind
from quire.kernels.gpu_kernel import GpuKernel
from quire.kernels.specs import SPECS

FUSED = ("rotate_and_write", "add_rms_norm", "swiglu")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(selection, "_selectors", {})


def checked(*wrong: tuple[str, str]) -> None:
    """Leave a record as of a first start that found ``wrong`` (operation, variant)."""
    verdicts = [
        Verdict(
            spec.name,
            name.value,
            dtype,
            None,
            "RuntimeError: no\nregisters" if (spec.name, name.value) in wrong else "",
        )
        for spec in SPECS
        for name, variant in spec.variants.items()
        for dtype in variant.dtypes
        if variant.kind is Kind.KERNEL
    ]
    save_record(Record(current_key("metal"), tuple(verdicts)))


def tokens_of(model: PagedModel, prompt: list[int]) -> list[int]:
    config = EngineConfig(
        num_blocks=20, block_size=8, max_num_seqs=2, max_num_batched_tokens=16, encode_ahead=True
    )
    engine = Engine(model, config)
    engine.submit(GenerateRequest(0, prompt, 3, SamplingParams(temperature=0)))
    tokens: list[int] = []
    while engine.has_work:
        for output in engine.step():
            tokens += output.token_ids
    return tokens


@pytest.mark.parametrize(
    ("wrong", "in_place", "fused"),
    [
        ((), True, True),
        ((("sample", "kernel"),), True, True),
        ((("add_rms_norm", "fused"),), True, False),
        ((("swiglu", "fused"),), True, False),
        ((("rotate_and_write", "fused"),), True, False),
        ((("paged_decode", "paged_kernel"),), False, False),
        ((("kv_write", "in_place"),), False, False),
        ((("take_rows", "copy"),), False, False),
        ((("gather_pages", "copy"), ("swiglu", "fused")), False, False),
    ],
)
def test_a_model_does_without(
    wrong: tuple[tuple[str, str], ...], in_place: bool, fused: bool
) -> None:
    checked(*wrong)
    model = page_model(build("qwen3", 0), "qwen3")
    notes = avoid_dropped("metal", model)
    assert notes == [
        f"{operation}.{variant} is not used for float32: RuntimeError: no registers"
        for operation, variant in sorted(
            wrong, key=lambda each: [spec.name for spec in SPECS].index(each[0])
        )
    ]
    prompt = list(range(3, 22))
    launched: set[str] = set()
    with (
        mock.patch("quire.engine.model.paged_model.on_gpu", return_value=True),
        simulated_kernels(orders=1),
    ):
        run = GpuKernel.launch

        def recorded(self: GpuKernel, *args: object, **options: object) -> list[mx.array]:
            launched.add(self.name)
            return run(self, *args, **options)

        with mock.patch.object(GpuKernel, "launch", recorded):
            tokens = tokens_of(model, prompt)
    assert tokens == reference_generate(build("qwen3", 0), prompt, 3)[0]
    assert model.in_place is in_place
    assert model.is_standard is fused
    assert bool(launched & set(FUSED)) is fused
    assert bool(launched) is in_place


def test_checks_what_the_model_computes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    checks: list[tuple[str, str, str]] = []

    def checked(spec: AnySpec, name: Enum, dtype: str, device: str, *, briefly: bool) -> Verdict:
        checks.append((spec.name, name.value, dtype))
        return Verdict(spec.name, name.value, dtype, 0.0, "")

    monkeypatch.setattr(check, "check_variant", checked)
    model = build("qwen3", 0)
    model.apply(lambda array: array.astype(mx.bfloat16))
    check_kernels("cpu", model)
    assert not checks
    check_kernels("cuda", model)
    assert {dtype for _, _, dtype in checks} == {"bfloat16"}
    assert {operation for operation, _, _ in checks} >= {"paged_decode", "kv_write", *FUSED}
    assert len(load_record("cuda").verdicts) == len(checks) == len(set(checks))
    # The pages are of the same type: nothing is left to check, then or at the next start.
    done = len(checks)
    assert avoid_dropped("cuda", page_model(model, "qwen3")) == []
    check_kernels("cuda", model)
    assert len(checks) == done
