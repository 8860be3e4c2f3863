"""The Metal text of a kernel, from MLX itself, and the C++ it becomes.

MLX writes the signature around a kernel body: the order of the buffers, which of them are
`constant`, shapes, thread attributes and the template's instance. It does so without Metal too
while it exports a function, and prints the whole if asked to.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx

from quire.kernels.gpu_kernel import GpuKernel, TemplateValue


class Parameter(NamedTuple):
    """One parameter of the kernel function, such as `const device float* x [[buffer(0)]]`."""

    type: str  # without address space: "const float*"
    name: str
    attribute: str  # "buffer(0)", "thread_index_in_simdgroup"


class MetalText(NamedTuple):
    """A kernel as the Metal compiler would get it."""

    text: str
    function: str  # the template's instance: "custom_kernel_x<float, 4>"
    parameters: tuple[Parameter, ...]


def metal_text(
    kernel: GpuKernel,
    inputs: Sequence[mx.array],
    *,
    template: dict[str, TemplateValue],
    output_dtypes: Sequence[mx.Dtype],
) -> MetalText:
    """The text MLX generates for arrays like ``inputs``.

    It depends on their dtypes, on which have fewer than 8 elements and on which are scalars.
    """

    def launch(*arrays: mx.array) -> list[mx.array]:
        results: list[mx.array] = kernel.metal(
            inputs=list(arrays),
            template=list(template.items()),
            grid=(32, 1, 1),
            threadgroup=(32, 1, 1),
            output_shapes=[(1,)] * len(output_dtypes),
            output_dtypes=list(output_dtypes),
            verbose=True,
        )
        return results

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "exported")
        printed = _standard_output(lambda: mx.export_function(path, launch, *inputs))
    found = re.search(r"^```\n(.*)\n```$", printed, re.DOTALL | re.MULTILINE)
    if found is None:
        raise RuntimeError(f"MLX printed no kernel source but: {printed!r}")
    return parse(found[1])


def parse(text: str) -> MetalText:
    """Find the kernel function, its parameters and its instance in ``text``."""
    signature = re.search(r"\[\[kernel\]\] void (\S+)\(\n(.*?)\) \{\n", text, re.DOTALL)
    if signature is None:
        raise ValueError("no kernel function in the text")
    instance = re.search(r"decltype\((.*)\) .*;\s*$", text)
    parameters = []
    for line in signature[2].split(",\n"):
        parts = re.fullmatch(r"\s*(.*\S)\s+(\w+)\s+\[\[(.+)\]\]\s*", line)
        if parts is None:
            raise ValueError(f"not a parameter: {line!r}")
        type_name = re.sub(r"\b(device|constant)\s+", "", parts[1])
        parameters.append(Parameter(type_name, parts[2], parts[3]))
    return MetalText(text, instance[1] if instance else signature[1], tuple(parameters))


def cpp_text(kernel: MetalText, name: str) -> str:
    """A translation unit that runs one thread of the kernel.

    Threadgroup variables are rewritten: C++ has no storage that the fibers of one threadgroup
    share, so they become references to memory that the simulator hands out and fills. Attributes
    of functions are dropped, since clang++ refuses them at a template's instance. Nothing else
    changes, nor do line numbers.
    """
    text = without_attributes(kernel.text)
    arguments = []
    for parameter in kernel.parameters:
        buffer = re.fullmatch(r"buffer\((\d+)\)", parameter.attribute)
        if buffer is None:
            arguments.append(_ATTRIBUTES[parameter.attribute])
        elif parameter.type.endswith("&"):
            pointer = parameter.type[:-1] + "*"
            arguments.append(f"*static_cast<{pointer}>(buffers[{buffer[1]}])")
        else:
            arguments.append(f"static_cast<{parameter.type}>(buffers[{buffer[1]}])")
    call = ",\n      ".join(arguments)
    return (
        "#include <metal_stdlib>\n"
        f'#line 1 "{name}.metal"\n'
        f"{share_threadgroup_variables(text)}\n"
        f'#line 1 "{name}.call"\n'
        "namespace metal_sim {\n"
        "void run_thread(const Place& place, void* const* buffers) {\n"
        f"  ::{kernel.function}(\n      {call});\n"
        "}\n"
        "} // namespace metal_sim\n"
    )


def _position(field: str) -> str:
    return "uint3{" + ", ".join(field.format(i) for i in range(3)) + "}"


_ATTRIBUTES = {
    "threadgroup_position_in_grid": _position("place.group[{}]"),
    "threadgroups_per_grid": _position("place.groups[{}]"),
    "thread_index_in_threadgroup": "place.thread_index",
    "thread_index_in_simdgroup": "place.thread_index % LANES",
    "simdgroup_index_in_threadgroup": "place.thread_index / LANES",
    "simdgroups_per_threadgroup": "place.threads / LANES",
    "dispatch_simdgroups_per_threadgroup": "place.threads / LANES",
    "threads_per_simdgroup": "LANES",
    "thread_execution_width": "LANES",
    "thread_position_in_threadgroup": "uint3{place.thread_index, 0, 0}",
    "threads_per_threadgroup": "uint3{place.threads, 1, 1}",
    "dispatch_threads_per_threadgroup": "uint3{place.threads, 1, 1}",
    "thread_position_in_grid": (
        "uint3{place.group[0] * place.threads + place.thread_index, place.group[1], place.group[2]}"
    ),
    "threads_per_grid": (
        "uint3{place.groups[0] * place.threads, place.groups[1], place.groups[2]}"
    ),
    "grid_size": "uint3{place.groups[0] * place.threads, place.groups[1], place.groups[2]}",
}


def without_attributes(text: str) -> str:
    """Drop the attributes of functions."""
    return re.sub(r"\[\[(kernel|host_name\(.*?\))\]\] ", "", text)


# Variables only, no pointers and no parameters. SHARED is metal.h's word for Metal's own.
_SHARED = re.compile(
    r"\b(?:SHARED|threadgroup)\s+(?:alignas\s*\([^()]*\)\s*)?"
    r"((?:[^;(){}=*&#\[\]]|\[[^\]]*\])+);"
)


def is_shared_variable(line: str) -> bool:
    """Whether ``line`` declares one in threadgroup memory."""
    return _SHARED.search(line) is not None


def share_threadgroup_variables(text: str) -> str:
    """Make references of threadgroup variables, to memory that `metal_sim::shared` hands out."""
    number = 0

    def rewrite(match: re.Match[str]) -> str:
        nonlocal number
        type_name, replaced = "", ""
        for i, part in enumerate(_split(match[1])):
            leading = r"(.*[\w>])\s+" if i == 0 else "()"
            declared = re.fullmatch(rf"\s*{leading}(\w+)\s*((?:\[.*\])?)\s*", part, re.DOTALL)
            if declared is None:
                raise ValueError(f"cannot read the declaration {match[0]!r}")
            type_name = type_name or declared[1]
            reference = f"metal_sim::shared<{type_name}{declared[3]}>({number})"
            replaced += f"auto& {declared[2]} = {reference};"
            number += 1
        return replaced + "\n" * match[0].count("\n")

    return _SHARED.sub(rewrite, text)


def _split(text: str) -> list[str]:
    """At commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "<([") - (character in ">)]")
        if character == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]]


def _standard_output(function: Callable[[], None]) -> str:
    """What ``function`` prints, C++ code included."""
    sys.stdout.flush()
    saved = os.dup(1)
    with tempfile.TemporaryFile() as printed:
        try:
            os.dup2(printed.fileno(), 1)
            function()
        finally:
            os.dup2(saved, 1)
            os.close(saved)
        printed.seek(0)
        return printed.read().decode()
