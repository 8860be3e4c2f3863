"""Which of mlx-lm's modules are the ones that we know, by what their forward does, and how they
become others.

A name says little: another version may do something else under it. Comments and layout do not
count.
"""

from __future__ import annotations

import ast
import inspect
from functools import cache
from textwrap import dedent
from typing import Any


@cache
def code_of(function: Any) -> str:
    """A function's decorators, arguments and statements; empty if they are not to be had."""
    try:
        (found,) = ast.parse(dedent(inspect.getsource(function))).body
    except (OSError, SyntaxError, TypeError, ValueError):
        return ""
    if not isinstance(found, ast.FunctionDef):
        return ""
    arguments = ", ".join(argument.arg for argument in found.args.args if argument.arg != "self")
    return "".join(map(ast.unparse, found.decorator_list)) + _normal(arguments, found.body)


@cache
def known(arguments: str, code: str) -> str:
    """A function of these, without decorators, as :func:`code_of` gives it."""
    return _normal(arguments, ast.parse(dedent(code)).body)


def is_forward(module: Any, arguments: str, *codes: str) -> bool:
    """Whether the module's class does what one of ``codes`` says."""
    found = code_of(type(module).__call__)
    return any(found == known(arguments, code) for code in codes)


@cache
def mixed(mixin: Any, kind: Any) -> Any:
    """The class of a module of ``kind``, with ``mixin`` in front of it."""
    return type(kind.__name__, (mixin, kind), {})


def _normal(arguments: str, body: list[ast.stmt]) -> str:
    return "\n".join([arguments, *map(ast.unparse, body)])
