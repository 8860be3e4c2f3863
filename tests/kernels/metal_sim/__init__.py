"""Metal kernels on the CPU: the exact Metal text compiled as C++ and run thread by thread."""

from metal_sim.build import CompileError, build_all
from metal_sim.eager import (
    collected_texts,
    compiled_ahead,
    lazy_kernels,
    simulated_kernels,
)
from metal_sim.run import KernelFault, Mutation, Simulated, changed, simulate
from metal_sim.text import MetalText, metal_text

__all__ = [
    "CompileError",
    "KernelFault",
    "MetalText",
    "Mutation",
    "Simulated",
    "build_all",
    "changed",
    "collected_texts",
    "compiled_ahead",
    "lazy_kernels",
    "metal_text",
    "simulate",
    "simulated_kernels",
]
