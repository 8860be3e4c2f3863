"""Rules of Metal that C++ does not have, checked in a text: what Apple's compiler would refuse.

`address_spaces.py` has those that clang knows from OpenCL C++; the others are read here from the
text and from clang's syntax tree.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

from clang.cindex import Cursor, CursorKind, StorageClass, TypeKind

from metal_sim.address_spaces import Parsed, parse_as_opencl
from metal_sim.text import MetalText, is_shared_variable, share_threadgroup_variables
from metal_sim.uniform import divergent_calls

MAX_BUFFERS = 31
MAX_THREADGROUP_BYTES = 32 << 10
MAX_REGISTERS = 128  # of 32 bits, in a lane
_FUNCTIONS = {CursorKind.FUNCTION_DECL, CursorKind.FUNCTION_TEMPLATE, CursorKind.CXX_METHOD}
_POINTERS = {TypeKind.POINTER, TypeKind.LVALUEREFERENCE, TypeKind.RVALUEREFERENCE}
_ARRAYS = {TypeKind.CONSTANTARRAY, TypeKind.DEPENDENTSIZEDARRAY, TypeKind.VARIABLEARRAY}
_WIDE_ATOMIC = re.compile(r"\batomic_u?long\b|\batomic\s*<\s*(u?long|u?int64_t|size_t)\b")
_NAME = re.compile(r'host_name\("([^"]*)"\)')


def broken_rules(text: MetalText, *, registers: bool = False) -> list[str]:
    """What is wrong with a text, one line each.

    Args:
        registers: whether a lane's arrays must leave it the registers to run without spilling.
    """
    found = list(_of_text(text))
    if found:
        return found  # clang may not understand it
    structure, arrays = _of_template(_without_instance(text))
    sizes = [("threadgroup memory", _shared(text), MAX_THREADGROUP_BYTES)]
    if registers:
        sizes.append(("registers", list(arrays), 4 * MAX_REGISTERS))
    checks = "".join(
        f'static_assert(0{"".join(f" + sizeof({name})" for name in names)} <= {limit}, "{what}");'
        for what, names, limit in sizes
    )
    return [*parse_as_opencl(text, checks).errors, *structure]


def _without_instance(text: MetalText) -> MetalText:
    """The same for all instances of a template, and for inputs of all sizes and types: what is read
    from it does not depend on them."""
    name = re.match(r"\w+", text.function)
    assert name is not None
    before, instance, _ = text.text.partition("template [[host_name")
    body = before if instance and "<" in text.function else text.text
    start = _body_start(body)
    front, signature, _ = re.split(r"(\[\[kernel\]\] void [^{]*\{\n)", body, maxsplit=1)
    signature = re.sub(r"\bb?float16_t\b", "float", signature).replace("constant", "device")
    body = front + signature + body[start:]
    return MetalText(body.replace(name[0], "custom_kernel"), "custom_kernel", ())


@cache
def _of_template(text: MetalText) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What does not depend on the template's arguments: what is wrong, and the names of the arrays
    of a lane."""
    parsed = parse_as_opencl(text)
    checks = (_recursion, _initialisers, _unqualified_pointers, divergent_calls)
    found = tuple(message for check in checks for message in check(parsed))
    return found, tuple(_arrays(_kernel(parsed)))


def _of_text(text: MetalText) -> Iterator[str]:
    if not text.text.isascii():
        line = next(line for line in text.text.splitlines() if not line.isascii())
        yield f"not ASCII: {line}"
    buffers = sum(parameter.attribute.startswith("buffer(") for parameter in text.parameters)
    if buffers > MAX_BUFFERS:
        yield f"{buffers} buffers, more than {MAX_BUFFERS}"
    for name in [parameter.name for parameter in text.parameters] + _NAME.findall(text.text):
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            yield f"not a name: {name}"
    if wide := _WIDE_ATOMIC.search(text.text):
        yield f"atomics of 64 bits: {wide[0]}"
    start = _body_start(text.text)
    for match in re.finditer(r"^.*\b(?:SHARED|threadgroup)\b.*$", text.text, re.MULTILINE):
        if match[0].startswith("#") or not is_shared_variable(match[0]):
            continue
        before = text.text[start : match.start()]
        if match.start() < start or before.count("{") != before.count("}"):
            yield f"a threadgroup variable outside of a kernel's own scope: {match[0]}"


def _body_start(text: str) -> int:
    signature = re.search(r"\[\[kernel\]\] void \S+\(\n.*?\) \{\n", text, re.DOTALL)
    assert signature is not None
    return signature.end()


def _shared(text: MetalText) -> list[str]:
    """Names of threadgroup variables."""
    shared = share_threadgroup_variables(text.text[_body_start(text.text) :])
    return re.findall(r"auto& (\w+) = metal_sim::shared<", shared)


def _kernel(parsed: Parsed) -> Cursor:
    name = re.match(r"\w+", parsed.text.function)
    assert name is not None
    return next(
        cursor
        for cursor in _own(parsed)
        if cursor.kind in _FUNCTIONS and cursor.spelling == name[0] and cursor.is_definition()
    )


def _own(parsed: Parsed) -> Iterator[Cursor]:
    for cursor in parsed.unit.cursor.get_children():
        if parsed.is_own(cursor):
            yield from cursor.walk_preorder()


def _arrays(kernel: Cursor) -> list[str]:
    """Names of a lane's own arrays that live as long as the kernel."""
    (body,) = (c for c in kernel.get_children() if c.kind is CursorKind.COMPOUND_STMT)
    return [
        variable.spelling
        for statement in body.get_children()
        if statement.kind is CursorKind.DECL_STMT
        for variable in statement.get_children()
        if variable.kind is CursorKind.VAR_DECL and variable.type.kind in _ARRAYS
    ]


def _recursion(parsed: Parsed) -> Iterator[str]:
    """Functions that call themselves, by whatever way."""
    calls: dict[str, set[str]] = {}
    named: dict[str, set[str]] = {}  # of templates, calls are known by name only
    functions = [c for c in _own(parsed) if c.kind in _FUNCTIONS and c.is_definition()]
    for function in functions:
        named.setdefault(function.spelling, set()).add(function.get_usr())
    for function in functions:
        found = calls.setdefault(function.get_usr(), set())
        for cursor in function.walk_preorder():
            if cursor.kind is CursorKind.CALL_EXPR and cursor.referenced is not None:
                found.add(cursor.referenced.get_usr())
            elif cursor.kind is CursorKind.OVERLOADED_DECL_REF:
                others = named.get(cursor.spelling, set())
                # One of several of that name is another one.
                found |= others if others == {function.get_usr()} else others - {function.get_usr()}
    for function in functions:
        reached, queue = set(), [function.get_usr()]
        while queue:
            for callee in calls.get(queue.pop(), set()) - reached:
                reached.add(callee)
                queue.append(callee)
        if function.get_usr() in reached:
            yield f"{function.spelling} calls itself: {parsed.line(function.location.line)}"


def _initialisers(parsed: Parsed) -> Iterator[str]:
    """Program-scope variables whose value is not known to the compiler."""
    for cursor in _own(parsed):
        if cursor.kind is not CursorKind.VAR_DECL:
            continue
        in_function = cursor.semantic_parent.kind in _FUNCTIONS
        tokens = {token.spelling for token in cursor.get_tokens()}
        line = parsed.line(cursor.location.line)
        if not in_function and "constexpr" not in tokens and "CONSTANT" not in line:
            yield f"initialised when the program begins: {line}"
        if in_function and cursor.storage_class is StorageClass.STATIC:
            yield f"a static variable in a function: {line}"


def _unqualified_pointers(parsed: Parsed) -> Iterator[str]:
    """Pointers and references to whatever address space: Metal before 4.1 has no such thing."""
    declared = {CursorKind.VAR_DECL, CursorKind.PARM_DECL, CursorKind.FIELD_DECL}
    for cursor in _own(parsed):
        is_pointer = cursor.kind in declared and cursor.type.kind in _POINTERS
        if is_pointer and "__generic" in cursor.type.spelling:
            line = parsed.line(cursor.location.line)
            yield f"a pointer without an address space, {cursor.spelling}: {line}"
