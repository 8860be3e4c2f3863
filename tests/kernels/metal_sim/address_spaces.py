"""Checks that a Metal text keeps its address spaces apart, which C++ does not have.

clang's OpenCL C++ has the same ones under other names, and the same rules for them: no cast leads
from `constant` to `device` or from `threadgroup` to `thread`, and variables in threadgroup memory
have no initialiser. What Metal is stricter in goes unnoticed: a pointer parameter without any
address space.
"""

from __future__ import annotations

import re

from clang.cindex import Diagnostic, Index

from metal_sim.build import SHIM
from metal_sim.text import MetalText, share_threadgroup_variables, without_attributes

_ARGUMENTS = ["-x", "cl", "-cl-std=CLC++2021", "-cl-no-stdinc", "-Wno-everything"]
# OpenCL C++ puts program-scope variables into global memory where Metal wants `constant`. Without
# that feature clang refuses them with the message of Apple's compiler. Device-side enqueue needs
# the feature, so both go.
_WITHOUT_GLOBALS = "-cl-ext=-__opencl_c_program_scope_global_variables,-__opencl_c_device_enqueue"
_ARGUMENTS += ["-Xclang", _WITHOUT_GLOBALS]


def address_space_errors(text: MetalText) -> list[str]:
    """What clang finds wrong with ``text`` as OpenCL C++, each with its line."""
    # metal_stdlib is declared in the shim's opencl.h as far as kernels need it.
    body = re.sub(r"^#include <metal_.*>$", "", without_attributes(text.text), flags=re.MULTILINE)
    before = (SHIM / "opencl.h").read_text()
    source = before + share_threadgroup_variables(body)
    unit = Index.create().parse("kernel.cl", _ARGUMENTS, unsaved_files=[("kernel.cl", source)])
    lines = text.text.splitlines()
    found = []
    for diagnostic in unit.diagnostics:
        if diagnostic.severity >= Diagnostic.Error:
            line = diagnostic.location.line - before.count("\n")
            where = lines[line - 1] if 0 < line <= len(lines) else f"line {line}"
            found.append(f"{diagnostic.spelling}: {where}")
    return found
