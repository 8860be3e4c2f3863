"""One kernel text for Metal and CUDA.

`source/NAME.h` is a body in the common subset of both languages. In front of it go a prelude that
names the few things they say differently, and helpers both understand.

MLX hashes the whole text at every launch, 2 us for a long one. So what only some kernels need
stands in headers that these name, and on CUDA, whose compiler reads files, the text is only their
names, with a hash of what is in them: MLX knows compiled kernels by their texts.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, cached_property
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np

TemplateValue = int | bool | mx.Dtype

# Of one kernel. Prompts have many lengths, so there is an end.
_MAX_LAUNCHES = 4096
_DIGEST_LENGTH = 16


Note = Callable[
    ["GpuKernel", Sequence[mx.array], dict[str, TemplateValue], Sequence[mx.Dtype]], None
]
_noted: Note | None = None


@contextmanager
def not_run_but_noted(note: Note) -> Iterator[None]:
    """Context manager: within it, kernels return zeros, and ``note`` is called with each launch:
    the kernel, its inputs, its template and the types of its outputs."""
    global _noted
    _noted = note
    try:
        yield
    finally:
        _noted = None


class GpuKernel:
    """A custom kernel that runs on whichever GPU this machine has.

    Args:
        name: of `source/NAME.h`.
        inputs: names of the arrays it reads; a text that mentions `x_shape` is given x's shape.
        outputs: names of the arrays it fills.
        headers: what stands before it beside `common.h`: each is `source/HEADER.h`, or two files,
            `metal_HEADER.h` and `cuda_HEADER.h`, where the languages differ.
    """

    def __init__(
        self,
        name: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        headers: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.headers = tuple(headers)
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self._launches: dict[tuple[object, ...], Callable[..., Any]] = {}

    def __call__(
        self,
        inputs: Sequence[mx.array | None],
        *,
        template: dict[str, TemplateValue],
        groups: tuple[int, int, int],
        threads: int,
        output_shapes: Sequence[tuple[int, ...]],
        output_dtypes: Sequence[mx.Dtype],
    ) -> list[mx.array]:
        """Run over ``groups`` threadgroups of ``threads`` threads each.

        An input of None is one that the kernel does not read under this ``template``. Arrays that
        are not row-contiguous are copied first. Outputs start uninitialised.
        """
        return self.launch(
            [_nothing() if array is None else array for array in inputs],
            template=template,
            groups=groups,
            threads=threads,
            output_shapes=output_shapes,
            output_dtypes=output_dtypes,
        )

    def launch(
        self,
        inputs: Sequence[mx.array],
        *,
        template: dict[str, TemplateValue],
        groups: tuple[int, int, int],
        threads: int,
        output_shapes: Sequence[tuple[int, ...]],
        output_dtypes: Sequence[mx.Dtype],
    ) -> list[mx.array]:
        """The same with all inputs there."""
        if _noted is not None:
            _noted(self, inputs, template, output_dtypes)
            shapes = zip(output_shapes, output_dtypes, strict=True)
            return [mx.zeros(shape, dtype) for shape, dtype in shapes]
        key = (
            tuple(template.items()),
            groups,
            threads,
            tuple(output_shapes),
            tuple(output_dtypes),
        )
        launch = self._launches.get(key)
        if launch is None:
            if len(self._launches) == _MAX_LAUNCHES:
                self._launches.clear()
            launch = self._launches[key] = self._make_launch(*key)
        results: list[mx.array] = launch(*inputs)
        return results

    def _make_launch(
        self,
        template: tuple[tuple[str, TemplateValue], ...],
        groups: tuple[int, int, int],
        threads: int,
        output_shapes: tuple[tuple[int, ...], ...],
        output_dtypes: tuple[mx.Dtype, ...],
    ) -> Callable[..., Any]:
        """A compiled function of the inputs: for inputs of the same shapes and types MLX puts the
        kernel's text together only once."""
        kernel = self.metal if mx.metal.is_available() else self.cuda
        x, y, z = groups

        def launch(*inputs: mx.array) -> Any:
            return kernel(
                inputs=list(inputs),
                template=list(template),
                grid=(x * threads, y, z),
                threadgroup=(threads, 1, 1),
                output_shapes=list(output_shapes),
                output_dtypes=list(output_dtypes),
            )

        compiled: Callable[..., Any] = mx.compile(launch)
        return compiled

    @cached_property
    def metal(self) -> Callable[..., Any]:
        """The kernel as :func:`mx.fast.metal_kernel` takes it."""
        kernel: Any = mx.fast.metal_kernel(**self.arguments("metal"))
        return cast(Callable[..., Any], kernel)

    @cached_property
    def cuda(self) -> Callable[..., Any]:
        """The kernel as :func:`mx.fast.cuda_kernel` takes it."""
        kernel: Any = mx.fast.cuda_kernel(**self.arguments("cuda"))
        return cast(Callable[..., Any], kernel)

    def header_names(self, prelude: str) -> list[str]:
        """The files that stand before the kernel on ``prelude``, "metal" or "cuda"."""
        names = [prelude, "common"]
        for name in self.headers:
            own = f"{prelude}_{name}"
            names.append(own if _file(own).is_file() else name)
        return names

    def arguments(self, prelude: str) -> dict[str, Any]:
        """What MLX makes the kernel of, on ``prelude``, "metal" or "cuda"."""
        names = self.header_names(prelude)
        header, body = "".join(map(_text, names)), _text(self.name)
        if prelude == "cuda":
            # MLX passes the shapes whose names it finds.
            shapes = [f"{name}_shape" for name in self.inputs if f"{name}_shape" in body]
            digest = hashlib.sha256((header + body).encode()).hexdigest()[:_DIGEST_LENGTH]
            header = "".join(map(_include, names))
            body = _include(self.name) + f"// {shapes} {digest}\n"
        return {
            "name": self.name,
            "input_names": self.inputs,
            "output_names": self.outputs,
            "header": header,
            "source": body,
        }


@cache
def _nothing() -> mx.array:
    """Stands for an input that is not read; of a size that Metal treats as any other."""
    return mx.array(np.zeros(16, np.float32))


def _file(name: str) -> Traversable:
    return resources.files("quire.kernels").joinpath("source", f"{name}.h")


def float_bits(value: float) -> int:
    """A float32 as the integer of the same bits: kernels take floats as template arguments so.

    An array of one or two floats would lie in memory that host and GPU take turns to own on CUDA,
    and cost a launch 10 us and more.
    """
    bits: int = struct.unpack("<i", struct.pack("<f", value))[0]
    return bits


def _include(name: str) -> str:
    """A line that stands for a source file, if it is one that a compiler can read."""
    path = _file(name)
    readable = isinstance(path, Path) and not re.search(r'["\\\n]', str(path))
    return f'#include "{path}"\n' if readable else _text(name)


def _text(name: str) -> str:
    """A source file without comments, indents and empty lines."""
    lines = (re.sub(r"\s*//.*", "", line) for line in _file(name).read_text().splitlines())
    return "\n".join(line.strip() for line in lines if line.strip()) + "\n"
