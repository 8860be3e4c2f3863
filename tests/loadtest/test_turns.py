"""Measurements in turns: their statistics, options, and runs on a CPU."""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import mlx_lm
import pytest

from quire.loadtest import environment, published
from quire.loadtest.compare import LOAD_METRICS
from quire.loadtest.engine_steps import Plan
from quire.loadtest.grammar_cost import GrammarCostResult, GrammarTurn
from quire.loadtest.pairs import PairsResult, measure
from quire.loadtest.random_models import Model, make_model
from quire.loadtest.shapes import time_mlx_lm, time_products, touched_weights
from quire.loadtest.small_model import shrunk, write_model
from quire.loadtest.stats import LoadSummary, Median
from quire.loadtest.turns import Load, Turn, TurnsResult

ROOT = Path(__file__).parents[2]
RATE = LOAD_METRICS[0]


def test_the_interval_of_a_median_holds_it_as_often_as_it_says() -> None:
    draw = random.Random(0)
    for count in (7, 15):
        held = 0
        for _ in range(2000):
            median = Median.of(draw.lognormvariate(0, 1) for _ in range(count))
            held += median.low <= 1 <= median.high
        assert held / 2000 > 0.95
    assert Median.of([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)
    narrow = Median.of(range(15))
    assert (narrow.low, narrow.high) == (3, 11)


def test_a_load_is_read_or_refused() -> None:
    load = Load.parse("uniform:4:8:3:66:32")
    assert (load.name, load.rounds, load.options.workload.prompt_chars) == (
        *("uniform, 4 clients", 3),
        66,
    )
    assert load.options.workload.max_tokens == 32
    assert load.of_round(0).warmup == 4
    assert load.of_round(1).warmup == 0
    assert load.of_round(2).workload.seed == 2
    for wrong in ("odd:4:8:3", "mixed:4:8", "mixed:4:8:0", "mixed:4:8:1:5:5:5", "mixed:a:8:1"):
        with pytest.raises(ValueError, match=r"--load|invalid literal|not enough"):
            Load.parse(wrong)


def summary(rate: float, failed: int = 0) -> LoadSummary:
    errors = {"http 503": failed} if failed else {}
    counts = (8, 8 - failed, errors, 1.0, "usage", 100, 100, None, rate, 2 * rate, 8.0)
    return LoadSummary(*counts, None, None, None, None)


def test_rounds_with_failures_are_left_out_of_the_ratios() -> None:
    rates = [(100.0, 110.0), (100.0, 90.0), (0.0, 300.0)]
    turns = [
        Turn("mixed", number, server, summary(rate, failed=8 if rate == 0 else 0))
        for number, pair in enumerate(rates)
        for server, rate in zip(("old", "new"), pair, strict=True)
    ]
    result = TurnsResult("", {"old": None, "new": None}, turns, environment.describe())
    assert result.figures("mixed", RATE) == {"old": [100.0, 100.0], "new": [110.0, 90.0]}
    assert result.ratios("mixed", RATE)["old"] == pytest.approx((1.0, 0.9, 1.1))
    assert result.ratios("mixed", LOAD_METRICS[1]) == {}, "nobody's time is known"


def test_grammars_are_compared_round_by_round() -> None:
    turns = [
        GrammarTurn("none", 1, [], [5.0, 5.0], 1.0),
        GrammarTurn("half", 1, [6.0], [8.0], 1.0),
        GrammarTurn("all", 1, [6.0, 7.0], [], 1.0),
    ]
    groups = dict(GrammarCostResult("", 2, turns, environment.describe()).groups())
    assert list(groups.values()) == [[5.0], [7.0], [6.0], [8.0], [6.5]]


def test_published_models_are_cut_to_layers() -> None:
    assert published.published("Nemotron-3-Nano-30B-A3B", 6)["hybrid_override_pattern"] == "MEMEM*"
    with pytest.raises(ValueError, match="has 32 layers"):
        Model.parse("Qwen3.5-9B:33")
    with pytest.raises(ValueError, match="is none of"):
        Model.parse("Qwen9")


def test_a_small_model_of_a_published_kind_is_made_and_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = {
        **published.PUBLISHED["Qwen3.6-35B-A3B"],
        **{"hidden_size": 64, "num_hidden_layers": 4, "num_experts": 8, "num_experts_per_tok": 2},
        **{"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "vocab_size": 512},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32},
        **{"linear_num_value_heads": 2, "linear_num_key_heads": 1},
        **{"linear_key_head_dim": 32, "linear_value_head_dim": 32},
    }
    monkeypatch.setitem(published.PUBLISHED, "small", small)
    model = Model.parse("small")
    loaded = make_model(model)
    expert_bytes = 4 * 3 * 8 * 64 * 32 * 4  # layers, matrices, experts, sizes, float32
    embedding_bytes = 512 * 64 * 4
    for rows in (1, 3):
        unused = round(expert_bytes * 0.75**rows)
        expected = loaded.weight_bytes - embedding_bytes - unused
        assert touched_weights(loaded, small, rows) == pytest.approx(expected, abs=24)
    plan = Plan([(2, 8)], [[16]], steps=2, prompt_runs=1)
    assert len(time_products(loaded, small, 16, runs=1)) == 1
    assert set(time_mlx_lm(loaded, plan)) == {"decode 2x8", "prompts 2048"}


@pytest.mark.parametrize(
    "name",
    ["Qwen3.6-35B-A3B", pytest.param("Nemotron-3-Nano-30B-A3B", marks=pytest.mark.long)],
)
def test_a_small_model_of_a_kind_answers_in_text(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "small"
    write_model(folder, shrunk(name, 6))
    with pytest.raises(FileExistsError):
        write_model(folder, shrunk(name, 6))
    model, tokenizer = mlx_lm.load(str(folder))
    answer = mlx_lm.generate(model, tokenizer, [5, 6, 7], max_tokens=8)
    assert len(answer) == 8
    assert answer.isprintable()
    assert answer.isascii()


def test_two_versions_take_turns(tmp_path: Path) -> None:
    """Here of one source: each lies in a folder as a wheel would."""
    for name in ("old", "new"):
        package = tmp_path / name / "quire"
        package.mkdir(parents=True)
        for part in ("serve", "engine", "kernels", "cache", "deploy", "loadtest"):
            (package / part).symlink_to(ROOT / part)
    plan = argparse.Namespace(
        model=str(ROOT / "engine/demo/quire-demo"),
        decode=[(1, 8)],
        mixed=[(2, 8, 8)],
        prompts=[],
        steps=3,
        kv_cache_memory=None,
        rounds=2,
    )
    heard: list[int] = []

    def hear(so_far: PairsResult) -> None:
        heard.append(len(so_far.rounds))

    result = measure(plan, {name: str(tmp_path / name) for name in ("old", "new")}, hear)
    assert heard == [1, 2]
    assert set(result.ratios()) == {"decode 1x8", "mixed 2x8+8"}
    assert all(ratio["new"].value > 0 for ratio in result.ratios().values())
