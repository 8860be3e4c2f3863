"""CUDA kernels are compiled together, and found by MLX where it looks for them."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from tempfile import gettempdir
from unittest import mock

import mlx.core as mx
import pytest

from quire.kernels.choice.check import in_use
from quire.kernels.cuda_cache import FOLDER_VARIABLE, KernelCache, Program, open_cache
from quire.kernels.gpu_kernel import GpuKernel, TemplateValue
from quire.kernels.nvrtc import CompileError
from quire.loadtest.kernels.bench import compile_cases
from quire.loadtest.kernels.cases import Profile, cases_of

if mx.cuda.is_available():  # MLX asks when it compiles for the first time
    os.environ.setdefault(FOLDER_VARIABLE, str(Path(gettempdir(), "quire-test-kernels")))

swiglu = GpuKernel("swiglu", ("both",), ("output",))
TEMPLATE: dict[str, TemplateValue] = {"T": mx.bfloat16, "N": 64, "SMALL": True}


def program(template: dict[str, TemplateValue] = TEMPLATE) -> Program:
    return Program.of(swiglu, [mx.zeros((2, 128), mx.bfloat16)], template, [mx.bfloat16])


def launch(kernel: GpuKernel, rows: int = 2) -> list[mx.array]:
    return kernel(
        [mx.zeros((rows, 128), mx.bfloat16)],
        template=TEMPLATE,
        groups=(1, 1, 1),
        threads=32,
        output_shapes=[(rows, 64)],
        output_dtypes=[mx.bfloat16],
    )


def test_the_text_is_the_one_that_mlx_makes() -> None:
    found = program()
    assert found.function == "custom_kernel_swiglu_bfloat16_t_64_t"
    arguments = swiglu.arguments("cuda")
    assert found.mlx_text == (
        '\n#include "mlx/backend/cuda/device/utils.cuh"\n\n#include <cooperative_groups.h>\n\n'
        + arguments["header"]
        + "namespace mlx::core::cu {\n\nnamespace cg = cooperative_groups;\n\n"
        + f"__global__ void {found.function}(\n"
        + "    const __nv_bfloat16* both,\n"
        + "    const __grid_constant__ Shape both_shape,\n"
        + "    __nv_bfloat16* output) {\n"
        + "  using T = __nv_bfloat16;\n  constexpr int N = 64;\n  constexpr bool SMALL = true;\n\n"
        + arguments["source"]
        + "\n}\n\n} // namespace mlx::core::cu\n"
    )
    # As std::hash of GNU's C++ library has it.
    assert program().module == found.module
    assert program({**TEMPLATE, "N": 32}).module != found.module


def test_kernels_are_compiled_once_side_by_side(tmp_path: Path) -> None:
    together = threading.Barrier(2, timeout=60)
    compiled: list[str] = []

    def compile_program(text: str) -> bytes:
        together.wait()
        compiled.append(text)
        return b"cubin"

    cache = KernelCache(tmp_path / "new", compile_program, threads=2)
    other = GpuKernel("take_rows", ("both",), ("output",))
    with cache.collecting():
        for kernel in (swiglu, other, swiglu):
            assert launch(kernel)[0].tolist() == mx.zeros((2, 64)).tolist()
        assert launch(swiglu, rows=5)[0].shape == (5, 64)  # the same text
    assert len(compiled) == 2
    path = program().path(tmp_path / "new")
    assert path.read_bytes() == b"cubin"
    function = program().function
    assert path.with_suffix(".txt").read_text() == f"mlx::core::cu::{function}\t{function}\n"

    def refuse(text: str) -> bytes:
        raise AssertionError("compiled again")

    with KernelCache(tmp_path / "new", refuse, threads=1).collecting():
        launch(swiglu)


def test_nothing_compiled_meanwhile_is_kept(tmp_path: Path) -> None:
    """A graph traced while kernels give zeros must not be replayed when they run."""

    @mx.compile
    def doubled(x: mx.array) -> mx.array:
        return 2 * swiglu(
            [x], template=TEMPLATE, groups=(1, 1, 1), threads=32,
            output_shapes=[(1,)], output_dtypes=[mx.float32],
        )[0]  # fmt: skip

    cache = KernelCache(tmp_path, lambda text: b"cubin", threads=1)
    with cache.collecting():
        assert doubled(mx.ones(1)).item() == 0
    with mock.patch.object(GpuKernel, "launch", return_value=[mx.array([21.0])]):
        assert doubled(mx.ones(1)).item() == 42


def test_all_that_is_in_use_is_compiled_before_any_of_it_runs(tmp_path: Path) -> None:
    compiled: list[str] = []

    def compile_program(text: str) -> bytes:
        compiled.append(text)
        return b"cubin"

    cache = KernelCache(tmp_path, compile_program, threads=2)
    next(in_use("cuda", ["bfloat16"], cache.collecting()))
    names = set(
        re.findall(
            r'extern "C" __global__ void custom_kernel_([a-z_]+?)_(?=bf|[0-9])', "".join(compiled)
        )
    )
    assert names >= {"paged_decode", "paged_prompt", "delta_rule", "ssm_scan", "swiglu", "kv_write"}
    assert len(compiled) > 30


def test_the_kernels_of_all_cases_are_compiled_before_they_are_timed(tmp_path: Path) -> None:
    compiled: list[str] = []
    cache = KernelCache(tmp_path, lambda text: compiled.append(text) or b"cubin", threads=2)
    cases = cases_of(["conv_window", "add_rms_norm"], Profile("cuda", quick=True))
    compile_cases(cases, cache.collecting())
    assert len(compiled) == 2


def test_a_kernel_that_is_refused_is_left_to_mlx(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(text: str) -> bytes:
        raise CompileError("expected a ';'")

    with KernelCache(tmp_path, refuse, threads=1).collecting():
        launch(swiglu)
    assert list(tmp_path.iterdir()) == []
    assert "custom_kernel_swiglu" in caplog.text
    assert "expected a ';'" in caplog.text


def test_a_folder_that_cannot_be_written_is_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "taken").write_text("no folder")
    with KernelCache(tmp_path / "taken", lambda text: b"cubin", threads=1).collecting():
        launch(swiglu)
    assert "custom_kernel_swiglu" in caplog.text


def test_long_names_become_folders(tmp_path: Path) -> None:
    long = program({f"CONSTANT_{i}": 1_000_000 + i for i in range(40)})
    parts = long.path(tmp_path).relative_to(tmp_path).parts
    assert len(parts) == 2
    assert len(parts[0]) == 245
    assert "".join(parts) == f"{long.module}.ptx"


@pytest.mark.gpu
@pytest.mark.skipif(not mx.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_mlx_runs_what_the_folder_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that nobody has compiled before, and in its place one that says something else."""
    cache = open_cache()
    assert cache is not None
    kernel = GpuKernel("sums", ("x",), ("output",))

    def arguments(self: GpuKernel, prelude: str) -> dict[str, object]:
        return {
            "name": "sums", "input_names": ("x",), "output_names": ("output",),
            "header": "", "source": "output[threadIdx.x] = x[threadIdx.x] + ADDED;",
        }  # fmt: skip

    monkeypatch.setattr(GpuKernel, "arguments", arguments)

    def run(added: int) -> Sequence[float]:
        found = kernel(
            [mx.arange(4, dtype=mx.float32)],
            template={"ADDED": added},
            groups=(1, 1, 1),
            threads=4,
            output_shapes=[(4,)],
            output_dtypes=[mx.float32],
        )
        values: list[float] = found[0].tolist()
        return values

    compile_program = cache._compile
    changed = KernelCache(
        cache._folder, lambda text: compile_program(text.replace("+ ADDED", "+ 7")), threads=1
    )
    with changed.collecting():
        run(3)
    assert run(3) == [7, 8, 9, 10]
    assert run(4) == [4, 5, 6, 7]
