"""Documents name things that exist, link to files that are there, and show figures as measured."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import mlx_lm.models
import pytest

from quire.loadtest.measuring import measuring_page

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
PACKAGES = "serve", "engine", "cache", "kernels", "deploy", "loadtest"


def code_spans(document: Path) -> Iterator[str]:
    """What stands in backquotes, outside of blocks of code."""
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)
    yield from re.findall(r"`([^`]+)`", text)


def names_in_code() -> set[str]:
    """Classes, functions and fields, each by its own name and behind that of its class."""
    found: set[str] = set()
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    found.add(node.name)
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    found.add(node.target.id)
                if isinstance(node, ast.ClassDef):
                    found |= {f"{node.name}.{member}" for member in members(node)}
    return found


def members(node: ast.ClassDef) -> Iterator[str]:
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child.name
        if isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
            yield child.target.id


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
        if "://" not in link:
            assert (document.parent / link).exists(), link


@pytest.mark.parametrize("name", ["docs/architecture.md", "docs/glossary.md", "CONTRIBUTING.md"])
def test_paths_exist(name: str) -> None:
    paths = [span for span in code_spans(ROOT / name) if re.fullmatch(r"[\w.*/-]+/[\w.*/-]*", span)]
    assert paths
    for path in paths:
        assert next(ROOT.glob(path.rstrip("/")), None) is not None, path


def test_the_architecture_names_what_there_is() -> None:
    known = names_in_code()
    spans = list(code_spans(ROOT / "docs" / "architecture.md"))
    names = [span for span in spans if re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)?", span)]
    assert len(names) > 50
    assert [name for name in names if name not in known] == []


def test_measurements_are_those_of_the_raw_files() -> None:
    page = (ROOT / "docs" / "measuring.md").read_text()
    assert page == measuring_page(), "run python -m quire.loadtest.measuring"


def test_the_readme_counts_families_as_the_table_does() -> None:
    table = json.loads((ROOT / "loadtest/results/model_families.json").read_text())["families"]
    served = {row["model_file"] for row in table if row["result"] == "pass"}
    files = {
        path.stem
        for path in Path(mlx_lm.models.__path__[0]).glob("*.py")
        if re.search(r"^class Model\(", path.read_text(), re.MULTILINE)
    }
    passed = sum(row["result"] == "pass" for row in table)
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"[{passed} of the {len(table)} configurations tried are served]" in readme
    assert f"{len(served & files)} of its {len(files)} architectures" in readme
