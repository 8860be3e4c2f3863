"""Shared reports of machines become the README's table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quire.loadtest.machine_table import BEGIN, END, machine_table, with_table

README = Path(__file__).parent.parent.parent / "README.md"
WHOLE = {
    "environment": {"platform": "macOS-15-arm64", "packages": {"mlx": "0.32.4"}},
    "macos": "15.1",
    "failed": {},
    "probe": {
        "device": {"name": "metal", "chip": "Apple M2 Max"},
        "copy_gb_per_s": 345.6,
        "kernels": [{"agrees": True}, {"agrees": False}],
    },
    "steps": {"median_ms": {"engine": {"a": 2.0, "b": 4.0}, "bare": {"a": 3.0, "b": 4.0}}},
    "random_steps": {
        "model": "4.0B 4-bit",
        "median_ms": {"engine": {"a": 10.0}, "bare": {"a": 11.0}},
    },
    "load": {"metrics": {"output tokens/s": {"quire": 300.0, "mlx_lm": 200.0}}},
}


def table_of(folder: Path, report: object) -> list[str]:
    (folder / "mac.json").write_text(json.dumps(report))
    return machine_table(folder).splitlines()


def test_the_readme_has_the_table_of_the_shared_reports():
    text = README.read_text()
    assert text == with_table(text, machine_table()), "run python -m quire.loadtest.machine_table"


def test_nothing_shared_is_one_line(tmp_path):
    assert machine_table(tmp_path) == "No report of a machine has been shared yet."


def test_a_row_for_each_model(tmp_path):
    machine = "| [Apple M2 Max](loadtest/results/machines/mac.json) | macOS 15.1 | 0.32.4 | 346 |"
    assert table_of(tmp_path, WHOLE)[-2:] == [
        f"{machine} 1 of 2 | demo | 1.50, 1.00 | 1.50 |",
        f"{machine} 1 of 2 | 4.0B 4-bit | 1.10 |  |",
    ]


def test_parts_that_failed_are_empty_cells(tmp_path):
    failed = {**{key: WHOLE[key] for key in ("environment", "macos")}, "failed": {"probe": "x"}}
    row = table_of(tmp_path, failed)[-1]
    assert row == (
        "| [mac](loadtest/results/machines/mac.json) | macOS 15.1 | 0.32.4 |  |  | demo |  |  |"
    )


@pytest.mark.parametrize("report", [[], {"environment": {}}, {**WHOLE, "steps": {"median_ms": 1}}])
def test_another_file_is_refused_by_name(tmp_path, report):
    with pytest.raises(ValueError, match=r"mac\.json is not a report"):
        table_of(tmp_path, report)


def test_a_readme_without_the_marks_is_refused():
    assert with_table(f"a\n{BEGIN}\nold\n{END}\nb", "new") == f"a\n{BEGIN}\nnew\n{END}\nb"
    with pytest.raises(ValueError, match="has no"):
        with_table(f"a {BEGIN} b", "new")
