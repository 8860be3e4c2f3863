"""Runs GPU kernels on the CPU, from the text that the Metal compiler would get."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from metal_sim.build import build
from metal_sim.text import MetalText, metal_text, parse
from quire.kernels.gpu_kernel import GpuKernel, TemplateValue

Array = mx.array | npt.NDArray[np.generic]
Mutation = Callable[[str], str]


def changed(old: str, new: str) -> Mutation:
    """Replace ``old``, which the text has once."""

    def mutate(text: str) -> str:
        if text.count(old) != 1:
            raise ValueError(f"the text has {old!r} {text.count(old)} times: update the mutant")
        return text.replace(old, new)

    return mutate


_TIME_LIMIT = 120  # seconds; a kernel that loops for ever is an error too


class KernelFault(RuntimeError):
    """The kernel did what it must not: the message says what, and shows the line."""


class Simulated(NamedTuple):
    """Arrays after the run."""

    outputs: list[mx.array]
    inputs: list[mx.array]  # some kernels write into them


def simulate(
    kernel: GpuKernel,
    inputs: Sequence[Array],
    *,
    template: dict[str, TemplateValue],
    groups: tuple[int, int, int],
    threads: int,
    output_shapes: Sequence[tuple[int, ...]],
    output_dtypes: Sequence[mx.Dtype],
    orders: int = 3,
    mutate: Mutation | None = None,
) -> Simulated:
    """What :meth:`GpuKernel.__call__` does with the same arguments, for Metal and without it.

    The text is compiled as C++ with AddressSanitizer and UBSan. Outputs start as bytes of 0xff, and
    so does threadgroup memory.

    Args:
        orders: in how many orders the threads run, each until it waits for others: forward,
            backward, then random ones.
        mutate: changes the text before it is compiled.

    Raises:
        KernelFault: an address outside of an array, undefined behaviour, threads that wait for
            others which never come, or results that depend on the order of the threads.
    """
    arrays = [each if isinstance(each, mx.array) else mx.array(each) for each in inputs]
    text = mutated_text(
        kernel, arrays, template=template, output_dtypes=output_dtypes, mutate=mutate
    )
    contents: dict[str, bytes] = {}
    for name, array in zip(kernel.inputs, arrays, strict=True):
        contents[name] = to_bytes(array)
        contents[f"{name}_shape"] = np.array(array.shape, np.int32).tobytes()
        strides = np.cumprod([1, *array.shape[:0:-1]])[::-1]
        contents[f"{name}_strides"] = strides.astype(np.int64).tobytes()
        contents[f"{name}_ndim"] = np.int32(array.ndim).tobytes()
    for name, shape, dtype in zip(kernel.outputs, output_shapes, output_dtypes, strict=True):
        contents[name] = b"\xff" * (int(np.prod(shape)) * dtype.size)
    after = _run(build(text, kernel.name), kernel.name, text, contents, groups, threads, orders)
    return Simulated(
        [
            from_bytes(after[name], shape, dtype)
            for name, shape, dtype in zip(kernel.outputs, output_shapes, output_dtypes, strict=True)
        ],
        [
            from_bytes(after[name], array.shape, array.dtype)
            for name, array in zip(kernel.inputs, arrays, strict=True)
        ],
    )


def mutated_text(
    kernel: GpuKernel,
    inputs: Sequence[mx.array],
    *,
    template: dict[str, TemplateValue],
    output_dtypes: Sequence[mx.Dtype],
    mutate: Mutation | None,
) -> MetalText:
    """:func:`metal_text`, changed by ``mutate``, which must change something."""
    text = metal_text(kernel, inputs, template=template, output_dtypes=output_dtypes)
    if mutate is None:
        return text
    changed = mutate(text.text)
    if changed == text.text:
        raise ValueError(f"the mutation does not change the text of {kernel.name}")
    return parse(changed)


def _run(
    executable: Path,
    name: str,
    text: MetalText,
    contents: dict[str, bytes],
    groups: tuple[int, int, int],
    threads: int,
    orders: int,
) -> dict[str, bytes]:
    buffers = [p.name for p in text.parameters if p.attribute.startswith("buffer(")]
    sizes = [threads, orders, len(buffers)]
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{i}.bin") for i in range(len(buffers))]
        for buffer, path in zip(buffers, paths, strict=True):
            path.write_bytes(contents[buffer])
        # Fibers keep pointers where the leak check does not look.
        environment = os.environ | {
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
        try:
            run = subprocess.run(
                [executable, folder, *map(str, (*groups, *sizes))],
                env=environment,
                capture_output=True,
                text=True,
                timeout=_TIME_LIMIT,
            )
        except subprocess.TimeoutExpired:
            raise KernelFault(f"{name} did not end in {_TIME_LIMIT} s") from None
        if run.returncode != 0:
            raise KernelFault(_explain(run.stderr or f"exit code {run.returncode}", name, text))
        return {b: path.read_bytes() for b, path in zip(buffers, paths, strict=True)}


def _explain(message: str, name: str, text: MetalText) -> str:
    """Append the lines of the text that ``message`` names."""
    lines = text.text.splitlines()
    buffers = {p.attribute[len("buffer(") : -1]: p.name for p in text.parameters}
    message = re.sub(r"\bbuffer (\d+)", lambda match: buffers[match[1]], message)
    named = re.findall(rf"\b{name}\.metal:(\d+)|\bline (\d+)", message)
    numbers = dict.fromkeys(int(a or b) for a, b in named)
    shown = [f"{n}: {lines[n - 1]}" for n in numbers if 0 < n <= len(lines)]
    return "\n".join([f"{name}: {message}", *shown])


def to_bytes(array: mx.array) -> bytes:
    """Its elements in row-major order."""
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    return np.array(array).tobytes()


def from_bytes(data: bytes, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """The array whose :func:`to_bytes` is ``data``."""
    storage = np.dtype("uint16" if dtype == mx.bfloat16 else str(dtype).removeprefix("mlx.core."))
    array = mx.array(np.frombuffer(data, storage).reshape(shape))
    return array.view(dtype) if dtype == mx.bfloat16 else array
