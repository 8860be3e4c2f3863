"""Metal's address spaces in every kernel's text, as far as clang knows them from OpenCL C++."""

from __future__ import annotations

from importlib import resources
from itertools import product

import mlx.core as mx
import pytest
from decode_case import F16, DecodeCase
from metal_sim import MetalText, collected_texts, metal_text
from metal_sim.address_spaces import address_space_errors
from metal_sim.source import MetalKernel
from write_case import WriteCase

from quire.kernels.choice.problem import to_float64
from quire.kernels.choice.spec import Kind
from quire.kernels.download import copy_to_host
from quire.kernels.specs import SPECS

HEADERS = {"common", "reduce_scatter", "rotary", "sampling", "tile"}


def launch_all() -> None:
    """Launch every kernel in several ways, with small arrays, which are `constant`, and large."""
    for spec in SPECS:
        kernels = [variant for variant in spec.variants.values() if variant.kind is Kind.KERNEL]
        for kernel, shape in product(kernels, spec.checked):
            for dtype in kernel.dtypes:
                if kernel.supports(shape.bucket(), dtype, "metal"):
                    problem = spec.problem(shape, getattr(mx, dtype), 0, True)
                    to_float64(kernel.run(problem, kernel.default_settings))
    for sinks in (False, True):
        for heads in (1, 4):
            DecodeCase(F16, direct=False, sinks=sinks, softcap=2.0, kv_heads=heads).run()
    WriteCase(F16, 8, (2, 64), (2, 64), 3).run()
    for size in (4, 40):
        copy_to_host(mx.arange(size, dtype=mx.int32), mx.zeros(64, mx.int32))


@pytest.fixture(scope="module")
def texts() -> dict[str, list[MetalText]]:
    """By kernel."""
    with collected_texts() as found:
        launch_all()
    grouped: dict[str, list[MetalText]] = {}
    for text, name in dict.fromkeys(found):
        grouped.setdefault(name, []).append(text)
    return grouped


def test_every_kernel_keeps_address_spaces_apart(texts: dict[str, list[MetalText]]) -> None:
    folder = resources.files("quire.kernels").joinpath("source")
    names = {path.name.removesuffix(".h") for path in folder.iterdir()} - HEADERS
    names = {name for name in names if name.partition("_")[0] not in ("metal", "cuda")}
    assert set(texts) == names
    errors = {name: [address_space_errors(text) for text in texts[name]] for name in names}
    assert errors == {name: [[]] * len(texts[name]) for name in names}


def test_apples_headers_come_before_the_macros(texts: dict[str, list[MetalText]]) -> None:
    for text in (text for group in texts.values() for text in group):
        before = text.text[: text.text.rindex("#include")]
        assert "#define" not in before


@pytest.mark.parametrize(
    ("header", "is_refused"),
    [
        ("constexpr float LIMIT = 2.0f;", True),
        ("static constexpr float LIMIT = 2.0f;", True),
        ("constexpr int LIMITS[2] = {1, 2};", True),
        ("constant constexpr float LIMIT = 2.0f;", False),
        ("constant constexpr int LIMITS[2] = {1, 2};", False),
        ("struct Limits { static constexpr constant float LIMIT = 2.0f; };", False),
    ],
)
def test_program_scope_variables_reside_in_constant(header: str, is_refused: bool) -> None:
    kernel = MetalKernel("y[0] = x[0];", ["x"], ["y"], header + "\n")
    text = metal_text(kernel, [mx.zeros((8,))], template={}, output_dtypes=[mx.float32])
    errors = address_space_errors(text)
    if is_refused:
        message = "program scope variable must reside in constant address space"
        assert len(errors) == 1
        assert message in errors[0]
        assert header in errors[0]
    else:
        assert errors == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("y[0] = x[0];", None),
        ("y[0] = ((const device float*)x)[0];", None),
        ("y[0] = ((const device float*)few)[0];", "mismatching address spaces"),
        ("y[0] = ((const thread float*)x)[0];", "mismatching address spaces"),
        ("threadgroup float s[4]; s[0] = x[0]; y[0] = first(s);", "no matching function"),
        ("thread float s[4]; s[0] = x[0]; y[0] = first(s);", None),
        ("y[0] = first(x);", "no matching function"),
    ],
)
def test_mixed_address_spaces_are_found(line: str, message: str | None) -> None:
    header = "inline float first(const thread float* a) { return a[0]; }\n"
    kernel = MetalKernel(line, ["x", "few"], ["y"], header)
    text = metal_text(
        kernel, [mx.zeros((8,)), mx.zeros((2,))], template={}, output_dtypes=[mx.float32]
    )
    errors = address_space_errors(text)
    if message is None:
        assert errors == []
    else:
        assert any(message in error and line in error for error in errors), errors
