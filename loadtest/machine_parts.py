"""The parts of ``quire report``, each measured by a process of its own."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from quire.loadtest.compare import comparisons
from quire.loadtest.kernels.results import CaseResult, VariantResult, load_kernels
from quire.loadtest.machine_names import prompts_of, without_names
from quire.loadtest.model_folder import SHAPES, ModelShape, make_model
from quire.loadtest.results import CompareResult
from quire.loadtest.workloads import WorkloadSpec

Part = dict[str, Any]

# Seconds that a part may take; kernels are compiled in the first.
_PROBE_LIMIT = 900
_BENCH_LIMIT = 900
_STEPS_LIMIT = 900
_LOAD_LIMIT = 600
_LOG_TAIL = 2000  # characters of what a failed part printed
_LOG_LINES = 100  # of the server's log: its start, and a line for each request of the load
_DECODES = ("1x128", "4x128", "16x128")
_LOAD = WorkloadSpec(name="uniform", requests=24, prompt_chars=60)
_CLIENTS = 4
_POLLED = re.compile(r"quire\.requests: POST /v1/chat/completions 503 .*still loading")


class PartFailed(Exception):
    """A part has no result; the message says why, with the end of its output."""


def probe() -> Part:
    """Device, bandwidth and kernels, as far as they came."""
    command = [sys.executable, "-m", "quire.loadtest.machine_probe"]
    done = run_child(command, _PROBE_LIMIT)
    result: Part = {"kernels": []}
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


def speeds() -> Part:
    """Each kernel at its smallest size, beside MLX's own operations and a large copy."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "kernels.json"
        command = [sys.executable, "-m", "quire.loadtest", "kernels", "--quick", "--out", str(out)]
        done = run_child(command, _BENCH_LIMIT)
        if not out.exists():  # the exit code is 1 if any variant failed
            raise PartFailed(_why(done))
        result = load_kernels(out)
    copy = result.copy_gb_per_s
    rows = [_speed(case, quire, copy) for case in result.cases if (quire := case.variant("quire"))]
    return {
        "copy_gb_per_s": copy,
        "cases": rows,
        "failures": result.failures,
        "skipped": result.skipped,
    }


def _speed(case: CaseResult, quire: VariantResult, copy: float) -> Part:
    others = [each for each in case.variants if each.is_baseline and not each.failure]
    return {
        "operation": case.operation,
        "shape": case.name,
        "variant": case.labels.get("quire", "quire"),
        "us": quire.throughput,
        "share_of_copy": quire.gb_per_s / copy,
        "against": {
            each.name: {
                "us": each.throughput,
                "share_of_copy": each.gb_per_s / copy,
                "ratio": case.speed_against(each.name, quire),
            }
            for each in others
        },
    }


def steps(model: str) -> Part:
    """Medians in milliseconds of decode steps of a model folder, and mlx_lm's, in one run."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "steps.json"
        command = [sys.executable, "-m", "quire.loadtest.steps", model, "--decode", *_DECODES]
        options = ("--rounds", "3", "--steps", "30", "--out", str(out))
        _checked(run_child([*command, *options], _STEPS_LIMIT))
        record = json.loads(out.read_text())
    medians = {
        kind: {
            name: statistics.median(each for run in runs for each in run[name]) for name in runs[0]
        }
        for kind, runs in record["ms"].items()
    }
    return {"median_ms": medians, "memory_bytes": record["memory"], "blas": record["blas"]}


def random_model(device: str) -> tuple[str, ModelShape]:
    """The random model whose steps are timed on a device, and what the page calls it."""
    if device == "cpu":
        shape = SHAPES["small"]
        return f"{shape.parameters / 1e6:.0f}M float32 (small, for a CPU)", shape
    shape = msgspec.structs.replace(SHAPES["qwen3-4b"], bits=4)
    return f"{shape.parameters / 1e9:.1f}B 4-bit", shape


def random_steps(device: str) -> Part:
    """The same of a model with random weights, written for this and gone afterwards."""
    name, shape = random_model(device)
    with tempfile.TemporaryDirectory() as folder:
        try:
            make_model(Path(folder) / "model", shape)
        except OSError as error:
            raise PartFailed(f"the model could not be written: {error}") from error
        return {"model": name, **steps(str(Path(folder) / "model"))}


def load(model: str) -> Part:
    """One load over HTTP beside mlx_lm.server, and the end of Quire's log."""
    with tempfile.TemporaryDirectory() as folder:
        out, logs = Path(folder) / "load.json", Path(folder) / "logs"
        options = ["--workloads", _LOAD.name, "--rounds", "1", "--clients", str(_CLIENTS)]
        options += ["--requests", str(_LOAD.requests), "--prompt-chars", str(_LOAD.prompt_chars)]
        command = [sys.executable, "-m", "quire.loadtest", "compare", "--model", model, *options]
        command += ["--quire-args=--log-level info", "--logs", str(logs), "--out", str(out)]
        done = run_child(command, _LOAD_LIMIT)
        if not out.exists():  # the exit code is 1 if any request failed
            raise PartFailed(_why(done))
        result = msgspec.json.decode(out.read_bytes(), type=CompareResult)
        log = "".join(path.read_text(errors="replace") for path in sorted(logs.glob("*-quire.log")))
    return {
        "workload": " ".join(options),
        "metrics": {each.label: each.medians for each in comparisons(result, _LOAD.name)},
        "failures": {run.server: run.failure for run in result.runs if run.failure},
        "log": log_tail(log),
    }


def log_tail(log: str) -> list[str]:
    """The last lines, without the load's prompts.

    A server is asked several times a second whether it is ready; these refusals are left out.
    """
    lines = [line for line in log.splitlines() if not _POLLED.search(line)]
    tail: list[str] = without_names(lines[-_LOG_LINES:], prompts_of(_LOAD))
    return tail


def run_child(command: Sequence[str], limit: float) -> subprocess.CompletedProcess[str]:
    """Raises PartFailed if it takes longer than ``limit`` seconds."""
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
