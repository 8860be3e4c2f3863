"""Calls that all lanes of a simdgroup must make together, in control flow that lanes differ in.

What depends on the lane is found by following names: a variable does if its initialiser or
anything assigned to it mentions one that does, a parameter if any call passes one. Sums and votes
over a simdgroup are the same in all lanes. The simulator sees the same while a kernel runs, in the
branches that its inputs lead to; here all are seen.
"""

from __future__ import annotations

from collections.abc import Iterator

from clang.cindex import Cursor, CursorKind

from metal_sim.address_spaces import Parsed

TOGETHER = {
    "simd_shuffle",
    "simd_shuffle_xor",
    "simd_any",
    "simdgroup_multiply_accumulate",
    "threadgroup_barrier",
}
_LANES = {
    "thread_index_in_simdgroup",
    "thread_index_in_threadgroup",
    "thread_position_in_threadgroup",
    "thread_position_in_grid",
}
_SAME_IN_ALL = {"simd_any", "any", "simd_sum", "simd_max"}
_FUNCTIONS = {CursorKind.FUNCTION_DECL, CursorKind.FUNCTION_TEMPLATE, CursorKind.CXX_METHOD}
_BRANCHES = {
    CursorKind.IF_STMT,
    CursorKind.WHILE_STMT,
    CursorKind.DO_STMT,
    CursorKind.FOR_STMT,
    CursorKind.CONDITIONAL_OPERATOR,
    CursorKind.SWITCH_STMT,
}
_ASSIGNMENTS = {CursorKind.BINARY_OPERATOR, CursorKind.COMPOUND_ASSIGNMENT_OPERATOR}


def divergent_calls(parsed: Parsed) -> list[str]:
    functions = [
        cursor
        for top in parsed.unit.cursor.get_children()
        if parsed.is_own(top)
        for cursor in top.walk_preorder()
        if cursor.kind in _FUNCTIONS and cursor.is_definition()
    ]
    together = _callers(functions)
    varying = _varying(functions)
    found = []
    for function in functions:
        for line, name in _under_branches(function, varying, together):
            found.append(f"{name} where lanes may differ: {parsed.line(line)}")
    return found


def _name(call: Cursor) -> str:
    """What a call calls, as far as it is known."""
    if call.spelling:
        return str(call.spelling)
    for cursor in call.walk_preorder():
        if cursor.kind in (CursorKind.OVERLOADED_DECL_REF, CursorKind.DECL_REF_EXPR):
            return str(cursor.spelling)
        if cursor.kind is CursorKind.MEMBER_REF_EXPR and cursor.spelling:
            return str(cursor.spelling)
    return ""


def _callers(functions: list[Cursor]) -> set[str]:
    """Names of functions in which lanes must go together."""
    together = set(TOGETHER)
    before = 0
    while len(together) != before:
        before = len(together)
        for function in functions:
            names = {_name(c) for c in function.walk_preorder() if c.kind is CursorKind.CALL_EXPR}
            if names & together:
                together.add(function.spelling)
    return together


Place = tuple[int, int]  # line and column of a declaration


def _place(cursor: Cursor) -> Place:
    return cursor.location.line, cursor.location.column


def _varying(functions: list[Cursor]) -> set[Place]:
    """What is declared and may differ between lanes."""
    parameters = {
        f.spelling: [c for c in f.get_children() if c.kind is CursorKind.PARM_DECL]
        for f in functions
    }
    varying = {
        _place(parameter)
        for each in parameters.values()
        for parameter in each
        if parameter.spelling in _LANES
    }
    before = -1
    while len(varying) != before:
        before = len(varying)
        for cursor in (cursor for function in functions for cursor in function.walk_preorder()):
            children = list(cursor.get_children())
            if cursor.kind is CursorKind.VAR_DECL:
                if any(_differs(child, varying) for child in children):
                    varying.add(_place(cursor))
            elif cursor.kind in _ASSIGNMENTS and len(children) == 2:
                target = children[0]
                is_name = target.kind is CursorKind.DECL_REF_EXPR and target.referenced is not None
                if is_name and _is_assignment(cursor) and _differs(children[1], varying):
                    varying.add(_place(target.referenced))
            elif cursor.kind is CursorKind.CALL_EXPR:
                taken = parameters.get(_name(cursor), [])
                for parameter, argument in zip(taken, cursor.get_arguments(), strict=False):
                    if argument is not None and _differs(argument, varying):
                        varying.add(_place(parameter))
    return varying


def _is_assignment(cursor: Cursor) -> bool:
    if cursor.kind is CursorKind.COMPOUND_ASSIGNMENT_OPERATOR:
        return True
    first = next(cursor.get_children())
    length = len(list(first.get_tokens()))
    tokens = [token.spelling for token in cursor.get_tokens()]
    return len(tokens) > length and tokens[length] == "="


def _differs(cursor: Cursor, varying: set[Place]) -> bool:
    """Whether an expression may differ between lanes."""
    if cursor.kind is CursorKind.CALL_EXPR and _name(cursor) in _SAME_IN_ALL:
        return False
    is_name = cursor.kind is CursorKind.DECL_REF_EXPR and cursor.referenced is not None
    if is_name and _place(cursor.referenced) in varying:
        return True
    return any(_differs(child, varying) for child in cursor.get_children())


def _under_branches(
    function: Cursor, varying: set[Place], together: set[str]
) -> Iterator[tuple[int, str]]:
    def walk(cursor: Cursor, is_divergent: bool) -> Iterator[tuple[int, str]]:
        if cursor.kind is CursorKind.CALL_EXPR and is_divergent and _name(cursor) in together:
            yield cursor.location.line, _name(cursor)
        children = list(cursor.get_children())
        if cursor.kind in _BRANCHES and children:
            body = children[-1]
            conditions = children[:1] if cursor.kind is CursorKind.IF_STMT else children[:-1]
            if cursor.kind is CursorKind.CONDITIONAL_OPERATOR:
                conditions = children[:1]
            differs = any(_differs(c, varying) for c in conditions)
            for child in children:
                is_inside = child not in conditions or child == body
                yield from walk(child, is_divergent or (differs and is_inside))
        else:
            for child in children:
                yield from walk(child, is_divergent)

    yield from walk(function, False)
