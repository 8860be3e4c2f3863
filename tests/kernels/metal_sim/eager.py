"""Runs Python code that launches GPU kernels, with every launch simulated on the spot."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from unittest import mock

import mlx.core as mx
import numpy as np

from metal_sim.build import build_all
from metal_sim.run import Mutation, mutated_text, simulate, to_bytes
from metal_sim.text import MetalText
from quire.kernels.gpu_kernel import GpuKernel, TemplateValue

Mutations = Mapping[str, Mutation]


@contextmanager
def simulated_kernels(mutations: Mutations | None = None, orders: int = 3) -> Iterator[None]:
    """Within it every launch of a :class:`GpuKernel` runs at once in the simulator.

    What a kernel writes into its inputs is written into the very arrays it was given, as on a GPU.

    Args:
        mutations: by kernel name, changes to the text; each kernel named must be launched.
        orders: see :func:`metal_sim.simulate`.
    """
    unused = set(mutations or {})

    def launch(
        self: GpuKernel,
        inputs: Sequence[mx.array],
        *,
        template: dict[str, TemplateValue],
        groups: tuple[int, int, int],
        threads: int,
        output_shapes: Sequence[tuple[int, ...]],
        output_dtypes: Sequence[mx.Dtype],
    ) -> list[mx.array]:
        unused.discard(self.name)
        result = simulate(
            self,
            inputs,
            template=template,
            groups=groups,
            threads=threads,
            output_shapes=output_shapes,
            output_dtypes=output_dtypes,
            orders=orders,
            mutate=(mutations or {}).get(self.name),
        )
        for array, after in zip(inputs, result.inputs, strict=True):
            _overwrite(array, after)
        return result.outputs

    with _in_place_of_launches(launch):
        yield
    if unused:
        raise ValueError(f"no launch of {', '.join(sorted(unused))}, which was to be changed")


@contextmanager
def compiled_ahead(mutations: Mutations | None = None) -> Iterator[None]:
    """Within it kernels return zeros; at its end all texts they would run are compiled.

    Compiling takes seconds each: run many cases in here first, and all cores share the work.
    """
    with collected_texts(mutations) as texts:
        yield
    build_all(texts)


@contextmanager
def collected_texts(mutations: Mutations | None = None) -> Iterator[list[tuple[MetalText, str]]]:
    """Within it kernels return zeros, and their texts with their names go into the list."""
    texts: list[tuple[MetalText, str]] = []

    def launch(
        self: GpuKernel,
        inputs: Sequence[mx.array],
        *,
        template: dict[str, TemplateValue],
        groups: tuple[int, int, int],
        threads: int,
        output_shapes: Sequence[tuple[int, ...]],
        output_dtypes: Sequence[mx.Dtype],
    ) -> list[mx.array]:
        mutate = (mutations or {}).get(self.name)
        text = mutated_text(
            self, inputs, template=template, output_dtypes=output_dtypes, mutate=mutate
        )
        texts.append((text, self.name))
        return [
            mx.zeros(shape, dtype)
            for shape, dtype in zip(output_shapes, output_dtypes, strict=True)
        ]

    with _in_place_of_launches(launch):
        yield texts


@contextmanager
def lazy_kernels() -> Iterator[None]:
    """Within it kernels return zeros that are there once all of their inputs are."""

    def launch(
        self: GpuKernel,
        inputs: Sequence[mx.array],
        *,
        template: dict[str, TemplateValue],
        groups: tuple[int, int, int],
        threads: int,
        output_shapes: Sequence[tuple[int, ...]],
        output_dtypes: Sequence[mx.Dtype],
    ) -> list[mx.array]:
        zeros = [mx.zeros(s, d) for s, d in zip(output_shapes, output_dtypes, strict=True)]
        outputs: list[mx.array] = mx.depends(zeros, list(inputs))
        return outputs

    with _in_place_of_launches(launch):
        yield


@contextmanager
def launches_by(note: Callable[..., None]) -> Iterator[None]:
    """Within it kernels return zeros, and ``note`` is called with what tells texts apart."""

    def launch(
        self: GpuKernel,
        inputs: Sequence[mx.array],
        *,
        template: dict[str, TemplateValue],
        groups: tuple[int, int, int],
        threads: int,
        output_shapes: Sequence[tuple[int, ...]],
        output_dtypes: Sequence[mx.Dtype],
    ) -> list[mx.array]:
        note(self, inputs, template=template, output_dtypes=output_dtypes)
        pairs = zip(output_shapes, output_dtypes, strict=True)
        return [mx.zeros(shape, dtype) for shape, dtype in pairs]

    with _in_place_of_launches(launch):
        yield


@contextmanager
def _in_place_of_launches(launch: Callable[..., list[mx.array]]) -> Iterator[None]:
    """Within it ``launch`` gets arrays: compiled functions would trace it and not call it again."""
    mx.disable_compile()
    try:
        with mock.patch.object(GpuKernel, "launch", launch):
            yield
    finally:
        mx.enable_compile()


def _overwrite(array: mx.array, values: mx.array) -> None:
    """Write into the memory of ``array``, as a kernel does behind MLX's back."""
    new = to_bytes(values)
    if to_bytes(array) == new:
        return
    flat = array.reshape(-1).view(mx.uint8)  # shares the memory if the array is contiguous
    mx.eval(flat)
    np.array(flat, copy=False)[:] = np.frombuffer(new, np.uint8)
    if to_bytes(array) != new:
        raise RuntimeError("MLX copied an array that a kernel writes into")
