"""What a kernel's launch hands to MLX, and how often."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from quire.kernels import gpu_kernel
from quire.kernels.gpu_kernel import GpuKernel, float_bits


class Recorder:
    """Stands where MLX's kernel object would: adds N to its input."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, **arguments: Any) -> list[mx.array]:
        self.calls.append(arguments)
        return [arguments["inputs"][0] + dict(arguments["template"])["N"]]


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def kernel(recorder: Recorder) -> GpuKernel:
    kernel = GpuKernel("swiglu", inputs=("both",), outputs=("output",))
    kernel.__dict__["metal"] = kernel.__dict__["cuda"] = recorder
    return kernel


def run(kernel: GpuKernel, x: mx.array, n: int = 1, groups: int = 2) -> mx.array:
    (output,) = kernel(
        [x],
        template={"T": x.dtype, "N": n},
        groups=(groups, 3, 1),
        threads=64,
        output_shapes=[x.shape],
        output_dtypes=[x.dtype],
    )
    return output


def test_the_grid_counts_threads(kernel: GpuKernel, recorder: Recorder) -> None:
    run(kernel, mx.zeros((4,)), groups=5)
    (call,) = recorder.calls
    assert call["grid"] == (320, 3, 1)
    assert call["threadgroup"] == (64, 1, 1)
    assert call["output_shapes"] == [(4,)]


def test_an_input_that_is_not_read_may_be_missing(recorder: Recorder) -> None:
    kernel = GpuKernel("swiglu", inputs=("both", "sinks"), outputs=("output",))
    kernel.__dict__["metal"] = kernel.__dict__["cuda"] = recorder
    x = mx.array([1.0, 2.0])
    (output,) = kernel(
        [x, None],
        template={"N": 1},
        groups=(1, 1, 1),
        threads=32,
        output_shapes=[(2,)],
        output_dtypes=[x.dtype],
    )
    assert output.tolist() == [2, 3]
    _, missing = recorder.calls[0]["inputs"]
    # MLX passes smaller arrays in another address space on Metal, which would be another text.
    assert missing.size >= 8


def test_equal_launches_are_put_together_once(kernel: GpuKernel, recorder: Recorder) -> None:
    for value in range(5):
        assert run(kernel, mx.full((4,), value)).tolist() == [value + 1] * 4
    assert len(recorder.calls) == 1


def test_whatever_differs_is_another_launch(kernel: GpuKernel, recorder: Recorder) -> None:
    x = mx.zeros((4,))
    assert run(kernel, x, 1).tolist() == [1] * 4
    assert run(kernel, x, 2).tolist() == [2] * 4
    assert run(kernel, x.astype(mx.float16), 1).dtype == mx.float16
    assert run(kernel, mx.zeros((6,)), 1).shape == (6,)
    run(kernel, x, 1, groups=7)
    assert len(recorder.calls) == 5


def test_launches_are_not_kept_for_ever(kernel: GpuKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_kernel, "_MAX_LAUNCHES", 3)
    for size in range(1, 9):
        assert run(kernel, mx.zeros((size,))).tolist() == [1] * size
        assert len(kernel._launches) <= 3


def test_a_compiled_step_may_contain_launches(kernel: GpuKernel) -> None:
    step = mx.compile(lambda x: run(kernel, run(kernel, x) * 2))
    for value in range(3):
        assert step(mx.full((4,), value)).tolist() == [2 * value + 3] * 4


@pytest.mark.parametrize("value", [0.0, 1e-6, 0.08838834764831845, 30.0])
def test_floats_keep_their_bits(value: float) -> None:
    bits = mx.array(float_bits(value), mx.int32).view(mx.float32)
    assert bits.item() == mx.array(value).item()


def test_cuda_is_given_the_files_and_the_names_of_shapes() -> None:
    kernel = GpuKernel("kv_write", ("keys", "slot_mapping"), ("new_fence",), headers=("tile",))
    metal, cuda = (kernel.arguments(prelude) for prelude in ("metal", "cuda"))
    written = str(metal["header"]) + str(metal["source"])
    assert "slot_mapping_shape" in written
    assert "slot_mapping_shape" in cuda["source"]
    assert "keys_shape" not in cuda["source"]
    included = re.findall(r'^#include "(.*)"$', cuda["header"] + cuda["source"], re.MULTILINE)
    assert [Path(path).name for path in included] == ["cuda.h", "common.h", "tile.h", "kv_write.h"]
    assert all(Path(path).is_file() for path in included)
    assert len(cuda["header"]) + len(cuda["source"]) < len(written) / 4


def test_files_whose_path_no_include_can_hold_are_written_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / 'a "quoted" folder'
    folder.mkdir()
    for name in ("cuda", "common", "swiglu"):
        (folder / f"{name}.h").write_text(f"int {name}; // comment\n")
    monkeypatch.setattr(gpu_kernel, "_file", lambda name: folder / f"{name}.h")
    arguments = GpuKernel("swiglu", ("both",), ("output",)).arguments("cuda")
    assert arguments["header"] == "int cuda;\nint common;\n"
    assert arguments["source"].startswith("int swiglu;\n")


def test_another_file_makes_another_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An update may change a file where it lies: what was compiled from it must not be used."""
    monkeypatch.setattr(gpu_kernel, "_file", lambda name: tmp_path / f"{name}.h")
    sources = []
    for value in (1, 2, 2):
        for name in ("cuda", "common", "swiglu"):
            (tmp_path / f"{name}.h").write_text(f"int {name};\n")
        (tmp_path / "common.h").write_text(f"int common = {value};\n")
        sources.append(GpuKernel("swiglu", ("both",), ("output",)).arguments("cuda")["source"])
    assert sources[0] != sources[1] == sources[2]
