"""Each row is drawn from the distribution its own parameters describe."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from quire.engine.messages import SamplingParams
from quire.engine.step.sampler import plan_sampling, uniforms
from quire.engine.step.sampler import sample as sample_planned
from quire.engine.step_batch import Chunk
from quire.kernels.draws import Draws
from quire.kernels.sampling_reference import sample_reference
from quire.kernels.tree import to_device


def sample(logits: mx.array, rows: list[Chunk]) -> mx.array:
    inputs, draws = plan_sampling(rows, *logits.shape)
    return sample_planned(logits, to_device(inputs), draws, mx.array([0], mx.int32))


def row(params: SamplingParams, seed: int = 0, index: int = 0, banned: tuple[int, ...] = ()):
    return Chunk(None, 0, 0, 1, [0], -1, None, True, params, seed, index, list(banned))  # type: ignore[arg-type]


def oracle(logits: np.ndarray, p: SamplingParams) -> np.ndarray:
    """Temperature, then top-k, top-p and min-p one after the other, as their papers say."""
    scaled = logits.astype(np.float64) / p.temperature
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    order = np.argsort(-probs, kind="stable")
    keep = np.zeros(len(probs), bool)
    keep[order[: p.top_k or len(probs)]] = True
    probs = np.where(keep, probs, 0)
    probs /= probs.sum()
    before = np.cumsum(probs[order]) - probs[order]
    keep[order[before >= p.top_p]] = False
    keep &= probs >= p.min_p * probs.max()
    keep[order[0]] = True
    probs = np.where(keep, probs, 0)
    return probs / probs.sum()


PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=0.6),
    SamplingParams(temperature=1.7),
    SamplingParams(top_k=5),
    SamplingParams(top_p=0.8),
    SamplingParams(min_p=0.1),
    SamplingParams(temperature=1.3, top_k=12, top_p=0.9, min_p=0.02),
    SamplingParams(temperature=0.9, top_p=0.95, min_p=0.05),
    SamplingParams(top_p=0.0),
    SamplingParams(top_k=3, top_p=0.5),
]


@pytest.mark.parametrize("vocab", [40, 3000])
@pytest.mark.parametrize("params", PARAMS, ids=repr)
def test_frequencies_match_the_distribution(params: SamplingParams, vocab: int) -> None:
    logits = np.random.default_rng(1).normal(size=vocab).astype(np.float32) * 2.5
    draws, batch = 12000, 1000
    counts = np.zeros(vocab)
    for first in range(0, draws, batch):
        rows = [row(params, seed=11, index=i) for i in range(first, first + batch)]
        tokens = sample(mx.broadcast_to(mx.array(logits), (batch, vocab)), rows)
        counts += np.bincount(np.array(tokens), minlength=vocab)
    expected = oracle(logits, params)
    assert counts[expected == 0].sum() == 0, "drew a token that the filters exclude"
    assert chi_square_deviation(counts, expected) < 6


def chi_square_deviation(counts: np.ndarray, expected: np.ndarray) -> float:
    """How many standard deviations the statistic is above its mean: 6 keep a test from flaking.

    Tokens expected less than 20 times are counted together.
    """
    draws = counts.sum()
    common = expected * draws >= 20
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum()) * draws
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    freedom = max(1, len(wanted) - 1)
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    return float((statistic - freedom - 6) / np.sqrt(2 * freedom))


def test_a_million_draws() -> None:
    params = SamplingParams(temperature=1.2, top_k=90, top_p=0.97, min_p=0.001)
    logits = np.random.default_rng(4).normal(size=200).astype(np.float32) * 2
    counts = np.zeros(200)
    total, batch = 1_000_000, 50_000
    for first in range(0, total, batch):
        draws = Draws(
            temperature=np.full(batch, params.temperature),
            top_k=np.full(batch, params.top_k),
            top_p=np.full(batch, params.top_p),
            min_p=np.full(batch, params.min_p),
            uniform=uniforms([7] * batch, range(first, first + batch)),
        )
        tokens = sample_reference(mx.broadcast_to(mx.array(logits), (batch, 200)), draws)
        counts += np.bincount(np.array(tokens), minlength=200)
    expected = oracle(logits, params)
    assert counts[expected == 0].sum() == 0
    assert chi_square_deviation(counts, expected) < 6


def test_rows_of_all_kinds_draw_what_they_draw_alone() -> None:
    rng = np.random.default_rng(2)
    kinds = [*PARAMS, SamplingParams(temperature=0), SamplingParams(top_k=1)]
    logits = mx.array(rng.normal(size=(len(kinds) * 5, 3000)).astype(np.float32) * 2)
    rows = [row(kinds[i % len(kinds)], seed=i, index=i * 7) for i in range(logits.shape[0])]
    together = sample(logits, rows).tolist()
    alone = [sample(logits[i : i + 1], [r]).item() for i, r in enumerate(rows)]
    assert together == alone


def test_greedy_takes_the_best() -> None:
    logits = mx.array([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
    assert sample(logits, [row(SamplingParams(temperature=0))] * 2).tolist() == [1, 0]


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_banned_tokens_are_never_drawn(temperature: float, dtype: mx.Dtype) -> None:
    logits = mx.broadcast_to(mx.array([9.0, 8.0, 0.0, 0.0], dtype), (200, 4))
    params = SamplingParams(temperature=temperature)
    rows = [row(params, index=i, banned=(0, 1) if i % 2 else ()) for i in range(200)]
    tokens = sample(logits, rows).tolist()
    assert set(tokens[1::2]) <= {2, 3}
    assert set(tokens[::2]) <= {0, 1}
    assert logits.min().item() == 0, "the caller's logits have changed"


@pytest.mark.parametrize("temperature", [1e-6, 1e-40, 5e-324])
def test_a_tiny_temperature_is_greedy_and_finite(temperature: float) -> None:
    logits = mx.array([[0.0, 3.0, 2.9999]])
    rows = [row(SamplingParams(temperature=temperature), index=i) for i in range(50)]
    assert set(sample(mx.broadcast_to(logits, (50, 3)), rows).tolist()) == {1}


def test_uniforms_look_uniform_and_depend_on_both_arguments() -> None:
    for seeds, indices in ((range(4000), [3] * 4000), ([9] * 4000, range(4000))):
        u = uniforms(list(seeds), list(indices))
        assert u.dtype == np.float32
        assert u.min() >= 0
        assert u.max() < 1
        counts = np.histogram(u, bins=16, range=(0, 1))[0]
        assert ((counts - 250) ** 2 / 250).sum() < 50
        assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.08
    assert uniforms([-1], [0]) == uniforms([2**64 - 1], [0])
