"""The page of measurements, docs/measuring.md, written from the raw results beside this file.

`python -m quire.loadtest.measuring` writes it anew.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from quire.loadtest.compare import comparisons
from quire.loadtest.grammar_cost import GrammarCostResult
from quire.loadtest.kernels.results import CaseResult, KernelsResult, load_kernels
from quire.loadtest.kernels.table import baselines
from quire.loadtest.pairs import PairsResult
from quire.loadtest.result_file import load
from quire.loadtest.results import CompareResult, LoadResult, load_result
from quire.loadtest.shapes import ShapesResult
from quire.loadtest.stats import number
from quire.loadtest.turn_tables import grammar_cost, pairs, place, shapes, table, turns
from quire.loadtest.turns import TurnsResult

_ROOT = Path(__file__).parent.parent
_RESULTS = _ROOT / "loadtest" / "results"
_PAGE = _ROOT / "docs" / "measuring.md"
_NOT_TIMES = {"model_families.json"}  # what `make test-models` writes

_HEAD = """\
# Measurements

Every table is made of one raw file in [loadtest/results](../loadtest/results), by
`python -m quire.loadtest.measuring`; tests compare this page with them. Above each stand the
command that measured it, as it was called then, and the machine. How the figures are taken:

- Servers are compared in turns within one run, each freshly started, with the same texts; figures
  are medians of the rounds that did not fail. A ratio above 1 says that the first one is better.
  Tables with an interval behind a ratio are of servers that ran beside each other, by turns; the
  ratio is the median of the rounds, above 1 where the last one is better, and the interval holds
  the true median with 95% probability or more (of fewer than six rounds it is that of all).
- Kernels are timed in chains, each call on the result of the one before, so that what is timed is
  really computed; figures are medians, and a ratio above 1 says that the kernel is faster.
- Steps are medians of many, of the engine beside mlx-lm's own batch, or before and after a change.
- Hosts of one name differ in speed: compare within a table, not between two.
- The models have random weights and the sizes of real ones: `quire bench make-model bench-model`,
  `quire bench make-model qwen3-0.6b --shape qwen3-0.6b`, and qwen3-8b likewise.

To measure your own machine: `quire bench compare --help`, `quire bench kernels --help`,
`python -m quire.loadtest.steps --help`, or all in one by `quire report`.
"""


def measuring_page(folder: Path = _RESULTS) -> str:
    """The whole page, in Markdown.

    Raises:
        ValueError: a file in ``folder`` is not a result.
    """
    files = [path for path in sorted(folder.glob("*.json")) if path.name not in _NOT_TIMES]
    return "\n".join([_HEAD, *("\n".join(_section(path)) for path in files)])


def _section(path: Path) -> Iterator[str]:
    raw = json.loads(path.read_bytes())
    yield f"## {path.stem}\n"
    yield f"[Raw figures](../loadtest/results/{path.name}).\n"
    yield f"```sh\n{raw['command']}\n```\n"
    match raw.get("kind"):
        case "compare":
            result = load_result(path)
            assert isinstance(result, CompareResult)
            yield from _compare(result)
        case "kernels":
            yield from _kernels(load_kernels(path))
        case "loads":
            yield from _loads(raw)
        case "soak":
            yield from _soak(raw, path)
        case "gaps":
            yield from _gaps(raw)
        case "kills":
            yield from _kills(raw)
        case "turns":
            yield from turns(load(path, TurnsResult, "result of turns"))
        case "grammar cost":
            yield from grammar_cost(load(path, GrammarCostResult, "result of grammar_cost"))
        case "pairs":
            yield from pairs(load(path, PairsResult, "result of pairs"))
        case "shapes":
            yield from shapes(load(path, ShapesResult, "result of shapes"))
        case _:
            yield from _steps(raw)


def _compare(result: CompareResult) -> Iterator[str]:
    yield place(result.environment)
    for setup in result.servers:
        preload = f"LD_PRELOAD={setup.preload} " if setup.preload else ""
        yield f"- {setup.name}: `{preload}{setup.command}`"
    yield ""
    names = [setup.name for setup in result.servers]
    rows = []
    for workload in dict.fromkeys(run.workload for run in result.runs):
        for line, comparison in enumerate(comparisons(result, workload)):
            medians = [number(comparison.medians[name]) for name in names]
            what = _workload(result, workload) if line == 0 else ""
            rows.append([what, comparison.label, *medians, number(comparison.ratio)])
    yield from table(["load", "", *names, "ratio"], rows, text=2)
    if failed := [f"{run.server} {run.workload}" for run in result.runs if run.failure]:
        yield f"Failed, and left out: {', '.join(failed)}.\n"


def _workload(result: CompareResult, name: str) -> str:
    """What a load was, in a few words."""
    found = next((r.result for r in result.runs if r.workload == name and r.result), None)
    if not isinstance(found, LoadResult):
        return name
    spec = found.workload
    clients = f"{found.clients} client" + "s" * (found.clients != 1)
    return f"{spec.name}: {spec.requests} requests, {clients}, {spec.max_tokens} out"


def _kernels(result: KernelsResult) -> Iterator[str]:
    """A row for each way that an operation was computed in, beside those of others."""
    yield (
        f"{result.chip} ({result.device}), where a copy moves {number(result.copy_gb_per_s)} GB/s; "
        f"MLX {result.environment.packages.get('mlx', '?')}, {result.environment.time[:10]}.\n"
    )
    for operation in dict.fromkeys(case.operation for case in result.cases):
        cases = [case for case in result.cases if case.operation == operation]
        against = baselines(cases)
        rows = [row for case in cases for row in _ways(case, against)]
        titles = [operation, "", "us", "GB/s", *(f"vs {name}" for name in against)]
        yield from table(titles, rows, text=2)


def _ways(case: CaseResult, against: Sequence[str]) -> Iterator[list[str]]:
    for variant in case.variants:
        if variant.failure:
            yield [case.name, variant.name, "failed", *[""] * (1 + len(against))]
        elif not variant.is_baseline:
            ratios = [number(case.speed_against(name, variant)) for name in against]
            figures = number(variant.throughput), number(variant.gb_per_s)
            yield [case.name, variant.name, *figures, *ratios]


def _loads(raw: Mapping[str, Any]) -> Iterator[str]:
    """Loads of one server, one after the other."""
    about = [raw[key] for key in ("machine", "model", "note")]
    yield ". ".join(line[:1].upper() + line[1:] for line in about) + ".\n"
    rows = []
    for name, one in raw["loads"].items():
        summary = one["summary"]
        first, gap = summary["ttft_ms"], summary["itl_ms"]
        times = [number(of[p]) for of in (first, gap) for p in ("p50", "p99")]
        rows.append([name, number(summary["output_tokens_per_s"]), *times])
    titles = ["load", "tokens/s", "first token p50, ms", "p99", "gap p50, ms", "p99"]
    yield from table(titles, rows)
    if all(
        one["summary"].get("cacheable_prompt_tokens") is not None for one in raw["loads"].values()
    ):
        yield from _turns_of_loads(raw["loads"])


def _turns_of_loads(loads: Mapping[str, Any]) -> Iterator[str]:
    """What was cached of what could be, and times to the first token of first turns, second ones
    and so on."""
    rows = []
    for name, one in loads.items():
        times: dict[int, list[float]] = {}
        cached = known = 0
        for record in one["records"]:
            times.setdefault(record["turn"], []).append(record["chunk_ms"][0])
            known += record["cacheable_tokens"]
            # What is computed at the same time for another request is more than could be.
            cached += min(record["cached_tokens"], record["cacheable_tokens"])
        medians = [number(statistics.median(times[turn])) for turn in sorted(times)]
        rows.append([name, f"{cached / known:.2%}", *medians])
    longest = max(len(row) for row in rows)
    titles = ["load", "cached", "first token p50, ms: turn 1", *map(str, range(2, longest - 1))]
    yield from table(titles, [row + [""] * (longest - len(row)) for row in rows])


def _soak(raw: Mapping[str, Any], path: Path) -> Iterator[str]:
    """Quantities after the warm-up, and what was checked."""
    tally, where = raw["tally"], raw["environment"]
    requests = sum(tally["kinds"].values())
    about = [
        f"{where['machine']}, {where['cpu_count']} cores, MLX {where['packages'].get('mlx', '?')}, "
        f"{where['time'][:10]}",
        f"{number(raw['minutes'])} minutes, {requests:,} requests, {tally['hang_ups']:,} of whose "
        "clients left early",
    ]
    if faults := raw["faults"]:
        done = ", ".join(f"{count} {what}" for what, count in faults.items())
        about.append(f"{tally['lost']:,} met a worker that was gone or a model that had no room")
        about.append(f"Done to the server: {done}")
    yield ". ".join(about) + f". {raw.get('note', '')}".rstrip() + "\n"
    rows = []
    for trend in raw["trends"]:
        first, last = trend["first"], trend["last"]
        change = f"{last / first - 1:+.1%}" if first else "-"
        figures = [number(trend[key]) for key in ("first", "last", "least", "most")]
        rows.append([trend["name"], *figures[:2], change, *figures[2:]])
    titles = ["sizes in MiB", "first tenth", "last tenth", "change", "least", "most"]
    yield from table(titles, rows)
    for check in raw["checks"]:
        yield f"- {'holds' if check['holds'] else '**does not hold**'}: {check['name']}"
    yield ""
    if (plot := path.with_suffix(".svg")).exists():
        yield f"![Memory, threads and steps over time](../loadtest/results/{plot.name})\n"


def _gaps(raw: Mapping[str, Any]) -> Iterator[str]:
    """Turns of each kind together, beside those that were left alone."""
    where = raw["environment"]
    yield (
        f"{where['machine']}, {where['cpu_count']} cores, MLX {where['packages'].get('mlx', '?')}, "
        f"{where['time'][:10]}. {raw['streams']} streams; medians of the turns. "
        f"{raw.get('note', '')}".rstrip()
        + "\n"
    )
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for turn in raw["turns"]:
        by_name.setdefault(turn["name"], []).append(turn)
    disturbances = "p99_gap", "longest_gap", "p99_health", "longest_health"
    columns = "requests", "median_gap", *disturbances
    medians = {
        name: [statistics.median(turn[key] for turn in turns) for key in columns]
        for name, turns in by_name.items()
    }
    rows = []
    for name, figures in medians.items():
        count, median, *times = figures
        memory = by_name[name][-1]["memory_after"] / by_name[name][0]["memory_before"]
        cells = [
            cell
            for time, alone in zip(times, medians["alone"][2:], strict=True)
            for cell in (number(time), f"{time / alone:.2f}")
        ]
        rows.append([name, number(count), number(median), *cells, f"{memory - 1:+.1%}"])
    titles = ["disturbed by", "requests", "gap p50, ms"]
    for title in ("gap p99", "longest gap", "/health p99", "longest /health"):
        titles += [f"{title}, ms", "vs alone"]
    titles.append("front end's memory")
    yield from table(titles, rows)


def _kills(raw: Mapping[str, Any]) -> Iterator[str]:
    """By the moment of the kill; seconds after it."""
    where, end = raw["environment"], raw["end"]
    yield (
        f"{where['machine']}, {where['cpu_count']} cores, MLX {where['packages'].get('mlx', '?')}, "
        f"{where['time'][:10]}. Seconds from the signal, the longest of each kind. Of "
        f"{raw['polls']:,} polls of /health the longest took {number(raw['longest_poll'])} s; "
        f"{len(raw['failures'])} polls or streams failed otherwise. With the front end killed its "
        f"processes were gone after {number(end['processes_gone'])} s, its port was "
        f"{'free' if end['port_free'] else 'taken'}, and of its {end['left_behind']} folders the "
        f"next start left {end['left_after_next_start']}. {raw.get('note', '')}".rstrip()
        + "\n"
    )
    by_moment: dict[str, list[Mapping[str, Any]]] = {}
    for kill in raw["kills"]:
        by_moment.setdefault(kill["moment"], []).append(kill)
    by_moment["(SIGSTOP)"] = raw["stops"]
    rows = []
    for moment, kills in by_moment.items():
        errors = [kill["errors"] for kill in kills if kill["errors"] is not None]
        late = max(kill["spawned"] - kill["backoff"] for kill in kills)
        load = statistics.median(kill["ready"] - kill["spawned"] for kill in kills)
        shown = number(max(errors)) if errors else "-"
        requests = sum(kill["requests"] for kill in kills)
        rows.append(
            [moment, number(len(kills)), number(requests), shown, number(late), number(load)]
        )
    titles = ["moment", "kills", "requests lost", "error event", "new worker after the back-off"]
    yield from table([*titles, "load, median"], rows)


def _steps(raw: Mapping[str, Any]) -> Iterator[str]:
    """Steps of the engine beside mlx-lm's batch (`ms`), or before and after a change."""
    about = [raw[key] for key in ("machine", "blas", "model", "note") if raw.get(key)]
    yield ". ".join(line[:1].upper() + line[1:] for line in about) + ".\n"
    if "ms" in raw:
        times = {name: _pooled(runs) for name, runs in raw["ms"].items()}
    elif "pairs" in raw:
        times = {name: _pooled([pair[name] for pair in raw["pairs"]]) for name in _CHANGE}
    else:
        times = {name: _pooled([run["ms"] for run in raw[name]["runs"]]) for name in _CHANGE}
    first, second = ("bare", "engine") if "ms" in raw else _CHANGE
    rows = [
        [what, number(old), number(new), number(old / new)]
        for what, old in times[first].items()
        if (new := times[second].get(what)) is not None
    ]
    titles = ["mlx-lm's batch", "engine"] if "ms" in raw else list(_CHANGE)
    yield from table(["ms a step", *titles, "ratio"], rows)


_CHANGE = "before", "after"


def _pooled(runs: Sequence[Any]) -> dict[str, float]:
    """Medians over all steps of all runs; a run without names is of one kind of steps."""
    named = [run if isinstance(run, dict) else {"decode": run} for run in runs]
    pooled: dict[str, list[float]] = {}
    for run in named:
        for what, values in run.items():
            pooled.setdefault(what, []).extend(values)
    return {what: statistics.median(values) for what, values in pooled.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=_PAGE)
    parser.parse_args().out.write_text(measuring_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
