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

from quire.engine.config import EngineConfig
from quire.engine.engine import Engine
from quire.engine.messages import GenerateRequest, SamplingParams
from quire.engine.model.paged_model import PagedModel
from quire.engine.model.paging import page_model
from quire.engine.startup.kernel_check import avoid_dropped, check_kernels
from quire.engine.startup.model_shapes import model_shapes
from quire.kernels.choice import check, selection
from quire.kernels.choice.record import Record, Verdict, current_key, load_record, save_record
from quire.kernels.choice.spec import AnySpec, Kind
from quire.kernels.fused_ops_spec import ADD_RMS_NORM
from quire.kernels.gpu_kernel import GpuKernel
from quire.kernels.matmul_spec import MATMUL
from quire.kernels.paged_decode_spec import PAGED_DECODE
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


def agreeing(spec: AnySpec, name: Enum, dtype: str, device: str, *, briefly: bool) -> Verdict:
    return Verdict(spec.name, name.value, dtype, 0.0, "")


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
        ((("add_rms_norm", "fused"),), True, True),
        ((("swiglu", "fused"),), True, True),
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
    with mock.patch.object(check, "check_variant", agreeing):
        notes = avoid_dropped("metal", model, 8)
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
        selection.selecting(selection.selector_for("metal")),
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
    dropped = {operation for operation, _ in wrong}
    assert launched & set(FUSED) == (set(FUSED) - dropped if fused else set())
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
    assert avoid_dropped("cuda", page_model(model, "qwen3"), 16) == []
    check_kernels("cuda", model)
    assert len(checks) == done


@pytest.mark.parametrize(
    ("family", "spec", "expected"),
    [
        ("qwen3", PAGED_DECODE, {(4, 2, 16, 16, 8, False, False)}),
        ("gemma3_text", PAGED_DECODE, {(4, 2, 16, 16, 8, w, False) for w in (True, False)}),
        ("gpt_oss", PAGED_DECODE, {(4, 2, 16, 16, 8, w, True) for w in (True, False)}),
    ],
)
def test_kernels_are_checked_at_the_models_own_shapes(
    family: str, spec: AnySpec, expected: set[tuple[int | bool, ...]]
) -> None:
    model = page_model(build(family, 0), family)
    shapes = model_shapes(model, 8)
    found = {tuple(shape)[2:9] for shape in shapes[spec]}
    assert found == expected
    # As many rows and as long contexts as are checked of other sizes.
    assert {tuple(s)[:2] for s in shapes[spec]} == {tuple(s)[:2] for s in spec.checked}
    hidden = model.model.args.hidden_size
    assert hidden in {shape.dim for shape in shapes[MATMUL]}  # type: ignore[attr-defined]
    assert (ADD_RMS_NORM in shapes) == (family == "qwen3")
    for each, own in shapes.items():
        for shape in own:
            each.problem(shape, mx.float32, 0, True)


def test_what_fails_at_one_models_shapes_is_dropped_for_it_alone() -> None:
    checked()
    windows = page_model(build("gemma3_text", 0), "gemma3_text")
    plain = page_model(build("qwen3", 0), "qwen3")
    asked: list[tuple[str, str]] = []

    def check_windows(
        spec: AnySpec, name: Enum, dtype: str, device: str, *, briefly: bool
    ) -> Verdict:
        assert not briefly
        asked.append((spec.name, name.value))
        own = any(getattr(shape, "window", False) for shape in spec.checked)
        wrong = own and spec.name == "paged_decode"
        return Verdict(spec.name, name.value, dtype, 0.0, "its result is off" if wrong else "")

    with mock.patch.object(check, "check_variant", check_windows):
        notes = avoid_dropped("metal", windows, 8)
        assert notes == ["paged_decode.paged_kernel is not used for float32: its result is off"]
        assert not windows.allow_kernels
        assert ("kv_write", "in_place") in asked
        assert avoid_dropped("metal", plain, 8) == []
        assert plain.allow_kernels
        assert plain.allow_fused
        # Both are known now.
        asked.clear()
        assert len(avoid_dropped("metal", windows, 8)) == 1
        assert avoid_dropped("metal", plain, 8) == []
        assert not asked


@pytest.mark.parametrize("wrong", [False, True])
def test_states_are_checked_at_the_models_own_shapes(wrong: bool) -> None:
    checked()
    asked: dict[str, list[tuple[int, ...]]] = {}

    def check_states(
        spec: AnySpec, name: Enum, dtype: str, device: str, *, briefly: bool
    ) -> Verdict:
        asked[spec.name] = [tuple(shape) for shape in spec.checked]
        fails = wrong and spec.name == "conv_window"
        return Verdict(spec.name, name.value, dtype, 0.0, "its result is off" if fails else "")

    metal = selection.selecting(selection.Selector("metal", None))
    with simulated_kernels(orders=1), metal:
        model = page_model(build("lfm2", 0), "lfm2")
    assert model.states is not None
    assert model.states.in_place
    with mock.patch.object(check, "check_variant", check_states):
        notes = avoid_dropped("metal", model, 8)
    assert {shape[2:] for shape in asked["conv_window"]} == {(64, 3, False, False, 0, 0)}
    assert "delta_rule" not in asked
    assert len(notes) == wrong
    # MLX writes them then.
    assert model.states.in_place is not wrong
    prompt = list(range(1, 20))
    if wrong:
        assert tokens_of(model, prompt) == reference_generate(build("lfm2", 0), prompt, 3)[0]
