"""`quire report`: every part it can get, the failures told, and nothing private."""

from __future__ import annotations

import argparse
import getpass
import itertools
import json
import platform
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from quire.loadtest import environment, machine_parts, machine_report
from quire.loadtest.kernels.results import CaseResult, KernelsResult, VariantResult
from quire.loadtest.machine_names import names_of_this_machine, without_names
from quire.loadtest.report_page import page
from quire.loadtest.result_file import save
from quire.loadtest.results import ComparedRun, CompareResult, ServerSetup
from quire.loadtest.serve import WARMUP_SEED_OFFSET
from quire.loadtest.workloads import conversations

MEDIANS = {"decode 1x128": 6.0, "decode 4x128": 8.0}
SPEEDS = {
    "copy_gb_per_s": 100.0,
    "cases": [
        {
            **{"operation": "swiglu", "shape": "rows 8", "variant": "vector"},
            **{"us": 12.0, "share_of_copy": 0.5},
            "against": {"separate": {"us": 24.0, "share_of_copy": 0.25, "ratio": 2.0}},
        }
    ],
    "failures": ["sample rows 1 quire: refused"],
    "skipped": ["matmul rows 8: 90 GB and more"],
}


def private_names(text: str) -> list[str]:
    """Of this machine's home folder, user and host, those that stand in ``text``."""
    names = (str(Path.home()), getpass.getuser(), platform.node())
    return [name for name in names if re.search(rf"(?<!\w){re.escape(name)}\b", text)]


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
    monkeypatch.setattr(machine_parts, "steps", lambda model: steps)
    monkeypatch.setattr(machine_parts, "speeds", lambda: SPEEDS)
    code, data, text = report(tmp_path / "new" / "folder", "--without-load")
    assert code == 0
    assert data["probe"]["device"]["name"] in ("cpu", "metal", "cuda")
    assert data["probe"]["copy_gb_per_s"] > 0
    kernels = data["probe"]["kernels"]
    assert {"paged_decode", "sample"} <= {kernel["operation"] for kernel in kernels}
    assert all(kernel["agrees"] for kernel in kernels)
    assert "load" not in data
    assert f"{len(kernels)} checked against float64, 0 disagree or fail." in text
    assert text.count("| decode 1x128 | 6.00 ms | 6.00 ms | 1.00 |") == 2
    assert data["random_steps"]["model"] in text
    assert "| swiglu | rows 8 | vector | 12 | 50% | separate | 25% | 2.00 |" in text
    assert "- failed: sample rows 1 quire: refused\n- left out, too large: matmul rows 8" in text
    assert "| weights | 1.00 GiB |" in text
    assert private_names(json.dumps(data)) == private_names(text) == []


def test_a_part_that_fails_is_told_and_the_rest_goes_on(tmp_path, monkeypatch):
    def child(command, limit):
        home = str(Path.home())
        return subprocess.CompletedProcess(command, -6, "", f"{home}/kernel.metal: error: ```bad")

    monkeypatch.setattr(machine_parts, "run_child", child)
    code, data, text = report(tmp_path)
    assert code == 1
    assert set(data["failed"]) == {"probe", "speeds", "steps", "random_steps", "load"}
    assert data["failed"]["steps"] == "exit code -6: ~/kernel.metal: error: ```bad"
    assert data["environment"]["packages"]["quire"]
    assert "## steps failed" in text
    assert text.count("```") == 10  # the output cannot end its own block


def test_an_interrupted_report_keeps_what_came_before(tmp_path, monkeypatch):
    def interrupted(model):
        raise KeyboardInterrupt

    monkeypatch.setattr(machine_parts, "probe", lambda: {"kernels": []})
    monkeypatch.setattr(machine_parts, "speeds", lambda: SPEEDS)
    monkeypatch.setattr(machine_parts, "steps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        report(tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["speeds"] == SPEEDS
    assert "| swiglu | rows 8 | vector | 12 | 50% |" in (tmp_path / "report.md").read_text()


def test_kernels_before_a_crash_are_kept(tmp_path, monkeypatch):
    kernel = {
        **{"operation": "a|b", "shape": "s", "dtype": "float16", "variant": "v"},
        **{"error": None, "limit": 1.0, "problem": "refused\nby the compiler", "agrees": False},
    }
    lines = [{"device": {"name": "metal", "chip": "Apple M1"}}, {"kernel": kernel}]
    output = "".join(json.dumps(line) + "\n" for line in lines)

    def child(command, limit):
        return subprocess.CompletedProcess(command, -9, output, "killed")

    monkeypatch.setattr(machine_parts, "run_child", child)
    _, data, text = report(tmp_path, "--without-load")
    assert data["probe"]["ended"] == "exit code -9: killed"
    assert "1 checked against float64, 1 disagree or fail." in text
    assert "| a\\|b | s | float16 | v |  | refused by the compiler |" in text


def test_a_part_has_a_time_limit():
    with pytest.raises(machine_parts.PartFailed, match=r"took longer than 0\.1 s"):
        machine_parts.run_child(["sleep", "60"], 0.1)


def test_names_are_replaced_everywhere():
    names = {"/home/ada": "~", "ada": "<user>", "ada-mac": "<host>"}
    names = dict(sorted(names.items(), key=lambda pair: -len(pair[0])))
    found = {"/home/ada/x": ["on ada-mac", "ada", "adamant", 1, None, {"a": "ada's"}]}
    assert without_names(found, names) == {
        "~/x": ["on <host>", "<user>", "adamant", 1, None, {"a": "<user>'s"}]
    }


def test_a_user_called_as_a_part_of_the_report(tmp_path, monkeypatch):
    """Names are replaced in what was said, and not in the report's own words for its parts."""
    steps = {"median_ms": {"engine": MEDIANS, "bare": MEDIANS}, "memory_bytes": {}}
    monkeypatch.setattr(machine_parts, "steps", lambda model: steps)
    monkeypatch.setattr(machine_parts, "speeds", lambda: SPEEDS)
    monkeypatch.setattr(machine_parts, "probe", lambda: {"kernels": [], "ended": "by engine"})
    monkeypatch.setattr(getpass, "getuser", lambda: "engine")
    _, data, text = report(tmp_path, "--without-load", "--without-model")
    assert data["steps"]["median_ms"]["engine"] == MEDIANS
    assert "The check ended early: by <user>" in text


def test_names_of_this_machine_are_found(monkeypatch):
    monkeypatch.setattr(platform, "node", lambda: "Adas-Mac.local")
    monkeypatch.setattr(getpass, "getuser", lambda: "ada")
    names = names_of_this_machine()
    line = f"{Path.home()}/model on adas-mac, Adas-Mac.local, by Ada with {sys.prefix}/bin/python"
    assert (
        without_names(line, names)
        == "~/model on <host>, <host>, by <user> with <python>/bin/python"
    )


def test_the_log_has_no_prompt():
    spec = machine_parts._LOAD
    warm_up = msgspec.structs.replace(spec, seed=spec.seed + WARMUP_SEED_OFFSET)
    prompts = [conversations(each)[-1].turns[0] for each in (spec, warm_up)]
    log = [*map(str, range(200)), *(f'body {{"content": "{prompt}"}}' for prompt in prompts)]
    tail = machine_parts.log_tail("\n".join(log))
    assert tail[-3:] == ["199", *['body {"content": "<prompt>"}'] * 2]
    assert len(tail) == 100


def test_polls_of_a_server_that_loads_do_not_fill_the_log():
    poll = "WARNING quire.requests: POST /v1/chat/completions 503 id=r error='{}'"
    polls = [poll.format("The model is still loading. Try again in a moment.")] * 500
    refused = poll.format("The queue is full.")
    assert machine_parts.log_tail("\n".join(["start", *polls, refused])) == ["start", refused]


def test_a_server_that_dies_leaves_its_log(tmp_path, monkeypatch):
    """The load's own failure is told, with the end of the log, and no private name in either."""
    prompt = conversations(machine_parts._LOAD)[0].turns[0]
    setups = [ServerSetup(name, "command", None) for name in ("quire", "mlx_lm")]
    home, host = Path.home(), platform.node()
    runs = [ComparedRun("quire", "uniform", 0, 0, failure=f"{home}/m: exited with code -6")]
    result = CompareResult(setups, runs, environment.describe(), "command")

    def child(command, limit):
        if "compare" not in command:
            return subprocess.CompletedProcess(command, 1, "", "no")
        options = dict(itertools.pairwise(command))
        folder = Path(options["--logs"])
        folder.mkdir()
        (folder / "uniform-1-quire.log").write_text(f"{home}/m on {host}: {prompt}\nAborted\n")
        save(Path(options["--out"]), result)
        return subprocess.CompletedProcess(command, 1, "", "")

    monkeypatch.setattr(machine_parts, "run_child", child)
    code, data, text = report(tmp_path)
    assert code == 1
    assert data["load"]["log"] == ["~/m on <host>: <prompt>", "Aborted"]
    assert data["load"]["failures"] == {"quire": "~/m: exited with code -6"}
    assert "quire failed: ~/m: exited with code -6" in text
    assert "```\n~/m on <host>: <prompt>\nAborted\n```" in text


def test_the_model_suits_the_device():
    name, shape = machine_parts.random_model("cpu")
    assert (name, shape.bits) == ("26M float32 (small, for a CPU)", None)
    name, shape = machine_parts.random_model("metal")
    assert (name, shape.bits) == ("4.0B 4-bit", 4)


def test_speeds_of_a_kernel_and_of_one_that_fails(monkeypatch):
    ways = [
        VariantResult("separate", True, 8000, throughput_us=[2.0]),
        VariantResult("quire", False, 4000, throughput_us=[0.5]),
    ]
    broken = [VariantResult("quire", False, 4000, failure="refused by the compiler")]
    cases = [CaseResult("swiglu", "rows 8", {"quire": "vector"}, 0, ways)]
    cases.append(CaseResult("sample", "rows 1", {}, 0, broken))
    machine = environment.describe()
    result = KernelsResult("metal", "M1", 16.0, True, 1, cases, [], None, machine, "command")

    def child(command, limit):
        save(Path(command[-1]), result)
        return subprocess.CompletedProcess(command, 1, "", "")

    monkeypatch.setattr(machine_parts, "run_child", child)
    found = machine_parts.speeds()
    other = {"us": 2.0, "share_of_copy": 0.25, "ratio": 4.0}
    assert found["cases"] == [
        {
            **{"operation": "swiglu", "shape": "rows 8", "variant": "vector"},
            **{"us": 0.5, "share_of_copy": 0.5, "against": {"separate": other}},
        }
    ]
    assert found["failures"] == ["sample rows 1 quire: refused by the compiler"]


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
