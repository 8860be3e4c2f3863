"""A Metal text as clang's OpenCL C++ sees it, whose rules are in part those of Metal.

It has the same address spaces under other names, and the same rules for them: no cast leads from
`constant` to `device` or from `threadgroup` to `thread`, and variables in threadgroup memory have
no initialiser. Functions have no pointers to them, and there is no `double`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from clang.cindex import Cursor, Diagnostic, Index, TranslationUnit

from metal_sim.build import SHIM
from metal_sim.text import MetalText, share_threadgroup_variables, without_attributes

_ARGUMENTS = ["-x", "cl", "-cl-std=CLC++2021", "-cl-no-stdinc", "-Wno-everything"]
_ARGUMENTS += ["-Werror=zero-length-array"]
# OpenCL C++ puts program-scope variables into global memory where Metal wants `constant`. Without
# that feature clang refuses them with the message of Apple's compiler. Device-side enqueue needs
# the feature, so both go, and so does `double`.
_WITHOUT = ("__opencl_c_program_scope_global_variables", "__opencl_c_device_enqueue")
_WITHOUT += ("cl_khr_fp64", "__opencl_c_fp64")
_ARGUMENTS += ["-Xclang", "-cl-ext=" + ",".join(f"-{name}" for name in _WITHOUT)]
# metal_stdlib is declared in the shim's opencl.h as far as kernels need it.
_BEFORE = (SHIM / "opencl.h").read_text()


@dataclass(frozen=True)
class Parsed:
    """The syntax tree of a text, without what stands in front of it, and what is wrong with it."""

    text: MetalText
    unit: TranslationUnit
    errors: list[str]

    def line(self, number: int) -> str:
        """The text's own line for a line of the translation unit."""
        lines = self.text.text.splitlines()
        number -= _BEFORE.count("\n")
        return lines[number - 1].strip() if 0 < number <= len(lines) else f"line {number}"

    def is_own(self, cursor: Cursor) -> bool:
        """Whether the text has it, and not what stands in front."""
        return int(cursor.location.line) > _BEFORE.count("\n")


def parse_as_opencl(text: MetalText, after: str = "") -> Parsed:
    """``after`` is put in front of the kernel's last brace."""
    body = re.sub(r"^#include <metal_.*>$", "", without_attributes(text.text), flags=re.MULTILINE)
    body = share_threadgroup_variables(body)
    if after:
        end = body.rindex("}")
        body = body[:end] + after + body[end:]
    source = _BEFORE + body
    unit = Index.create().parse("kernel.cl", _ARGUMENTS, unsaved_files=[("kernel.cl", source)])
    parsed = Parsed(text, unit, [])
    for diagnostic in unit.diagnostics:
        if diagnostic.severity >= Diagnostic.Error:
            where = parsed.line(diagnostic.location.line)
            parsed.errors.append(f"{diagnostic.spelling}: {where}")
    return parsed


def address_space_errors(text: MetalText) -> list[str]:
    """What clang finds wrong with ``text`` as OpenCL C++, each with its line."""
    return parse_as_opencl(text).errors
