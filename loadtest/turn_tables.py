"""Tables of what was measured in turns, in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from quire.loadtest.compare import LOAD_METRICS
from quire.loadtest.environment import Environment
from quire.loadtest.grammar_cost import GrammarCostResult
from quire.loadtest.pairs import PairsResult
from quire.loadtest.shapes import ShapesResult
from quire.loadtest.stats import Median, number
from quire.loadtest.turns import TurnsResult


def table(titles: Sequence[str], rows: Sequence[Sequence[str]], text: int = 1) -> Iterator[str]:
    """The first ``text`` columns on the left, the others on the right."""
    yield f"| {' | '.join(titles)} |"
    yield "|" + "---|" * text + "---:|" * (len(titles) - text)
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""


def place(where: Environment) -> str:
    """A machine, its MLX, and the day."""
    machine = ", ".join(where.gpus) or f"{where.cpu_count} cores, no GPU"
    return f"{where.machine}, {machine}, MLX {where.packages.get('mlx', '?')}, {where.time[:10]}."


def turns(result: TurnsResult) -> Iterator[str]:
    """Medians of the rounds, and the last server beside each other one."""
    yield f"{place(result.environment)} {result.note}".rstrip() + "\n"
    *others, last = result.servers
    rows = []
    whole = [name for name in result.loads if result.figures(name, LOAD_METRICS[0])[last]]
    for name in whole:
        for line, metric in enumerate(LOAD_METRICS):
            figures = result.figures(name, metric)
            medians = [
                number(statistics.median(each)) if each else "-" for each in figures.values()
            ]
            ratios = result.ratios(name, metric)
            shown = [str(ratios.get(other, "-")) for other in others]
            what = f"{name}, {len(figures[last])} rounds" if line == 0 else ""
            rows.append([what, metric.label, *medians, *shown])
    titles = ["load", "", *result.servers, *(f"{last} vs {other} [95%]" for other in others)]
    yield from table(titles, rows, text=2)
    for name in whole:
        rates = result.figures(name, LOAD_METRICS[0])[last]
        yield f"- {name}, {last}, tokens/s in turn: {', '.join(map(number, rates))}"
    if failed := [name for name in result.loads if name not in whole]:
        yield f"- left out, as requests failed in every round: {'; '.join(failed)}"
    yield ""


def grammar_cost(result: GrammarCostResult) -> Iterator[str]:
    yield f"{place(result.environment)} {result.note}".rstrip() + "\n"
    plain = result.step("none")
    rows = []
    for label, found in result.groups():
        ratio = Median.of(new / old for new, old in zip(found, plain, strict=True))
        rows.append([label, number(statistics.median(found)), str(ratio)])
    titles = [f"{result.streams} streams", "ms between tokens", "vs no grammar [95%]"]
    yield from table(titles, rows)


def pairs(result: PairsResult) -> Iterator[str]:
    yield f"{place(result.environment)} {result.model}, {len(result.rounds)} rounds.\n"
    first, *others = result.starts
    rows = []
    for what, ratios in result.ratios().items():
        medians = [
            number(statistics.median(each.ms[name][what] for each in result.rounds))
            for name in (first, *others)
        ]
        rows.append([what, *medians, *(str(ratios[other]) for other in others)])
    titles = ["ms a step", first, *others, *(f"{first} / {other} [95%]" for other in others)]
    yield from table(titles, rows)


def shapes(result: ShapesResult) -> Iterator[str]:
    yield f"{place(result.environment)} {result.note}".rstrip() + "\n"
    rows = []
    for shape in result.shapes:
        held = shape.weight_bytes + shape.page_bytes
        for index, row in enumerate(shape.rows()):
            peak = shape.memory[f"peak, {row[0]}"]
            gb = [f"{size / 1e9:.2f}" for size in (peak, peak - held)]
            rows.append(["" if index else shape.model, *row, *gb])
    titles = [
        "model",
        "",
        "engine, ms",
        "mlx-lm, ms",
        "products, ms",
        "at least, ms",
        "engine / least",
        "peak, GB",
        "beside weights and pools",
    ]
    yield from table(titles, rows, text=2)
