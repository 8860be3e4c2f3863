"""What is drawn is what the parameters describe: in MLX operations and by the kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
from metal_sim import KernelFault, simulated_kernels

from quire.kernels import sampling
from quire.kernels.draws import Draws
from quire.kernels.gpu_kernel import GpuKernel
from quire.kernels.sample_tokens import samples_by_kernel
from quire.kernels.sampling import _compiled, sample_on_gpu, take_likeliest_on_gpu
from quire.kernels.sampling_reference import sample_reference

Sampler = Callable[[mx.array, Draws], mx.array]

# Temperature, top-k, top-p, min-p.
PARAMETERS = [
    (1.0, 0, 1.0, 0.0),
    (0.3, 0, 1.0, 0.0),
    (1e4, 0, 1.0, 0.0),  # all but uniform
    (1.0, 7, 1.0, 0.0),
    (1.0, 10**6, 1.0, 0.0),  # more than there are
    (2.0, 300, 1.0, 0.0),
    (1.0, 0, 0.9, 0.0),
    (1.0, 0, 1e-9, 0.0),  # the likeliest only
    (3.0, 0, 0.999, 0.0),
    (1.0, 0, 1.0, 0.1),
    (1.0, 0, 1.0, 1.0),  # the likeliest only
    (1.5, 40, 0.7, 0.0),
    (5.0, 500, 0.95, 0.02),
    (0.0, 0, 1.0, 0.0),
    (1.0, 1, 1.0, 0.0),
]


@pytest.fixture(autouse=True)
def few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulator takes one at a time."""
    monkeypatch.setattr(sampling, "_THREADS", 128)
    monkeypatch.setattr(sampling, "_MAX_STRETCHES", 3)


def draws_of(parameters: list[tuple[float, int, float, float]], seed: int) -> Draws:
    columns = [np.array(column) for column in zip(*parameters, strict=True)]
    numbers = np.random.default_rng(seed).integers(0, 2**24, len(parameters))
    numbers[:2] = 0, 2**24 - 1
    uniform = numbers.astype(np.float32) / np.float32(2**24)
    return Draws(columns[0].astype(np.float64), columns[1], columns[2], columns[3], uniform)


def one(draws: Draws, row: int) -> Draws:
    names = ("temperature", "top_k", "top_p", "min_p", "uniform")
    return Draws(*(getattr(draws, name)[row : row + 1] for name in names))


def distribution(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float
) -> np.ndarray:
    """By sorting, in float64; ties at a limit stay."""
    if temperature == 0 or top_k == 1:
        return (np.arange(len(logits)) == logits.argmax()).astype(float)
    weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    weights[weights < 2.0**-40] = 0
    descending = np.sort(weights)[::-1]
    if 0 < top_k < len(logits):
        weights[weights < descending[top_k - 1]] = 0
        descending = np.sort(weights)[::-1]
    before = np.cumsum(descending) - descending
    inside = before < top_p * descending.sum()
    inside[0] = True
    weights[weights < max(descending[inside].min(), min_p) * (1 - 1e-12)] = 0
    return weights / weights.sum()


def assert_drawn(tokens: mx.array, logits: mx.array, draws: Draws) -> None:
    """Each token is the one at its row's number in the cumulative distribution.

    Float32 rounding moves the steps of the cumulative distribution; 4e-6 is far below their height
    and far above the rounding, so a number that close to a step may fall on either side.
    """
    values = np.array(logits.astype(mx.float32))
    for row, token in enumerate(tokens.tolist()):
        chances = distribution(
            values[row],
            draws.temperature[row],
            int(draws.top_k[row]),
            draws.top_p[row],
            draws.min_p[row],
        )
        assert chances[token] > 0, f"row {row} drew a token that is excluded"
        upto = chances[: token + 1].sum()
        assert upto - chances[token] - 4e-6 <= draws.uniform[row] <= upto + 4e-6, f"row {row}"


def rows_of_all_kinds(vocab: int, repeats: int, seed: int) -> tuple[np.ndarray, Draws]:
    """Random logits, some with ties, banned tokens or a single token that is far ahead."""
    rng = np.random.default_rng(seed)
    parameters = PARAMETERS * repeats
    logits = rng.normal(size=(len(parameters), vocab)).astype(np.float32) * 2.5
    kinds = rng.integers(0, 6, len(parameters))
    for row, kind in enumerate(kinds):
        if kind == 1:
            logits[row] = np.round(logits[row])
        elif kind == 2:
            logits[row, rng.random(vocab) < 0.7] = -np.inf
            logits[row, rng.integers(vocab)] = 1.0
        elif kind == 3:
            logits[row] = -np.inf
            logits[row, rng.integers(vocab)] = -3.0
        elif kind == 4:
            logits[row] = 0.25
    return logits, draws_of(parameters, seed)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("vocab", [8, 999, 20_000])
def test_the_reference_inverts_the_distribution(vocab: int, dtype: mx.Dtype) -> None:
    values, draws = rows_of_all_kinds(vocab, 4, seed=vocab)
    logits = mx.array(values).astype(dtype)
    tokens = sample_reference(logits, draws)
    assert tokens.dtype == mx.int32
    assert_drawn(tokens, logits, draws)


def test_whole_vocabularies() -> None:
    # Top-k by blocks and by partition, top-p by several rounds of halving; a row is a piece.
    values, draws = rows_of_all_kinds(151_936, 1, seed=5)
    logits = mx.array(values)
    assert_drawn(sample_reference(logits, draws), logits, draws)


@pytest.mark.parametrize(
    ("vocab", "dtype"),
    [(8, mx.float32), (999, mx.float16), (3000, mx.bfloat16), (5000, mx.float32)],
)
def test_the_kernel_inverts_the_distribution(vocab: int, dtype: mx.Dtype) -> None:
    values, draws = rows_of_all_kinds(vocab, 2, seed=vocab + 1)
    logits = mx.array(values).astype(dtype)
    with simulated_kernels():
        tokens = sample_on_gpu(logits, draws)
    assert tokens.dtype == mx.int32
    assert_drawn(tokens, logits, draws)
    # The same integers, but for the last bit of an exponential.
    assert np.mean(np.array(tokens == sample_reference(logits, draws))) > 0.98


def test_other_threads_and_stretches_draw_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    values, draws = rows_of_all_kinds(999, 1, seed=8)
    logits = mx.array(values)
    with simulated_kernels(orders=1):
        tokens = sample_on_gpu(logits, draws).tolist()
        for threads, stretches in ((64, 1), (512, 7), (64, 32)):
            monkeypatch.setattr(sampling, "_THREADS", threads)
            monkeypatch.setattr(sampling, "_MAX_STRETCHES", stretches)
            assert sample_on_gpu(logits, draws).tolist() == tokens


def test_launches_are_put_together_once_for_each_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []

    def call(kernel: GpuKernel, inputs: list[mx.array], **options: object) -> list[mx.array]:
        """Stands in for a launch: the tokens are the random numbers, in thousandths."""
        launched.append(kernel.name)
        numbers = (inputs[1][:, 4] * 1000).astype(mx.int32)
        return [numbers] * len(kernel.outputs)

    monkeypatch.setattr(GpuKernel, "launch", call)
    _compiled.cache_clear()
    logits = mx.zeros((2, 999))
    for uniform in ([0.25, 0.5], [0.75, 0.125]):
        for filters, steps in (((0, 1.0), 1), ((0, 0.9), 4), ((7, 0.9), 7)):
            draws = draws_of([(1.0, *filters, 0.0)] * 2, 0)
            draws = dataclasses.replace(draws, uniform=np.array(uniform, np.float32))
            launched.clear()
            assert sample_on_gpu(logits, draws).tolist() == [1000 * number for number in uniform]
            first = uniform[0] == 0.25
            assert launched.count("sample_step") == (steps if first else 0)
    _compiled.cache_clear()


@pytest.mark.parametrize(("rows", "vocab"), [(1, 999), (40, 3000)])
def test_the_likeliest_is_the_first_of_equals(rows: int, vocab: int) -> None:
    values = np.random.default_rng(0).integers(-9, 9, (rows, vocab)).astype(np.float32)
    values[0] = -np.inf
    values[0, 7:9] = -1e30
    with simulated_kernels(orders=2):
        tokens = take_likeliest_on_gpu(mx.array(values).astype(mx.bfloat16))
    assert tokens.tolist() == values.argmax(axis=1).tolist()


@pytest.mark.parametrize("sampler", [sample_reference, sample_on_gpu])
def test_every_row_draws_what_it_draws_alone(sampler: Sampler) -> None:
    values, draws = rows_of_all_kinds(3000, 1, seed=3)
    logits = mx.array(values).astype(mx.bfloat16)
    with simulated_kernels(orders=1):
        together = sampler(logits, draws).tolist()
        alone = [sampler(logits[i : i + 1], one(draws, i)).item() for i in range(len(together))]
    assert together == alone


@pytest.mark.parametrize("sampler", [sample_reference, sample_on_gpu])
def test_logits_that_are_not_numbers_draw_some_token(sampler: Sampler) -> None:
    nothing = np.zeros((len(PARAMETERS) * 3, 999), np.float32)
    nothing[::3] = np.nan
    nothing[1::3] = -np.inf
    nothing[2::3, 5] = np.nan
    with simulated_kernels():
        tokens = np.array(sampler(mx.array(nothing), draws_of(PARAMETERS * 3, 1)))
    assert tokens.min() >= 0
    assert tokens.max() < 999


def test_a_million_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="too many"):
        samples_by_kernel(mx.zeros((1, 1 << 20)), filtered=False)


# By kernel: what is replaced by what; a number is that of a barrier that is left out.
MUTANTS: dict[str, tuple[str, int | tuple[str, str]]] = {
    **{f"no barrier {n} among peaks": ("sample_peaks", n) for n in range(1)},
    **{f"no barrier {n} in a step": ("sample_step", n) for n in range(6)},
    **{f"no barrier {n} in the draw": ("sample_draw", n) for n in range(2)},
    "one rank too many": ("sample_step", ("? top_k - 1 :", "? top_k :")),
    "low halves only": ("sample_step", ("values[o] += highs * 4096;", "")),
    "rest forgotten": ("sample_step", ("goal = found_rest[0];", "")),
    "one stretch only": ("sample_step", ("s < stretches; ++s", "s < 1; ++s")),
    "min-p ignored": ("sample_step", ("range_key < limit ? range_key : limit", "limit")),
    "temperature ignored": (
        "sample_step",
        ("loaded[u].values[e])) * scale", "loaded[u].values[e]))"),
    ),
    "what is kept is forgotten": (
        "sample_step",
        ("next_kept[own * 2 + index] = kept[own * 2 + index];", ""),
    ),
    "the next stretch": ("sample_draw", ("stretch * span + index", "(stretch + 1) * span + index")),
}
BARRIERS = {"sample_peaks": 1, "sample_step": 6, "sample_draw": 2}


@pytest.fixture(scope="module")
def few_rows() -> tuple[mx.array, Draws]:
    values, draws = rows_of_all_kinds(999, 2, seed=9)
    return mx.array(values), draws


def test_the_whole_kernel_passes_what_broken_ones_fail(few_rows: tuple[mx.array, Draws]) -> None:
    with simulated_kernels():
        assert_drawn(sample_on_gpu(*few_rows), *few_rows)


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_a_broken_kernel_is_caught(
    few_rows: tuple[mx.array, Draws], mutant: tuple[str, int | tuple[str, str]]
) -> None:
    kernel, change = mutant

    def mutate(text: str) -> str:
        if isinstance(change, tuple):
            return text.replace(*change)
        before, *parts = text.split("BARRIER();")
        if len(parts) != BARRIERS[kernel]:
            raise ValueError(f"{kernel} has {len(parts)} barriers, not the {BARRIERS[kernel]} here")
        joints = ["" if n == change else "BARRIER();" for n in range(len(parts))]
        return before + "".join(j + part for j, part in zip(joints, parts, strict=True))

    with simulated_kernels({kernel: mutate}), pytest.raises((KernelFault, AssertionError)):
        assert_drawn(sample_on_gpu(*few_rows), *few_rows)
