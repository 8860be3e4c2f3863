"""The Metal simulator: it computes what Metal specifies and reports what Metal leaves undefined."""

from __future__ import annotations

from functools import partial

import metal_sim.build
import metal_sim.run
import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from metal_sim import CompileError, KernelFault, simulate
from metal_sim.build import build
from metal_sim.source import MetalKernel, run_source

THREADS = 64

REVERSE = """
threadgroup float shared[THREADS], unused[2];
const uint i = thread_index_in_threadgroup;
const uint group = threadgroup_position_in_grid.x;
shared[i] = x[group * THREADS + i];
metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
y[group * THREADS + i] = shared[THREADS - 1 - i];
"""


def reverse(mutation: tuple[str, str] | None = None) -> tuple[mx.array, npt.NDArray[np.float32]]:
    x = np.random.default_rng(0).normal(size=(3, THREADS)).astype(np.float32)
    outputs = [((3, THREADS), mx.float32)]
    (y,) = run_source(
        MetalKernel(REVERSE, ["x"], ["y"]), [x], outputs, (3, 1, 1), mutation=mutation,
        THREADS=THREADS,
    )  # fmt: skip
    return y, x[:, ::-1]


def test_threads_share_threadgroup_memory() -> None:
    y, expected = reverse()
    np.testing.assert_array_equal(np.array(y), expected)


def test_a_missing_barrier_is_caught() -> None:
    barrier = "metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);"
    with pytest.raises(KernelFault, match="order of the threads matters"):
        reverse((barrier, ""))
    # A barrier of a simdgroup is not enough: half of what a thread reads comes from the other one.
    with pytest.raises(KernelFault, match="order of the threads matters"):
        reverse((barrier, barrier.replace("threadgroup_barrier", "simdgroup_barrier")))


def test_threadgroup_memory_starts_as_garbage_in_every_threadgroup() -> None:
    y, _ = reverse(("shared[i] = x[group * THREADS + i];", "if (group == 1) shared[i] = x[i];"))
    # The threads read before anyone of the next threadgroup could have written.
    assert np.isnan(np.array(y)[[0, 2]]).all()
    assert not np.isnan(np.array(y)[1]).any()


def test_threadgroup_memory_is_limited_as_on_a_gpu() -> None:
    reverse(("unused[2]", "unused[32 * 256 - THREADS]"))
    with pytest.raises(KernelFault, match="32772 bytes of threadgroup memory"):
        reverse(("unused[2]", "unused[32 * 256 - THREADS + 1]"))


DIVERGENCE = """
const uint i = thread_index_in_threadgroup;
const metal::mem_flags flags = metal::mem_flags::mem_threadgroup;
float v = 1.0f;
switch (which[0]) {
  case 0:
    if (i < 32) metal::threadgroup_barrier(flags);
    break;
  case 1:
    if (i < 32) {
      metal::threadgroup_barrier(flags);
    } else {
      metal::threadgroup_barrier(flags);
    }
    break;
  case 2:
    if (i % 2 == 0) v = metal::simd_sum(v);
    break;
  case 3:
    v = i % 2 == 0 ? metal::simd_sum(v) : metal::simd_max(v);
    break;
  case 4:
    if (i == 5) return;
    metal::threadgroup_barrier(flags);
    break;
  case 5:
    if (i == 40) metal::threadgroup_barrier(flags);
    v = metal::simd_sum(v);
    break;
  case 6:
    for (uint turn = 0; turn < i; ++turn) v = metal::simd_shuffle(v, 0);
    break;
  case 7:
    v = metal::simd_shuffle_xor(v, ushort(1 + i % 2));
    break;
  case 8:
    v = metal::simd_shuffle(v, ushort(32));
    break;
  default:
    if (i < 32) v = metal::simd_sum(v);
}
y[i] = v;
"""


@pytest.mark.parametrize(
    ("which", "message"),
    [
        (0, r"threads 0 to 31: waits at threadgroup_barrier .*\n  threads 32 to 63: returned"),
        (1, "threads 0 and 32 meet at different barriers"),
        (2, "waits at simd_sum"),
        (3, "calls simd_max .* called simd_sum"),
        (4, "threads 5 to 5: returned"),
        (5, r"threads 40 to 40: waits at threadgroup_barrier"),
        (6, "waits at simd_shuffle"),
        (7, "argument 2"),
        (8, "from lane 32"),
    ],
)
def test_divergence_is_reported(which: int, message: str) -> None:
    kernel = MetalKernel(DIVERGENCE, ["which"], ["y"])
    outputs = [((THREADS,), mx.float32)]
    with pytest.raises(KernelFault, match=message):
        run_source(kernel, [np.array([which], np.int32)], outputs)
    # Whole simdgroups may part.
    (y,) = run_source(kernel, [np.array([9], np.int32)], outputs)
    np.testing.assert_array_equal(np.array(y), [32.0] * 32 + [1.0] * 32)


def test_a_report_shows_the_line() -> None:
    with pytest.raises(KernelFault, match=r"\d+:\s+metal::threadgroup_barrier\(flags\);"):
        run_source(
            MetalKernel(DIVERGENCE, ["which"], ["y"]),
            [np.array([4], np.int32)],
            [((THREADS,), mx.float32)],
        )


FAULTS = """
threadgroup float shared[10];
const int i = int(thread_index_in_threadgroup);
const int n = x_shape[0];
float local[4];
for (int j = 0; j < 4; ++j) local[j] = float(j);
shared[0] = 0.0f;
float v = 0.0f;
const int at = which[0];
switch (at) {
  case 0: v = x[n]; break;
  case 1: v = x[-1]; break;
  case 2: y[64 + i / 63] = 1.0f; break;
  case 3: v = shared[9 + which[1]]; break;
  case 4: local[3 + which[1]] = 1.0f; v = local[0]; break;
  case 5: v = as_type<float>(2147483647 + which[1]); break;
  case 6: v = float(1u << (31 + which[1])); break;
  case 7: v = *(const device float*)((const device char*)x + 2); break;
  case 8: v = float(big[9]); break;
}
if (at >= 0) y[i] = v;
"""


@pytest.mark.parametrize(
    ("which", "message"),
    [
        (0, "heap-buffer-overflow"),
        (1, "heap-buffer-overflow"),
        (2, "heap-buffer-overflow"),
        (3, r"out of bounds for type 'float ?\[10\]'"),
        (4, "out of bounds|stack-buffer-overflow"),
        (5, "signed integer overflow"),
        (6, "shift exponent 32"),
        (7, "misaligned address"),
        (8, "heap-buffer-overflow"),
    ],
)
def test_sanitizers_see_faults(which: int, message: str) -> None:
    kernel = MetalKernel(FAULTS, ["x", "which", "big"], ["y"])
    x, big = np.ones(10, np.float32), np.ones(9, np.float16)
    outputs = [((THREADS,), mx.float32)]
    with pytest.raises(KernelFault, match=message):
        run_source(kernel, [x, np.array([which, 1], np.int32), big], outputs)


def test_results_that_depend_on_the_order_are_reported() -> None:
    source = "y[0] = float(thread_index_in_threadgroup);"
    with pytest.raises(KernelFault, match=r"order of the threads matters: run 1 .* in y,"):
        run_source(MetalKernel(source, [], ["y"]), [], [((1,), mx.float32)])


PLACES = """
const uint3 at = thread_position_in_grid;
const uint i = (at.z * threads_per_grid.y + at.y) * threads_per_grid.x + at.x;
y[i * 4] = threadgroup_position_in_grid.x * 100 + threadgroup_position_in_grid.y * 10
    + threadgroup_position_in_grid.z;
y[i * 4 + 1] = simdgroup_index_in_threadgroup * 1000 + thread_index_in_simdgroup;
y[i * 4 + 2] = uint(few[2]) * 100 + uint(scalar) * 10 + uint(many_ndim);
y[i * 4 + 3] = uint(many[1 * many_strides[0] + 2 * many_strides[1]]) * 10 + uint(many_shape[1]);
"""


def test_threads_know_their_place_and_arguments_arrive() -> None:
    many = np.arange(12, dtype=np.uint8).reshape(3, 4)
    (y,) = run_source(
        MetalKernel(PLACES, ["few", "scalar", "many"], ["y"]),
        [np.array([1, 2, 3], np.int16), np.array(7, np.int64), many],
        [((4, 3, 2, THREADS, 4), mx.uint32)],
        (2, 3, 4),
    )
    z, y_, x, thread = np.meshgrid(*map(np.arange, (4, 3, 2, THREADS)), indexing="ij")
    expected = np.stack(
        [
            x * 100 + y_ * 10 + z,
            thread // 32 * 1000 + thread % 32,
            np.full_like(x, 372),
            np.full_like(x, 64),
        ],
        axis=-1,
    )
    np.testing.assert_array_equal(np.array(y), expected)


def test_outputs_start_as_garbage_and_written_inputs_come_back() -> None:
    source = "if (thread_index_in_threadgroup == 3) ((device float*)x)[3] = 5.0f;"
    result = simulate(
        MetalKernel(source, ["x"], ["y"]),
        [mx.zeros((8,))],
        template={},
        groups=(1, 1, 1),
        threads=32,
        output_shapes=[(2,)],
        output_dtypes=[mx.bfloat16],
    )
    assert result.inputs[0].tolist() == [0, 0, 0, 5, 0, 0, 0, 0]
    assert mx.isnan(result.outputs[0]).all()


def test_what_is_newer_than_metals_cpp_does_not_compile() -> None:
    with pytest.raises(CompileError, match="if constexpr"):
        run_source(
            MetalKernel("if constexpr (true) y[0] = 1.0f;", [], ["y"]), [], [((1,), mx.float32)]
        )


def test_a_mutation_that_changes_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="does not change"):
        reverse(("no such text", ""))


def test_stacks_can_be_switched_on_any_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metal_sim.run, "build", partial(build, ucontext=True))
    y, expected = reverse()
    np.testing.assert_array_equal(np.array(y), expected)


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(RuntimeError, match=r"apt-get install g\+\+"):
        metal_sim.build.find_compiler()
