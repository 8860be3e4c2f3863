"""Every Metal text keeps the rules of Metal, and each check catches what breaks its rule."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from importlib import resources

import mlx.core as mx
import pytest
from metal_sim import metal_text
from metal_sim.every_text import Text, every_text
from metal_sim.rules import MAX_BUFFERS, broken_rules
from metal_sim.source import MetalKernel
from metal_sim.text import parse

HEADERS = {
    *(
        "codes",
        "common",
        "convolution",
        "dense_product",
        "experts",
        "quantized_product",
        "reduce_scatter",
    ),
    *("rotary", "sampling", "states", "tile", "tile_sums"),
}
# Whole prompts are MLX's own on Metal unless `quire tune` finds this kernel faster: with wide heads
# its queries and sums leave a lane no registers, by this estimate.
SPILLS = {"paged_prompt"}


@pytest.fixture(scope="module")
def texts() -> list[Text]:
    return every_text()


def test_every_kernel_has_texts(texts: list[Text]) -> None:
    folder = resources.files("quire.kernels").joinpath("source")
    names = {path.name.removesuffix(".h") for path in folder.iterdir()} - HEADERS
    names = {name for name in names if name.partition("_")[0] not in ("metal", "cuda")}
    assert {text.kernel for text in texts} == names
    # Of each that takes arrays as long as there are rows, the variants for few elements too.
    of_few = {text.kernel for text in texts if "constant int" in text.text.text}
    assert of_few >= {"paged_decode", "paged_prompt", "paged_merge", "kv_write", "take_rows"}


def test_every_text_keeps_the_rules(texts: list[Text]) -> None:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(lambda each: broken_rules(each.text), texts))
    errors = {text.text.function: errors for text, errors in zip(texts, found, strict=True)}
    assert {name: each for name, each in errors.items() if each} == {}


def test_no_lane_needs_more_registers_than_it_has(texts: list[Text]) -> None:
    """With the settings that are used where nothing is tuned."""
    default = [text for text in texts if text.is_default]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(lambda each: broken_rules(each.text, registers=True), default))
    spilling = {text.kernel for text, errors in zip(default, found, strict=True) if errors}
    assert spilling == SPILLS


def test_apples_headers_come_before_the_macros(texts: list[Text]) -> None:
    for text in (text.text.text for text in texts):
        assert "#define" not in text[: text.rindex("#include")]


def broken(line: str, header: str = "", inputs: int = 1, **template: int) -> list[str]:
    names = [f"x{i}" for i in range(inputs)]
    kernel = MetalKernel(line, names, ["y"], header + "\n")
    arrays = [mx.zeros((8,))] * inputs
    text = metal_text(kernel, arrays, template=dict(template), output_dtypes=[mx.float32])
    return broken_rules(text, registers=True)


GOOD = "y[0] = x0[0];"
DOUBLED = "inline float doubled(float a) { return 2.0f * a; }"
SHUFFLED = "y[0] = metal::simd_shuffle_xor(x0[0], ushort(1));"


@pytest.mark.parametrize(
    ("line", "header"),
    [
        (GOOD, ""),
        ("y[0] = 1.0 * x0[0];", ""),
        ("y[0] = doubled(x0[0]);", DOUBLED),
        # One overload may call another.
        ("y[0] = twice(3);", "inline float twice(float a) { return a + a; }\n"
         "inline float twice(int a) { return twice(float(a)); }"),
        ("threadgroup float s[8192]; s[0] = x0[0]; y[0] = s[0];", ""),
        ("float s[128]; s[0] = x0[0]; y[0] = s[0];", ""),
        ("y[0] = first(x0);", "inline float first(const device float* a) { return a[0]; }"),
        (SHUFFLED, ""),
        (f"if (x0[0] > 0.0f) {{ {SHUFFLED} }}", ""),
        (f"for (int i = 0; i < 4; ++i) {{ {SHUFFLED} }}", ""),
        (f"if (simdgroup_index_in_threadgroup == 0) {{ {SHUFFLED} }}", ""),
        ("if (metal::simd_any(thread_index_in_simdgroup == 0)) { " + SHUFFLED + " }", ""),
    ],
)  # fmt: skip
def test_what_metal_allows_is_allowed(line: str, header: str) -> None:
    assert broken(line, header) == []


LANE = "const int lane = int(thread_index_in_simdgroup);"
MUTANTS = {
    "recursion": (
        "y[0] = power(x0[0], 3);",
        "inline float power(float a, int n) { return n == 0 ? 1.0f : a * power(a, n - 1); }",
        "power calls itself",
    ),
    "recursion of two": (
        "y[0] = f(x0[0]);",
        "inline float g(float a);\ninline float f(float a) { return a > 0.0f ? g(a) : a; }\n"
        "inline float g(float a) { return f(a - 1.0f); }",
        "calls itself",
    ),
    "recursion of a template": (
        "y[0] = f(x0[0]);",
        "template <typename T> inline T f(T a) { return a > T(0) ? f(a - T(1)) : a; }",
        "f calls itself",
    ),
    "function pointer": ("auto f = &doubled; y[0] = f(x0[0]);", DOUBLED, "address of function"),
    "static": ("static float s; y[0] = s;", "", "a static variable in a function"),
    "thread_local": ("thread_local float s; y[0] = s;", "", "thread_local"),
    "double": ("double d = x0[0]; y[0] = d;", "", "use of type 'double'"),
    "64-bit atomics": (
        "threadgroup metal::atomic<ulong> a; y[0] = x0[0];", "", "atomics of 64 bits"
    ),
    "dynamic initialiser": (
        "y[0] = LIMIT;", DOUBLED + "\nconstant float LIMIT = doubled(2.0f);", "initialised when"
    ),
    "array of size 0": ("float s[N - 3]; y[0] = x0[0];", "", "zero size arrays"),
    "threadgroup variable in a block": (
        "if (x0[0] > 0.0f) {\nthreadgroup float s[4];\ns[0] = 1.0f;\n}", "", "own scope"
    ),
    "threadgroup variable in a function": (
        "y[0] = f(x0[0]);",
        "inline float f(float a) {\nthreadgroup float s[4];\ns[0] = a;\nreturn s[0];\n}",
        "own scope",
    ),
    "threadgroup memory": (
        "threadgroup float s[4096 * N];\ns[0] = x0[0]; y[0] = s[0];", "", "threadgroup memory"
    ),
    "registers": ("float s[43 * N]; s[0] = x0[0]; y[0] = s[0];", "", "registers"),
    "not ASCII": (GOOD + ' constexpr const constant char* s = "\u00b5";', "", "not ASCII"),
    "pointer without an address space": (
        "float a = x0[0]; y[0] = first(&a);",
        "inline float first(const float* a) { return a[0]; }",
        "without an address space, a",
    ),
    "reference without an address space": (
        "float a = x0[0]; y[0] = first(a);",
        "inline float first(const float& a) { return a; }",
        "without an address space, a",
    ),
    "shuffle in a branch of some lanes": (
        f"{LANE} if (lane < 16) {{ {SHUFFLED} }}", "", "simd_shuffle_xor where lanes may differ"
    ),
    "shuffle in a loop of different lengths": (
        f"{LANE} for (int i = lane; i < 40; i += 32) {{ {SHUFFLED} }}", "", "may differ"
    ),
    "shuffle in a function of some lanes": (
        f"{LANE} const float a = lane > 3 ? shuffled(x0[0]) : 0.0f; y[0] = a;",
        "inline float shuffled(float a) { return metal::simd_shuffle_xor(a, ushort(1)); }",
        "shuffled where lanes may differ",
    ),
    "matrix product of some lanes": (
        f"{LANE} metal::simdgroup_matrix<float, 8, 8> a, b, c;\n"
        "if (lane % 2 == 0) metal::simdgroup_multiply_accumulate(c, a, b, c);",
        "#include <metal_simdgroup_matrix>",
        "simdgroup_multiply_accumulate where lanes may differ",
    ),
    "barrier of some lanes": (
        f"{LANE} if (lane == 0) metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);",
        "",
        "threadgroup_barrier where lanes may differ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_broken_rule_is_noticed(mutant: str) -> None:
    line, header, message = MUTANTS[mutant]
    errors = broken(line, header, N=3)
    assert any(message in error for error in errors), errors


def test_too_many_buffers_are_noticed() -> None:
    assert broken(GOOD, inputs=MAX_BUFFERS - 1) == []
    assert broken(GOOD, inputs=MAX_BUFFERS) == [f"{MAX_BUFFERS + 1} buffers, more than 31"]


def test_a_negative_template_argument_makes_no_name() -> None:
    """MLX writes it into the name as it is."""
    assert broken(GOOD, N=3) == []
    kernel = MetalKernel(GOOD, ["x0"], ["y"])
    text = metal_text(kernel, [mx.zeros((8,))], template={"N": 3}, output_dtypes=[mx.float32])
    renamed = text.text.replace("_3_", "_-3_")
    assert any("not a name" in error for error in broken_rules(parse(renamed)))
