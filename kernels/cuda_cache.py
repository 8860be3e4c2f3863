"""CUDA kernels compiled side by side, and kept on disk where MLX looks for them.

MLX compiles a custom kernel when it is first run, one after another, each with headers that take
longer than the kernel, and forgets it with the process. Before it compiles, though, it looks into
the folder `MLX_PTX_CACHE_DIR` for a file named after the kernel and the hash of its text. Here the
same kernels are compiled on all processors, without those headers, and put there under that name.
Where MLX's name or text is another one than expected here, it finds nothing and compiles by itself.

What MLX does is as of 0.32 (mlx/backend/cuda/custom_kernel.cpp and jit_module.cpp).
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from quire.kernels.cache_folder import FOLDER_VARIABLE
from quire.kernels.gpu_kernel import GpuKernel, TemplateValue, not_run_but_noted
from quire.kernels.nvrtc import CompileError, compile_text

logger = logging.getLogger("quire.kernels")

Compile = Callable[[str], bytes]

_TYPES = {
    mx.bool_: "bool", mx.int8: "int8_t", mx.int16: "int16_t", mx.int32: "int32_t",
    mx.int64: "int64_t", mx.uint8: "uint8_t", mx.uint16: "uint16_t", mx.uint32: "uint32_t",
    mx.uint64: "uint64_t", mx.float16: "__half", mx.bfloat16: "__nv_bfloat16", mx.float32: "float",
}  # fmt: skip
_NAMES = {mx.float16: "float16_t", mx.bfloat16: "bfloat16_t"}  # in a function's name
_MLX_HEADER = """
#include "mlx/backend/cuda/device/utils.cuh"

#include <cooperative_groups.h>

"""
# What a kernel needs of that header; a shape has room for ten dimensions.
_OWN_HEADER = """
#include <cuda_bf16.h>
#include <cuda_fp16.h>
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
struct Shape {
  int sizes[10];
  __device__ int operator[](int i) const { return sizes[i]; }
};
"""
_HASH_SEED = 0xC70F6907  # of libstdc++'s std::hash
_LONGEST_NAME = 245  # of a file that MLX makes of a module's name


@dataclass(frozen=True)
class Program:
    """One text of a kernel.

    Attributes:
        function: what MLX calls it.
        mlx_text: what MLX would compile.
        text: the same with headers of our own.
    """

    function: str
    mlx_text: str
    text: str

    @classmethod
    def of(
        cls,
        kernel: GpuKernel,
        inputs: Sequence[mx.array],
        template: dict[str, TemplateValue],
        output_dtypes: Sequence[mx.Dtype],
    ) -> Program:
        arguments = kernel.arguments("cuda")
        header, body = arguments["header"], arguments["source"]
        function = f"custom_kernel_{kernel.name}"
        constants = ""
        for name, value in template.items():
            function += "_" + _in_name(value)
            constants += _constant(name, value)
        parameters = []
        for name, array in zip(kernel.inputs, inputs, strict=True):
            parameters.append(f"    const {_TYPES[array.dtype]}* {name}")
            if array.ndim and f"{name}_shape" in body:
                parameters.append(f"    const __grid_constant__ Shape {name}_shape")
        for name, dtype in zip(kernel.outputs, output_dtypes, strict=True):
            parameters.append(f"    {_TYPES[dtype]}* {name}")
        signature = f"__global__ void {function}(\n" + ",\n".join(parameters) + ") {\n"
        definition = signature + constants + ("\n" if template else "") + body + "\n}\n\n"
        space, end = "namespace mlx::core::cu {\n\n", "} // namespace mlx::core::cu\n"
        groups = "namespace cg = cooperative_groups;\n\n"
        return cls(
            function,
            _MLX_HEADER + header + space + groups + definition + end,
            _OWN_HEADER + header + space + 'extern "C" ' + definition + end,
        )

    @property
    def module(self) -> str:
        """What MLX calls the compiled text."""
        return f"{self.function}_{_std_hash(self.mlx_text.encode()):x}"

    def path(self, folder: Path) -> Path:
        """Where MLX looks for it."""
        name = self.module
        while len(name) > _LONGEST_NAME:
            folder, name = folder / name[:_LONGEST_NAME], name[_LONGEST_NAME:]
        return folder / f"{name}.ptx"


class KernelCache:
    """Compiled programs in a folder."""

    def __init__(self, folder: Path, compile_program: Compile, threads: int) -> None:
        self._folder = folder
        self._compile = compile_program
        self._threads = ThreadPoolExecutor(threads, "nvrtc")
        self._jobs: dict[str, Future[None]] = {}
        self._seen: set[tuple[object, ...]] = set()

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Context manager: within it, kernels do not run and give zeros, and those that the folder
        lacks are compiled; at its end the folder has all of them."""
        # A graph that is compiled now would give zeros for ever.
        mx.disable_compile()
        try:
            with not_run_but_noted(self._note):
                yield
        finally:
            mx.enable_compile()
        for job in self._jobs.values():
            job.result()

    def _note(
        self,
        kernel: GpuKernel,
        inputs: Sequence[mx.array],
        template: dict[str, TemplateValue],
        output_dtypes: Sequence[mx.Dtype],
    ) -> None:
        kinds = tuple((array.dtype, array.ndim) for array in inputs)
        key = kernel.name, tuple(template.items()), kinds, tuple(output_dtypes)
        if key not in self._seen:  # a text takes longer to put together than to look up
            self._seen.add(key)
            self.add(Program.of(kernel, inputs, template, output_dtypes))

    def add(self, program: Program) -> None:
        """Have ``program`` compiled, unless it is there."""
        module = program.module
        if module not in self._jobs and not os.path.exists(program.path(self._folder)):
            self._jobs[module] = self._threads.submit(self._make, program)

    def _make(self, program: Program) -> None:
        """Without a compiler, or a folder that can be written, MLX compiles by itself; and it says
        what it thinks of a kernel where that is heard."""
        try:
            self._keep(program, self._compile(program.text))
        except (OSError, CompileError) as error:
            logger.warning("%s is left to MLX: %s", program.function, error)

    def _keep(self, program: Program, cubin: bytes) -> None:
        path = program.path(self._folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        names = f"mlx::core::cu::{program.function}\t{program.function}\n"
        # MLX goes by the .ptx, which therefore comes last.
        for suffix, content in ((".txt", names.encode()), (".ptx", cubin)):
            part = path.with_suffix(f".{os.getpid()}.part")
            part.write_bytes(content)
            part.replace(path.with_suffix(suffix))


def open_cache() -> KernelCache | None:
    """The folder that MLX was told of before it was imported; None where there is none."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder is None or not mx.cuda.is_available():
        return None
    info = mx.device_info(mx.Device(mx.gpu))
    major, minor = info["compute_capability_major"], info["compute_capability_minor"]
    options = [
        f"--gpu-architecture=sm_{major}{minor}{'a' if int(major) >= 9 else ''}",
        "--device-as-default-execution-space",
        f"--include-path={_cuda_headers()}",
    ]
    threads = max(1, (os.cpu_count() or 2) - 1)
    return KernelCache(Path(folder), lambda text: compile_text(text, options), threads)


def _cuda_headers() -> Path:
    """The folder where MLX finds those of the CUDA runtime."""
    packaged = Path(mx.__file__).parents[1] / "nvidia" / "cu13" / "include"
    if packaged.exists():
        return packaged
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return Path(home) / "include"


def _in_name(value: TemplateValue) -> str:
    if isinstance(value, bool):
        return "t" if value else "f"
    return str(value) if isinstance(value, int) else _NAMES.get(value, _TYPES[value])


def _constant(name: str, value: TemplateValue) -> str:
    if isinstance(value, bool):
        return f"  constexpr bool {name} = {'true' if value else 'false'};\n"
    if isinstance(value, int):
        return f"  constexpr int {name} = {value};\n"
    return f"  using {name} = {_TYPES[value]};\n"


def _std_hash(text: bytes) -> int:
    """`std::hash<std::string>` of the C++ library that MLX uses."""
    function = ctypes.CDLL("libstdc++.so.6")._ZSt11_Hash_bytesPKvmm
    function.restype = ctypes.c_size_t
    function.argtypes = ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t
    hashed: int = function(text, len(text), _HASH_SEED)
    return hashed
