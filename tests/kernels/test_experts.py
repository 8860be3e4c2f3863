"""Products of experts by the exact Metal text, against a float64 reference."""

from __future__ import annotations

from itertools import product
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from metal_sim import KernelFault, Mutation, changed, compiled_ahead, simulated_kernels
from mlx_lm.models.gemma4_text import GeGLU
from mlx_lm.models.switch_layers import SwiGLU, SwitchGLU, SwitchMLP

from quire.engine.model import experts as experts_module
from quire.engine.model.experts import KernelGLU, KernelMLP, adapt_experts
from quire.engine.startup import model_shapes
from quire.kernels.choice.problem import to_float64
from quire.kernels.choice.selection import Selector, selecting
from quire.kernels.choice.spec import AnySpec
from quire.kernels.experts import MAX_PAIRS
from quire.kernels.experts_spec import (
    EXPERT_MATMUL,
    QUANTIZED_EXPERT_MATMUL,
    ExpertProblem,
    ExpertShape,
    run_experts,
)

F16, BF16 = mx.float16, mx.bfloat16
LIMITS = {F16: 3e-3, BF16: 1.5e-2}
SPECS = (EXPERT_MATMUL, QUANTIZED_EXPERT_MATMUL)
SETTINGS = [
    None,
    *(
        dict(zip(("tiles", "simdgroups", "depth"), each, strict=True))
        for each in product((1, 2), (4, 8), (2, 4))
    ),
]
# Each shape with settings of its own, so that between them both meet all.
CASES = [
    (spec, variant, shape, (F16, BF16)[i % 2], SETTINGS[(4 * v + i) % len(SETTINGS)])
    for spec in SPECS
    for v, variant in enumerate(["by_expert", "sorted"] if spec is SPECS[1] else ["by_expert"])
    for i, shape in enumerate([*spec.checked, *spec.checked[1:3], spec.checked[-1]])
]
MANY = EXPERT_MATMUL.checked[2]


def run(
    spec: AnySpec, problem: ExpertProblem, settings: Any = None, variant: str = "by_expert"
) -> mx.array:
    (found,) = spec.variants[spec.variant(variant)].run(problem, settings or {})
    assert isinstance(found, mx.array)
    return found


def error(problem: ExpertProblem, found: mx.array) -> float:
    assert found.dtype == problem.x.dtype
    return float(problem.difference(to_float64([found]), problem.expected()))


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    with compiled_ahead():
        for spec, variant, shape, dtype, settings in CASES:
            run(spec, spec.problem(shape, dtype, 0, False), settings, variant)


@pytest.mark.parametrize(("spec", "variant", "shape", "dtype", "settings"), CASES)
def test_agrees_with_float64(
    spec: AnySpec, variant: str, shape: Any, dtype: mx.Dtype, settings: Any
) -> None:
    problem = spec.problem(shape, dtype, 0, False)
    with simulated_kernels():
        found = run(spec, problem, settings, variant)
    assert error(problem, found) < LIMITS[dtype]


@pytest.mark.parametrize("chosen", ["one", "the last", "none of most"])
@pytest.mark.parametrize(("spec", "variant"), [(SPECS[0], "by_expert"), (SPECS[1], "sorted")])
def test_rows_that_all_want_the_same(chosen: str, spec: AnySpec, variant: str) -> None:
    problem = spec.problem(spec.checked[2], F16, 1, False)
    experts = np.zeros(MANY.pairs, np.uint32)
    if chosen == "the last":
        experts[:] = MANY.experts - 1
    elif chosen == "none of most":
        experts[::7] = 2
    problem.experts = mx.array(experts)
    with simulated_kernels():
        found = run(spec, problem, None, variant)
    assert error(problem, found) < LIMITS[F16]


MUTANTS = {
    "the row of another pair": changed("/ EACH;", "/ EACH % 2;"),
    "another expert's matrix": changed("w + size_t(part.expert)", "w + size_t(part.expert ^ 1)"),
    "pairs of the first simdgroup only": changed("first += s < simdgroup", "first += s < 0"),
    "pairs found so far are forgotten": changed("int first = total;", "int first = 0;"),
    "no second turn": changed("write.first_pair += Product::ROWS", "write.first_pair += 4096"),
    "sums of the turn before": changed(
        "Sums::write_all(sums, shared, write, index, simdgroup, lane);\nBARRIER();",
        "Sums::write_all(sums, shared, write, index, simdgroup, lane);",
    ),
    "places are read too early": changed(
        "if (mine != 0) found[first + int(upto) - 1] = pair;\nBARRIER();",
        "if (mine != 0) found[first + int(upto) - 1] = pair;",
    ),
}


# Of mxfp4's codes and scales.
FP4 = QUANTIZED_EXPERT_MATMUL.checked[-1]
FP4_MUTANTS = {
    "no sign": changed("(code & 8u) != 0u ? -found : found", "found"),
    "small codes as large ones": changed("size < 2u ?", "size < 0u ?"),
    "another scale": changed("uint(stored) << 23", "uint(stored ^ 1) << 23"),
}


SORTED_MUTANTS = {
    "the first pairs of all": changed("pairs + begins[part.expert]", "pairs"),
    "the pairs behind": changed("pairs + begins[part.expert]", "pairs + begins[part.expert + 1]"),
    "one pair too few": changed("starts[expert + 1] - starts", "starts[expert + 1] - 1 - starts"),
}


DENSE = ExpertShape(300, 3, 4, 50, 352)
SETTINGS = {"tiles": 1, "simdgroups": 4, "depth": 2}


@pytest.mark.parametrize(
    ("spec", "shape", "mutation", "options"),
    [
        *((EXPERT_MATMUL, DENSE, each, (SETTINGS,)) for each in MUTANTS.values()),
        *((QUANTIZED_EXPERT_MATMUL, FP4, each, ()) for each in FP4_MUTANTS.values()),
        *(
            (QUANTIZED_EXPERT_MATMUL, QUANTIZED_EXPERT_MATMUL.checked[2], each, (None, "sorted"))
            for each in SORTED_MUTANTS.values()
        ),
    ],
    ids=[*MUTANTS, *FP4_MUTANTS, *SORTED_MUTANTS],
)
def test_a_broken_kernel_is_noticed(
    spec: AnySpec, shape: Any, mutation: Mutation, options: tuple[Any, ...]
) -> None:
    problem = spec.problem(shape, F16, 0, False)
    kernel = "expert_matmul" if spec is EXPERT_MATMUL else "expert_quantized_matmul"
    try:
        with simulated_kernels({kernel: mutation}):
            found = run(spec, problem, *options)
    except KernelFault:
        return
    assert not error(problem, found) < 10 * LIMITS[F16]


def test_where_it_is_taken() -> None:
    def chosen(shape: ExpertShape, device: Any = "cuda", dtype: str = "bfloat16") -> str:
        choice = Selector(device, None).default(EXPERT_MATMUL, shape, dtype)
        return str(choice.variant.value)

    usual = ExpertShape(128, 8, 128, 704, 2816)
    assert chosen(usual) == chosen(usual._replace(pairs=MAX_PAIRS)) == "by_expert"
    assert chosen(usual._replace(pairs=MAX_PAIRS + 8)) == chosen(usual._replace(dim=48)) == "mlx"
    assert chosen(usual._replace(pairs=8)) == "by_expert"
    assert chosen(usual._replace(pairs=4)) == "mlx"  # not measured
    assert chosen(usual, "metal") == chosen(usual, "cuda", "float32") == "mlx"
    for pairs, variant in ((256, "by_expert"), (257, "sorted"), (MAX_PAIRS + 1, "sorted")):
        shape = QUANTIZED_EXPERT_MATMUL.surveyed["mxfp4"]._replace(pairs=pairs)
        choice = Selector("cuda", None).default(QUANTIZED_EXPERT_MATMUL, shape, "bfloat16")
        assert choice.variant.value == variant


def test_mlx_is_given_rows_that_it_reads_rightly() -> None:
    """Its product of many pairs on GPUs takes an axis that was put into what has been computed for
    one of stride 1, and reads other rows (mlx issue 4253)."""
    problem = EXPERT_MATMUL.problem(ExpertShape(64, 2, 4, 32, 64), F16, 0, False)
    with mock.patch.object(mx, "gather_mm", wraps=mx.gather_mm) as product:
        run(EXPERT_MATMUL, problem, None, "mlx")
    rows = product.call_args.args[0]
    mx.eval(rows)
    assert memoryview(rows).strides[:2] == (64 * rows.itemsize, 64 * rows.itemsize)


def switch(kind: type, bias: bool, bits: int | str | None) -> nn.Module:
    module: nn.Module = kind(64, 96, 6, bias=bias)
    if bias:
        for linear in module.children().values():
            if "bias" in linear:
                linear.bias = mx.random.normal(linear.bias.shape)
    module.apply(lambda array: array.astype(BF16))
    if bits == "mxfp4":
        nn.quantize(module, 32, 4, mode="mxfp4")
    elif bits:
        nn.quantize(module, 32, bits)
    module.eval()
    return module


@pytest.mark.parametrize(("kind", "adapted"), [(SwitchGLU, KernelGLU), (SwitchMLP, KernelMLP)])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(
    ("bits", "rows"), [(None, 5), (None, 40), *product([4, 8, "mxfp4"], [5, 40, 345])]
)
def test_a_mixture_gives_what_mlx_lm_gives(
    kind: type, adapted: type, bits: int | str | None, bias: bool, rows: int
) -> None:
    mx.random.seed(rows)
    model = nn.Sequential(switch(kind, bias, bits))
    x = mx.random.normal((rows, 1, 64)).astype(BF16)
    indices = mx.argsort(mx.random.normal((rows, 1, 6)), axis=-1)[..., :3]
    exact = nn.Sequential(switch(kind, bias, bits))
    exact.update(model.parameters())
    exact.apply(lambda array: array.astype(mx.float32) if array.dtype == BF16 else array)
    expected = exact.layers[0](x.astype(mx.float32), indices)
    adapt_experts(model)
    assert type(model.layers[0]) is adapted
    with (
        mock.patch.object(experts_module, "run_experts", wraps=run_experts) as run,
        simulated_kernels(orders=1),
        selecting(Selector("cuda", None)),
    ):
        got = model.layers[0](x, indices)
    assert run.call_count == 2
    assert got.shape == expected.shape
    assert got.dtype == BF16
    assert mx.abs(got - expected).max() < 2e-2 * mx.abs(expected).max()


def test_a_start_on_metal_checks_experts_of_every_mode() -> None:
    """Those of two modes that agree in all sizes, too."""
    model = nn.Sequential(
        *(switch(SwitchMLP, bias=False, bits=bits) for bits in (4, "mxfp4", None))
    )
    found = model_shapes._product_fields(model)
    assert {(f["dim"], f["mxfp4"]) for f in found[QUANTIZED_EXPERT_MATMUL]} == {
        *product((64, 96), (False, True))
    }
    assert {f["dim"] for f in found[EXPERT_MATMUL]} == {64, 96}


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("activation", [SwiGLU(), GeGLU()], ids=["swiglu", "geglu"])
@pytest.mark.parametrize("bits", [None, 4, "mxfp4"])
def test_on_other_devices_and_types_mlx_multiplies(
    rows: int, bias: bool, activation: nn.Module, bits: int | str | None
) -> None:
    module = switch(SwitchGLU, bias, bits)
    module.apply(lambda array: array.astype(mx.float32) if array.dtype == BF16 else array)
    module.activation = activation
    x, indices = mx.random.normal((rows, 1, 64)), mx.random.randint(0, 6, (rows, 1, 2))
    expected = module(x, indices)
    adapt_experts(nn.Sequential(module))
    assert type(module) is KernelGLU
    got = module(x, indices)
    assert got.shape == expected.shape
    assert mx.allclose(got, expected, atol=1e-5)


def test_experts_with_a_scale_of_their_own_are_not_joined() -> None:
    module = SwitchGLU(64, 96, 6)
    for name in ("gate_proj", "up_proj", "down_proj"):
        module[name] = module[name].to_quantized(16, 4, "nvfp4", global_scale=True)
    adapt_experts(nn.Sequential(module))
    assert type(module) is SwitchGLU


def test_experts_packed_in_two_ways_are_not_joined() -> None:
    module = SwitchGLU(64, 96, 6)
    module.gate_proj = module.gate_proj.to_quantized(32, 8)
    module.up_proj = module.up_proj.to_quantized(32, 4)
    adapt_experts(nn.Sequential(module))
    assert type(module) is SwitchGLU
