"""Sizes of the code that runs a step, read from the syntax trees.

`python tests/code_survey.py` prints them; tests/test_code_survey.py holds their limits.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("engine", "kernels")

# Functions of a step's way from the scheduler's batch to its logits, in the order in which they
# run: what they take and return is what the way consists of. The backends' functions are alike.
STEP_PATH = (
    "engine/step/runner.py:ModelRunner.prepare",
    "engine/model/paged_model.py:PagedModel.lay_out",
    "engine/model/paged_model.py:PagedModel.plan",
    "engine/step/transfer.py:HostTree.of",
    "engine/step/runner.py:ModelRunner.build_forward",
    "engine/step/runner.py:ModelRunner._forward",
    "engine/step/transfer.py:Transfer.upload",
    "engine/step/runner.py:_run",
    "engine/step/transfer.py:received",
    "engine/model/paged_model.py:PagedModel.__call__",
    "engine/model/seam.py:PagedLayer.update_and_fetch",
    "engine/attention/kernel_pages.py:KernelPages.write",
    "engine/model/seam.py:PagedLayer.attend",
    "engine/attention/kernel_pages.py:KernelPages.attend",
)
ENDS = ("StepBatch", "Forward", "Step")
# Made once, and not for a step.
LASTING = ("PagedModel", "LayerPages", "PageHandle")

# What chooses, checks, times and tabulates operations, whichever these are, and what says for each
# of them how.
MACHINERY_FILES = (
    "kernels/choice/*.py",
    "kernels/specs.py",
    "loadtest/kernels/*.py",
    "loadtest/tune.py",
    "loadtest/doctor.py",
    "engine/startup/kernel_check.py",
)
SPECIFICATION_FILES = ("kernels/*_spec.py", "kernels/*_problem.py")


@dataclass(frozen=True)
class Function:
    """``name`` is the path and the dotted name."""

    name: str
    lines: int
    parameters: int  # self and cls are none
    node: ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Struct:
    """A class whose body names the fields of its instances."""

    name: str
    fields: tuple[str, ...]


def functions(folders: Sequence[str] = FOLDERS) -> Iterator[Function]:
    for path, tree in _trees(folders):
        for prefix, node in _definitions(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                yield Function(f"{path}:{prefix}{node.name}", lines, _parameters(node), node)


def structs(folders: Sequence[str] = FOLDERS) -> Iterator[Struct]:
    for path, tree in _trees(folders):
        for prefix, node in _definitions(tree):
            if isinstance(node, ast.ClassDef) and (fields := _fields(node)):
                yield Struct(f"{path}:{prefix}{node.name}", fields)


def types_of_a_step() -> list[str]:
    """Quire's types that pass along :data:`STEP_PATH` between its ends, in the order they are met.

    Raises:
        LookupError: a function of the path is not there.
    """
    nodes = {function.name: function.node for function in functions()}
    if missing := [name for name in STEP_PATH if name not in nodes]:
        raise LookupError(f"STEP_PATH names functions that do not exist: {missing}")
    types: dict[str, None] = {}
    for name in STEP_PATH:
        own = _own_types(ROOT / name.partition(":")[0])
        arguments = nodes[name].args
        every = *arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs
        for annotation in (*(argument.annotation for argument in every), nodes[name].returns):
            types |= dict.fromkeys(each for each in _names(annotation) if each in own)
    return [name for name in types if name not in (*ENDS, *LASTING)]


def uploads_of_a_step() -> list[str]:
    """Calls in engine/step/ that bring host arrays to the device, and the functions they are in."""
    found = []
    for function in functions(["engine/step"]):
        for node in ast.walk(function.node):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                whole = ast.unparse(node.func)
                if "_transfer.upload" in whole or whole == "mx.array":
                    found.append(f"{function.name}: {whole}")
    return found


def lines_of(patterns: Sequence[str]) -> dict[str, int]:
    """Lines of every file that one of ``patterns`` names."""
    paths = sorted({path for pattern in patterns for path in ROOT.glob(pattern)})
    return {_relative(path): len(path.read_text().splitlines()) for path in paths}


def _trees(folders: Sequence[str]) -> Iterator[tuple[str, ast.Module]]:
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield _relative(path), ast.parse(path.read_text())


def _relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _definitions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.stmt]]:
    """Functions and classes at any depth, each with the names it stands under."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield prefix, child
            yield from _definitions(child, f"{prefix}{child.name}.")
        else:
            yield from _definitions(child, prefix)


def _own_types(path: Path) -> set[str]:
    """Names of classes that a file defines, or imports from another file of Quire."""
    tree = ast.parse(path.read_text())
    names = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (module := node.module or "").startswith("quire."):
            source = ROOT / (module.removeprefix("quire.").replace(".", "/") + ".py")
            classes = {
                each.name
                for each in ast.parse(source.read_text()).body
                if isinstance(each, ast.ClassDef)
            }
            names |= {alias.name for alias in node.names} & classes
    return names


def _parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    arguments = node.args
    named = [*arguments.posonlyargs, *arguments.args]
    bound = bool(named) and named[0].arg in ("self", "cls")
    rest = (arguments.vararg is not None) + (arguments.kwarg is not None)
    return len(named) - bound + len(arguments.kwonlyargs) + rest


def _fields(node: ast.ClassDef) -> tuple[str, ...]:
    return tuple(
        child.target.id
        for child in node.body
        if isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name)
    )


def _names(annotation: ast.expr | None) -> list[str]:
    if annotation is None:
        return []
    return [node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)]


def main() -> None:
    every, made = list(functions()), list(structs())
    print(f"{len(every)} functions and {len(made)} structs in {' and '.join(FOLDERS)}")
    print("longest functions:")
    for function in sorted(every, key=lambda one: -one.lines)[:5]:
        print(f"  {function.lines:4} lines  {function.name}")
    print("most parameters:")
    for function in sorted(every, key=lambda one: -one.parameters)[:5]:
        print(f"  {function.parameters:4}  {function.name}")
    print("most fields:")
    for struct in sorted(made, key=lambda one: -len(one.fields))[:5]:
        print(f"  {len(struct.fields):4}  {struct.name}")
    types = types_of_a_step()
    print(f"types between batch and logits: {len(types)}: {', '.join(types)}")
    print("uploads of a step:")
    for call in uploads_of_a_step():
        print(f"  {call}")
    for what, patterns in (
        ("to choose, check, time and tabulate operations", MACHINERY_FILES),
        ("of their specifications", SPECIFICATION_FILES),
    ):
        lines = lines_of(patterns)
        print(f"lines {what}: {sum(lines.values())} in {len(lines)} files")


if __name__ == "__main__":
    main()
