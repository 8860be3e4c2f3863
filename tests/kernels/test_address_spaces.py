"""Metal's address spaces, as far as clang knows them from OpenCL C++."""

from __future__ import annotations

import mlx.core as mx
import pytest
from metal_sim import metal_text
from metal_sim.address_spaces import address_space_errors
from metal_sim.source import MetalKernel


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
