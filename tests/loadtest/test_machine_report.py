"""`quire report`: every part it can get, the failures told, and nothing private."""

from __future__ import annotations

import argparse
import getpass
import json
import platform
import subprocess
from pathlib import Path

import pytest

from quire.loadtest import machine_report
from quire.loadtest.report_page import page

MEDIANS = {"decode 1x128": 6.0, "decode 4x128": 8.0}


def report(folder: Path, *argv: str) -> tuple[int, dict, str]:
    parser = argparse.ArgumentParser()
    machine_report.add_arguments(parser)
    code = machine_report.run(parser.parse_args(["--out", str(folder), *argv]))
    return (
        code,
        json.loads((folder / "report.json").read_text()),
        (folder / "report.md").read_text(),
    )


def test_the_kernels_of_this_machine(tmp_path, monkeypatch):
    steps = {"median_ms": {"engine": MEDIANS, "bare": MEDIANS}, "memory_bytes": {"weights": 2**30}}
    monkeypatch.setattr(machine_report, "_steps", lambda model: steps)
    code, data, text = report(tmp_path / "new" / "folder", "--without-load")
    assert code == 0
    assert data["probe"]["device"]["name"] in ("cpu", "metal", "cuda")
    assert data["probe"]["copy_gb_per_s"] > 0
    kernels = data["probe"]["kernels"]
    assert {"paged_decode", "sample"} <= {kernel["operation"] for kernel in kernels}
    assert all(kernel["agrees"] for kernel in kernels)
    assert "load" not in data
    assert f"{len(kernels)} checked against float64, 0 disagree or fail." in text
    assert "| decode 1x128 | 6.00 ms | 6.00 ms | 1.00 |" in text
    assert "| weights | 1.00 GiB |" in text
    for private in (str(Path.home()), platform.node()):
        assert private not in json.dumps(data)
    assert f"/{getpass.getuser()}/" not in json.dumps(data)


def test_a_part_that_fails_is_told_and_the_rest_goes_on(tmp_path, monkeypatch):
    def child(command, limit):
        home = str(Path.home())
        return subprocess.CompletedProcess(command, -6, "", f"{home}/kernel.metal: error: ```bad")

    monkeypatch.setattr(machine_report, "_child", child)
    code, data, text = report(tmp_path)
    assert code == 1
    assert set(data["failed"]) == {"probe", "steps", "load"}
    assert data["failed"]["steps"] == "exit code -6: ~/kernel.metal: error: ```bad"
    assert data["environment"]["packages"]["quire"]
    assert "## steps failed" in text
    assert text.count("```") == 6  # the output cannot end its own block


def test_kernels_before_a_crash_are_kept(tmp_path, monkeypatch):
    kernel = {
        **{"operation": "a|b", "shape": "s", "dtype": "float16", "variant": "v"},
        **{"error": None, "limit": 1.0, "problem": "refused\nby the compiler", "agrees": False},
    }
    lines = [{"device": {"name": "metal", "chip": "Apple M1"}}, {"kernel": kernel}]
    output = "".join(json.dumps(line) + "\n" for line in lines)

    def child(command, limit):
        return subprocess.CompletedProcess(command, -9, output, "killed")

    monkeypatch.setattr(machine_report, "_child", child)
    _, data, text = report(tmp_path, "--without-load")
    assert data["probe"]["ended"] == "exit code -9: killed"
    assert "1 checked against float64, 1 disagree or fail." in text
    assert "| a\\|b | s | float16 | v |  | refused by the compiler |" in text


def test_a_part_has_a_time_limit():
    with pytest.raises(machine_report.PartFailed, match=r"took longer than 0\.1 s"):
        machine_report._child(["sleep", "60"], 0.1)


def test_names_are_replaced_everywhere():
    names = {"/home/ada": "~", "ada": "<user>", "ada-mac": "<host>"}
    names = dict(sorted(names.items(), key=lambda pair: -len(pair[0])))
    found = {"/home/ada/x": ["on ada-mac", "ada", "adamant", 1, None, {"a": "ada's"}]}
    assert machine_report.without_names(found, names) == {
        "~/x": ["on <host>", "<user>", "adamant", 1, None, {"a": "<user>'s"}]
    }


def test_the_page_of_an_empty_report():
    empty = {
        "environment": {
            **{"platform": "p", "python": "3", "cpu_count": 1, "time": "t"},
            **{"packages": {}, "gpus": []},
        },
        "macos": None,
        "failed": {"probe": "x"},
    }
    assert "## probe failed" in page(empty)
