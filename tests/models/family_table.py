"""Tabulates which mlx-lm families the engine serves with exactly mlx-lm's own greedy output.

    python tests/models/family_table.py --out loadtest/results/model_families.json

writes the JSON file and a Markdown table beside it; with ``--again`` only what can be said without
running the families is written anew over such a file. Families run in child processes, since some
model files of mlx-lm crash the interpreter; a child that dies costs only the family it was at.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

SECONDS_PER_FAMILY = 180
NUM_CHILDREN = 2

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file to write; .md goes beside it")
    parser.add_argument("--again", action="store_true", help="run nothing, keep the results")
    parser.add_argument("--child", nargs="+", metavar="FAMILY", help=argparse.SUPPRESS)
    parser.add_argument("families", nargs="*", help="default: all of them")
    args = parser.parse_args()
    if args.child:
        run_child(args.child)
        return
    if args.out is None:
        parser.error("--out is required")
    report = json.loads(args.out.read_text()) if args.again else make_report(args.families)
    add_fast_path(report["families"])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(to_markdown(report))
    print(summary(report["families"]))
    if any(row["result"] in ("mismatch", "error") for row in report["families"]):
        sys.exit("a family's output differs from mlx-lm's, or the engine failed on it")


# ---- the child: one JSON line per family on standard output


def run_child(names: list[str]) -> None:
    for name in names:
        signal.alarm(SECONDS_PER_FAMILY)  # unhandled, so it ends even a loop inside MLX
        row = check_family(name)
        signal.alarm(0)
        print(json.dumps(row), flush=True)


def check_family(name: str) -> Row:
    from model_zoo_traffic import compare_with_reference

    from quire.engine.errors import UnsupportedModel

    try:
        comparison = compare_with_reference(name)
    except UnsupportedModel as error:
        return {"name": name, "result": "refused", "reason": error.reason}
    except Exception as error:  # a row of the table, with its text
        return {"name": name, "result": "error", "reason": f"{type(error).__name__}: {error}"}
    row: Row = {
        "name": name,
        "result": "mismatch" if comparison.mismatches else "pass",
        "ties": len(comparison.ties),
        "preemptions": comparison.stats.preemptions,
        "evictions": comparison.stats.cache.evictions,
        "prefix_hits": comparison.stats.cache.lookups.hits,
    }
    if comparison.mismatches:
        first = comparison.mismatches[0]
        row["reason"] = (
            f"{len(comparison.mismatches)} outputs differ; request {first.request_id} at output "
            f"token {first.position}, where the best logit leads by {first.gap:.2g}"
        )
    return row


# ---- the parent


def make_report(names: list[str]) -> dict[str, Any]:
    from model_zoo import FAMILIES, UNPAGED

    names = names or sorted({*FAMILIES, *UNPAGED}, key=str.lower)
    shares = [names[start::NUM_CHILDREN] for start in range(NUM_CHILDREN)]
    with ThreadPoolExecutor(NUM_CHILDREN) as pool:
        rows = [row for share in pool.map(run_children, shares) for row in share]
    for row in rows:
        row["model_file"] = FAMILIES[row["name"]].module if row["name"] in FAMILIES else row["name"]
        row["known_obstacle"] = UNPAGED.get(row["name"])
    return {
        "mlx": importlib.metadata.version("mlx"),
        "mlx_lm": importlib.metadata.version("mlx-lm"),
        "platform": f"{platform.system()} {platform.machine()}, CPU backend, float32",
        "families": sorted(rows, key=lambda row: row["name"].lower()),
    }


def add_fast_path(rows: list[Row]) -> None:
    from fast_path import obstacles

    for row in rows:
        if row["result"] == "pass":
            row["not_by_kernels"] = obstacles(row["name"])


def run_children(names: list[str]) -> list[Row]:
    """Run ``names`` in one child after another, a new one whenever a family ends the last."""
    rows: list[Row] = []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    while len(rows) < len(names):
        rest = names[len(rows) :]
        child = subprocess.Popen(
            [sys.executable, __file__, "--child", *rest],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        assert child.stdout is not None
        for line in child.stdout:
            rows.append(json.loads(line))
            print(f"{rows[-1]['name']}: {rows[-1]['result']}", file=sys.stderr)
        code = child.wait()
        if len(rows) < len(names):
            rows.append({"name": names[len(rows)], "result": "crash", "reason": describe(code)})
    return rows


def describe(code: int) -> str:
    if code == -signal.SIGALRM:
        return f"took longer than {SECONDS_PER_FAMILY} s"
    if code < 0:
        return f"the process died of {signal.Signals(-code).name}"
    return f"the process exited with code {code}"


# ---- the table


def summary(rows: list[Row]) -> str:
    counts = {"pass": 0, "refused": 0, "mismatch": 0, "error": 0, "crash": 0}
    for row in rows:
        counts[row["result"]] += 1
    return ", ".join(f"{count} {result}" for result, count in counts.items() if count)


def to_markdown(report: dict[str, Any]) -> str:
    rows = report["families"]
    passed = [row for row in rows if row["result"] == "pass"]
    files = {row["model_file"] for row in passed}

    def least(count: str) -> int:
        return min((row[count] for row in passed), default=0)

    lines = [
        "# Model families",
        "",
        f"mlx-lm {report['mlx_lm']} over mlx {report['mlx']} ({report['platform']}): "
        f"{summary(rows)}.",
        "",
        "A family passes when 32 greedy requests that arrive staggered, and 12 of them sent again, "
        "get exactly the tokens of mlx-lm's own single-sequence generation, while prompts are cut "
        "into chunks, sequences are preempted and cached blocks are evicted. The models are small "
        "and have random weights. Written by `tests/models/family_table.py`.",
        "",
        "## What people run",
        "",
        "A GPU's kernels write and read pages and states in place at the sizes that published "
        "models have; where MLX's operations compute something of a layer, the reason stands. "
        "That is what would be chosen on an NVIDIA GPU, by the specifications; few families have "
        "run on one.",
        "",
        "| models | family | served | by kernels on a GPU |",
        "|---|---|---|---|",
        *popular_rows({row["name"]: row for row in rows}),
        "",
        f"## Served: {len(passed)} configurations of {len(files)} model files",
        "",
        f"Every one of them went through at least {least('preemptions')} preemptions, "
        f"{least('evictions')} evicted blocks and {least('prefix_hits')} prompt tokens found in "
        "the prefix cache. A tie is an output that left the reference where its two best logits "
        "were closer than float32 can tell apart.",
        "",
        "| family | model file | ties | by kernels on a GPU |",
        "|---|---|---:|---|",
    ]
    lines += [
        f"| {row['name']} | {row['model_file']} | {row['ties']} | {by_kernels(row)} |"
        for row in passed
    ]
    lines += ["", "## Not served", "", "| family | result | what the engine says | why |"]
    lines += ["|---|---|---|---|"]
    for row in rows:
        if row["result"] != "pass":
            said = textwrap.shorten(row["reason"], 120, placeholder=" ...").replace("|", "\\|")
            lines.append(
                f"| {row['name']} | {row['result']} | {said} | {row['known_obstacle'] or ''} |"
            )
    return "\n".join([*lines, ""])


def popular_rows(rows: dict[str, Row]) -> Iterator[str]:
    from popular import POPULAR

    for models, name in POPULAR.items():
        row = rows[name]
        if row["result"] == "pass":
            yield f"| {models} | {name} | yes | {by_kernels(row)} |"
        else:
            yield f"| {models} | {name} | no: {row['known_obstacle'] or row['reason']} | |"


def by_kernels(row: Row) -> str:
    return "; ".join(row["not_by_kernels"]) or "yes"


if __name__ == "__main__":
    main()
