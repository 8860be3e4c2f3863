"""The page of what popular models keep is what `quire estimate` computes."""

from __future__ import annotations

from pathlib import Path

import pytest

from quire.engine.memory.budget import STEP_TOKENS
from quire.engine.memory.fit import Demand
from quire.loadtest.published import PUBLISHED, published
from quire.loadtest.result_file import load
from quire.loadtest.shapes import Shape, ShapesResult
from quire.serve.memory_plan import activations, memory
from quire.serve.model_facts import facts_of

PAGE = Path(__file__).parents[2] / "docs/models.md"
TOKENS = 32_768

NAMES = (
    "Qwen3.5-9B",
    "Qwen3.6-35B-A3B",
    "Nemotron-3-Nano-30B-A3B",
    "Gemma 4 31B",
    "Gemma 4 26B-A4B",
    "gpt-oss-20b",
)


def row(name: str) -> str:
    facts = facts_of(PUBLISHED[name], {})
    kept, width = facts.kept, facts.number_bytes
    needs = memory(facts, "metal", TOKENS, STEP_TOKENS["metal"])
    demand = Demand(
        *(TOKENS, 1, 0, 16, needs.kv_per_token, ""),
        window=kept.window,
        bytes_per_window_token=width * kept.window_token,
    )
    decoding = needs.kv_cache + demand.window_bytes(1) + needs.states
    pools = needs.kv_cache + needs.windows + needs.states
    whole = needs.kv_cache + TOKENS * width * kept.window_token + needs.states
    columns = [
        f"{needs.kv_per_token / 1024:.0f}",
        f"{width * kept.window_token / 1024:.0f}" if kept.window else "",
        f"{kept.window:,}" if kept.window else "",
        f"{needs.states / 3e6:.1f}" if needs.states else "",
        *(f"{size / 1e9:.2f}" for size in (decoding, pools, whole)),
    ]
    return " | ".join([f"| {name}", *columns]) + " |"


def test_the_page_has_what_the_estimate_says() -> None:
    rows = [row(name) for name in NAMES]
    assert [line for line in PAGE.read_text().splitlines() if line in rows] == rows


def test_windows_save_what_they_should() -> None:
    """At 32,768 tokens, in GB: 3.5 instead of 29.5, 0.9 instead of 7.4, 0.8 instead of 1.6."""
    found = {name: [float(c) for c in row(name).split(" | ")[-3:][:1]] for name in NAMES}
    assert 3.4 < found["Gemma 4 31B"][0] < 3.6
    assert 0.85 < found["Gemma 4 26B-A4B"][0] < 0.95
    assert 0.75 < found["gpt-oss-20b"][0] < 0.85


def shapes(name: str, *files: str) -> list[Shape]:
    """What was measured of a model, in several runs."""
    folder = PAGE.parents[1] / "loadtest/results"
    results = [load(folder / f"{file}.json", ShapesResult, "result of shapes") for file in files]
    return [s for result in results for s in result.shapes if s.model.startswith(f"{name}, ")]


@pytest.mark.parametrize(
    ("name", "label", "files"),
    [
        ("Qwen3.5-9B", "", ("h200-qwen3.5-9b-peaks", "h200-qwen3.5-9b-longer-peaks")),
        ("Qwen3.6-35B-A3B", ", 4 bits", ("h200-4bit-mixtures",)),
        ("Nemotron-3-Nano-30B-A3B", ", 26 of its layers", ("h200-glm-nemotron",)),
        ("Gemma 4 26B-A4B", ", 15 of its layers", ("h200-gemma4-26b-shapes",)),
        ("gpt-oss-20b", ", mxfp4", ("h200-4bit-mixtures",)),
    ],
)
def test_the_page_has_the_peaks_that_were_measured(
    name: str, label: str, files: tuple[str, ...]
) -> None:
    found = shapes(name, *files)
    held = found[-1].weight_bytes + found[-1].page_bytes
    layers = int(found[-1].model.split(", ")[1].split()[0])
    step = activations(facts_of(published(name, layers), {}), "cuda", 2048)
    peaks: dict[str, int] = {}
    for shape in found:  # of two runs the later, where both have it
        peaks |= shape.memory
    wanted = ("decode 1x1024", "decode 64x1024", "prompts 2048", "prompts 8192")
    sizes = [held, held + step, *(peaks[f"peak, {each}"] for each in wanted)]
    row = " | ".join([f"| {name}{label}", *(f"{size / 1e9:.2f}" for size in sizes)]) + " |"
    assert row in PAGE.read_text()
