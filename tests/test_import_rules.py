"""Which package may import which, read from the syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Other Quire packages, or modules of them, that a package may import.
QUIRE_IMPORTS = {
    "kernels": set(),
    "cache": set(),
    "engine": {"quire.cache", "quire.kernels"},
    "serve": {
        "quire.engine.messages",
        "quire.engine.grammar_tokens",
        "quire.engine.memory.budget",
        "quire.engine.memory.fit",
        "quire.engine.memory.host",
    },
    "deploy": {"quire.serve.settings"},
    "loadtest": set(),
    # The kernel benchmarks, unlike the rest of the load test, do not go through a server.
    "loadtest/kernels": {"quire.kernels", "quire.loadtest", "quire.engine.startup.boot"},
}
EXCEPTIONS = {
    # What launchd runs in place of the command itself.
    "deploy/launch.py": {"quire.serve.cli"},
    # The page storage is where block logic and arrays meet.
    "cache/pages.py": {"quire.kernels"},
    # The commands that inspect or measure what a worker runs.
    "loadtest/doctor.py": {"quire.engine", "quire.kernels"},
    "loadtest/doctor_model.py": {"quire.engine"},
    "loadtest/machine_lines.py": {"quire.deploy.launchd", "quire.engine", "quire.kernels"},
    "loadtest/machine_probe.py": {"quire.engine", "quire.kernels"},
    "loadtest/activations.py": {"quire.engine"},
    "loadtest/engine_steps.py": {"quire.engine"},
    "loadtest/random_models.py": {"quire.engine"},
    "loadtest/shapes.py": {"quire.engine"},
    "loadtest/small_model.py": {"quire.engine"},
    "loadtest/steps.py": {"quire.engine"},
    "loadtest/tune.py": {"quire.engine", "quire.kernels"},
}

MAY_USE_MLX = {"kernels", "engine", "loadtest/kernels"}
MLX_EXCEPTIONS = {
    *("cache/pages.py", "cache/states.py", "loadtest/activations.py", "loadtest/machine_probe.py"),
    *("loadtest/bare.py", "loadtest/engine_steps.py", "loadtest/random_models.py"),
    *("loadtest/shapes.py", "loadtest/small_model.py"),
    *("loadtest/steps.py", "loadtest/tune.py"),
}
MAY_USE_MLX_LM = {"engine"}
MLX_LM_EXCEPTIONS = {"loadtest/random_models.py", "loadtest/shapes.py", "loadtest/steps.py"}
# These decide who computes what; they are tested, and must run, without MLX.
WITHOUT_MLX = (
    "engine/scheduler.py",
    "engine/sequence.py",
    "engine/step_batch.py",
    "engine/grammar.py",
    "engine/grammar_tokens.py",
    "engine/memory/budget.py",
    "engine/memory/fit.py",
    "engine/memory/host.py",
)


def sources() -> list[Path]:
    packages = [package for package in QUIRE_IMPORTS if "/" not in package]
    return [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]


def imports(path: Path) -> Iterator[str]:
    """Dotted names of everything imported; `from a import b` gives `a.b`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_within(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


@pytest.mark.parametrize("path", sources(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_follow_the_layout(path: Path) -> None:
    relative = path.relative_to(ROOT).as_posix()
    package = max((p for p in QUIRE_IMPORTS if relative.startswith(f"{p}/")), key=len)
    own = f"quire.{package.replace('/', '.')}"
    allowed = QUIRE_IMPORTS[package] | EXCEPTIONS.get(relative, set()) | {own}
    for name in imports(path):
        if name.startswith("quire."):
            assert any(is_within(name, a) for a in allowed), name
        if is_within(name, "mlx"):
            assert package in MAY_USE_MLX or relative in MLX_EXCEPTIONS, name
        if is_within(name, "mlx_lm"):
            assert package in MAY_USE_MLX_LM or relative in MLX_LM_EXCEPTIONS, name


@pytest.mark.parametrize("relative", WITHOUT_MLX)
def test_the_scheduler_needs_no_mlx(relative: str) -> None:
    seen: set[str] = set()
    queue = [relative]
    while queue:
        current = queue.pop()
        if current in seen:
            continue
        seen.add(current)
        for name in imports(ROOT / current):
            assert not is_within(name, "mlx"), f"{current} imports {name}"
            module = name.removeprefix("quire.").replace(".", "/")
            for candidate in (module + ".py", module.rpartition("/")[0] + ".py"):
                if (ROOT / candidate).is_file():
                    queue.append(candidate)
