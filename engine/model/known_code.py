"""Which of mlx-lm's modules are the ones that we know, by what their forward does.

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
def forward_of(kind: Any) -> str:
    """The statements of a class's ``__call__``, one behind the other; empty if they are not to be
    had."""
    try:
        (function,) = ast.parse(dedent(inspect.getsource(kind.__call__))).body
    except (OSError, SyntaxError, TypeError, ValueError):
        return ""
    return _statements(function.body) if isinstance(function, ast.FunctionDef) else ""


@cache
def normal(code: str) -> str:
    """Statements as :func:`forward_of` gives them."""
    return _statements(ast.parse(dedent(code)).body)


def is_forward(module: Any, *codes: str) -> bool:
    """Whether the module's class does what one of ``codes`` says."""
    kind: Any = type(module)
    return forward_of(kind) in map(normal, codes)


def _statements(body: list[ast.stmt]) -> str:
    return "\n".join(map(ast.unparse, body))
