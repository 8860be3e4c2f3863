"""``quire report``: what Quire does on this machine, to be shared. One JSON and a page to read.

Each part runs in a process of its own; one that fails is reported as failed, and the rest goes on.
Nothing private is written: no prompt, no path of the home folder, no name of user or machine.
"""

from __future__ import annotations

import argparse
import getpass
import importlib.resources
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from quire.loadtest import environment
from quire.loadtest.compare import comparisons
from quire.loadtest.report_page import page
from quire.loadtest.results import CompareResult

Report = dict[str, Any]

# Seconds that a part may take; kernels are compiled in the first.
_PROBE_LIMIT = 900
_STEPS_LIMIT = 600
_LOAD_LIMIT = 600
_LOG_TAIL = 2000  # characters of what a failed part printed
_DECODES = ("1x128", "4x128", "16x128")


class PartFailed(Exception):
    """A part has no result; the message says why, with the end of its output."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, default=Path("quire-report"), metavar="FOLDER", help="where to write"
    )
    parser.add_argument(
        "--without-load", action="store_true", help="leave out the load over HTTP (a minute)"
    )


def run(args: argparse.Namespace) -> int:
    """0 if every part has a result, 1 if some failed; the report is written either way."""
    args.out.mkdir(parents=True, exist_ok=True)
    demo = str(importlib.resources.files("quire.engine.demo") / "quire-demo")
    parts: list[tuple[str, Callable[[], Any]]] = [
        ("probe", _probe),
        ("steps", lambda: _steps(demo)),
    ]
    if not args.without_load:
        parts.append(("load", lambda: _load(demo)))
    report: Report = {
        "environment": msgspec.to_builtins(environment.describe()),
        "macos": platform.mac_ver()[0] or None,
        "failed": {},
    }
    for name, measure in parts:
        print(f"{name}...", file=sys.stderr, flush=True)
        start = time.monotonic()
        try:
            report[name] = measure()
        except PartFailed as error:
            report["failed"][name] = str(error)
        print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    report = without_names(report, names_of_this_machine())
    (args.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / "report.md").write_text(page(report))
    print(f"{args.out / 'report.md'} to read, {args.out / 'report.json'} to share.")
    return 1 if report["failed"] else 0


def _probe() -> Report:
    """Device, bandwidth and kernels, as far as they came."""
    command = [sys.executable, "-m", "quire.loadtest.machine_probe"]
    done = _child(command, _PROBE_LIMIT)
    result: Report = {"kernels": []}
    for line in done.stdout.splitlines():
        part = json.loads(line)
        if "kernel" in part:
            result["kernels"].append(part["kernel"])
        else:
            result |= part
    if done.returncode != 0:
        result["ended"] = _why(done)
    if "device" not in result:
        raise PartFailed(_why(done))
    return result


def _steps(model: str) -> Report:
    """Medians in milliseconds of the demo's decode steps, and mlx_lm's, in one run."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "steps.json"
        command = [sys.executable, "-m", "quire.loadtest.steps", model, "--decode", *_DECODES]
        options = ("--rounds", "3", "--steps", "30", "--out", str(out))
        _checked(_child([*command, *options], _STEPS_LIMIT))
        record = json.loads(out.read_text())
    medians = {
        kind: {
            name: statistics.median(each for run in runs for each in run[name]) for name in runs[0]
        }
        for kind, runs in record["ms"].items()
    }
    return {"median_ms": medians, "memory_bytes": record["memory"], "blas": record["blas"]}


def _load(model: str) -> Report:
    """One load over HTTP on the demo, beside mlx_lm.server."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "load.json"
        options = ("--workloads", "uniform", "--rounds", "1", "--clients", "4", "--requests", "24")
        command = [sys.executable, "-m", "quire.loadtest", "compare", "--model", model, *options]
        _checked(_child([*command, "--prompt-chars", "60", "--out", str(out)], _LOAD_LIMIT))
        result = msgspec.json.decode(out.read_bytes(), type=CompareResult)
    return {
        "workload": " ".join(options),
        "metrics": {each.label: each.medians for each in comparisons(result, "uniform")},
        "failures": {run.server: run.failure for run in result.runs if run.failure},
    }


def _child(command: Sequence[str], limit: float) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=limit
        )
    except subprocess.TimeoutExpired as error:
        raise PartFailed(f"took longer than {limit:g} s") from error


def _checked(done: subprocess.CompletedProcess[str]) -> None:
    if done.returncode != 0:
        raise PartFailed(_why(done))


def _why(done: subprocess.CompletedProcess[str]) -> str:
    return f"exit code {done.returncode}: {done.stderr[-_LOG_TAIL:].strip()}"


def names_of_this_machine() -> dict[str, str]:
    """What must not leave it, with what stands in its place; the longest first."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = ""
    names = {str(Path.home()): "~", sys.prefix: "<python>", os.getcwd(): "<here>"}
    names |= {platform.node(): "<host>", user: "<user>", tempfile.gettempdir(): "<tmp>"}
    found = [name for name in names if len(name) > 2]
    return {name: names[name] for name in sorted(found, key=len, reverse=True)}


def without_names(value: Any, names: dict[str, str]) -> Any:
    """``value`` with every name replaced in all of its texts, keys included."""
    if isinstance(value, str):
        for name, instead in names.items():
            pattern = re.escape(name) if "/" in name else rf"\b{re.escape(name)}\b"
            value = re.sub(pattern, lambda _: instead, value)  # noqa: B023
        return value
    if isinstance(value, dict):
        return {
            without_names(key, names): without_names(item, names) for key, item in value.items()
        }
    if isinstance(value, list):
        return [without_names(item, names) for item in value]
    return value
