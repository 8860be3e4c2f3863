"""``quire report``: what Quire does on this machine, to be shared. One JSON and a page to read.

Each part runs in a process of its own; one that fails is reported as failed, and the rest goes on.
Nothing private is written: no prompt, no path of the home folder, no name of user or machine.
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from quire.loadtest import environment, machine_parts
from quire.loadtest.machine_names import names_of_this_machine, without_names
from quire.loadtest.machine_parts import PartFailed
from quire.loadtest.report_page import page


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, default=Path("quire-report"), metavar="FOLDER", help="where to write"
    )
    parser.add_argument(
        "--without-load", action="store_true", help="leave out the load over HTTP (a minute)"
    )
    parser.add_argument(
        "--without-model",
        action="store_true",
        help="leave out the steps of a random model (a 4-bit 4B one on a GPU, 2.3 GB of disk)",
    )


def run(args: argparse.Namespace) -> int:
    """0 if every part has a result, 1 if some failed; the report is written either way."""
    args.out.mkdir(parents=True, exist_ok=True)
    demo = str(importlib.resources.files("quire.engine.demo") / "quire-demo")
    report: dict[str, Any] = {
        "environment": msgspec.to_builtins(environment.describe()),
        "macos": platform.mac_ver()[0] or None,
        "failed": {},
    }
    parts: list[tuple[str, Callable[[], Any]]] = [
        ("probe", machine_parts.probe),
        ("speeds", machine_parts.speeds),
        ("steps", lambda: machine_parts.steps(demo)),
    ]
    if not args.without_model:
        parts.append(("random_steps", lambda: machine_parts.random_steps(_device(report))))
    if not args.without_load:
        parts.append(("load", lambda: machine_parts.load(demo)))
    for name, measure in parts:
        print(f"{name}...", file=sys.stderr, flush=True)
        start = time.monotonic()
        try:
            report[name] = measure()
        except PartFailed as error:
            report["failed"][name] = str(error)
        print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
        _write(args.out, report)  # what is interrupted later leaves this
    print(f"{args.out / 'report.md'} to read, {args.out / 'report.json'} to share.")
    return 1 if report["failed"] or report.get("load", {}).get("failures") else 0


def _write(folder: Path, report: dict[str, Any]) -> None:
    shared = without_names(report, names_of_this_machine())
    (folder / "report.json").write_text(json.dumps(shared, indent=1) + "\n")
    (folder / "report.md").write_text(page(shared))


def _device(report: dict[str, Any]) -> str:
    """Which model suits it depends on the device, and that is found by the first part."""
    name = report.get("probe", {}).get("device", {}).get("name")
    if name is None:
        raise PartFailed("the device is not known, since the probe failed")
    return str(name)
