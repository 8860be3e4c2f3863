"""Rotation, page write and decode attention in one launch, by its exact Metal text."""

from __future__ import annotations

from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
import pytest
from decode_case import BF16, F16, F32, GARBAGE, LIMITS, to_float64
from metal_sim import KernelFault, changed, compiled_ahead, simulated_kernels

from quire.kernels.decode_plan import DecodePlan, plan_items
from quire.kernels.heads import Scoring
from quire.kernels.page_arrays import PageArrays
from quire.kernels.paged_decode import paged_decode, rotate_and_decode
from quire.kernels.rotate import HeadNorms, ProjectedRows, Rotary, rotate_and_write


@dataclass(frozen=True)
class Case:
    """Rows of ``lengths`` tokens, the last of which is new; slots of no token are NaN."""

    dtype: mx.Dtype = F32
    head_dim: int = 64
    rotary_dims: int = 64
    traditional: bool = False
    norms: bool = True
    group: int = 2
    kv_heads: int = 2
    block_size: int = 8
    simdgroups: int = 2
    lengths: tuple[int, ...] = (1, 16, 17, 43)
    split: int = GARBAGE  # tokens of a work item
    window: int | None = None

    def run(self, joined: bool) -> tuple[mx.array, mx.array, mx.array]:
        """The output and both page arrays, by one launch or by two."""
        rng = np.random.default_rng(0)
        size, heads = self.block_size, self.kv_heads * (self.group + 2)
        needed = [-(-n // size) for n in self.lengths]
        ids = rng.permutation(np.arange(1, sum(needed) + 1))
        tables = np.full((len(needed), max(needed)), GARBAGE, np.int32)
        shape = sum(needed) + 1, self.kv_heads, size, self.head_dim
        both = np.full((2, *shape), np.nan, np.float32)
        slots = []
        for row, n in enumerate(self.lengths):
            blocks = ids[sum(needed[:row]) :][: needed[row]]
            tables[row, : needed[row]] = blocks
            for position in range(n - 1):
                new = rng.normal(size=(2, self.kv_heads, self.head_dim))
                both[:, blocks[position // size], :, position % size] = new
            slots.append(blocks[(n - 1) // size] * size + (n - 1) % size)
        keys, values = (mx.array(pages).astype(self.dtype) for pages in both)
        qkv = mx.array(rng.normal(size=(len(needed), heads * self.head_dim))).astype(self.dtype)
        weights = mx.array(rng.normal(1, 0.3, (2, self.head_dim))).astype(self.dtype)
        frequencies = 10000.0 ** -(np.arange(0, self.rotary_dims, 2) / self.rotary_dims)
        rotary = Rotary(
            mx.array(frequencies.astype(np.float32)), self.rotary_dims, self.traditional
        )
        norms = HeadNorms(weights[0], weights[1], 1e-3) if self.norms else None
        positions = mx.array(np.array(self.lengths, np.int32) - 1)
        projected = ProjectedRows(qkv, positions, mx.array(np.array(slots, np.int32)))
        pages = PageArrays(keys, values, mx.array([1]))
        decoding = mx.array(tables), self.plan(), Scoring(self.head_dim**-0.5, self.window)
        if joined:
            output = rotate_and_decode(projected, pages, *decoding, rotary, norms)
            return output, keys, values
        queries, pages = rotate_and_write(projected, pages, rotary, norms, keep_rows=False)
        return paged_decode(queries, pages, *decoding), keys, values

    def plan(self) -> DecodePlan:
        lengths = np.array(self.lengths, np.int32)
        items, first_items = plan_items(lengths, self.window, min(self.split, 1 << 20))
        merged = mx.array(first_items) if self.split < max(self.lengths) else None
        return DecodePlan(mx.array(items), merged, self.simdgroups, 2)

    def check(self) -> None:
        expected, got = self.run(joined=False), self.run(joined=True)
        largest = np.abs(to_float64(expected[0])).max(axis=-1, keepdims=True)
        error = np.abs(to_float64(got[0]) - to_float64(expected[0]))
        assert (error <= LIMITS[self.dtype] * largest).all()
        for ours, theirs in zip(got[1:], expected[1:], strict=True):
            np.testing.assert_array_equal(to_float64(ours), to_float64(theirs))


DIRECT = Case()
CUT = replace(DIRECT, split=16)
# So that the newest token often has the highest score.
SHORT = replace(DIRECT, lengths=(2, 3, 2, 4))
CASES = [
    DIRECT,
    SHORT,
    CUT,
    replace(CUT, window=11, norms=False),
    Case(F16, 128, 128, True, group=4, kv_heads=1, simdgroups=4, lengths=(9, 16)),
    Case(BF16, 128, 64, norms=False, block_size=16, lengths=(1, 33), split=16),
    # The second threadgroup of a key head has one query head less.
    Case(F32, 80, 32, True, group=9, kv_heads=1, lengths=(3, 20)),
]

# A change of the kernel's text, and a case it must break.
MUTANTS = {
    "the newest token is left out": ("is_newest && simdgroup == 0", "false", DIRECT),
    "every simdgroup adds it": ("is_newest && simdgroup == 0", "is_newest", DIRECT),
    "every item adds it": ("&& end == int(positions[row]) + 1", "", CUT),
    "its place in the pages is read too": ("is_newest ? end - 1 : end", "end", DIRECT),
    "one more token is not read": ("is_newest ? end - 1", "is_newest ? end - 2", DIRECT),
    "the slot of row 0": ("slot_mapping[row]", "slot_mapping[0]", DIRECT),
    "keys normed as queries": ("h < GROUP ? query_norm : key_norm", "query_norm", DIRECT),
    "keys are not turned": ("if (h <= GROUP)", "if (h < GROUP)", DIRECT),
    "values are turned": ("if (h <= GROUP)", "if (true)", DIRECT),
    "the key of head 0": ("(h - GROUP) * KV_HEADS + kv_head", "(h - GROUP) * KV_HEADS", DIRECT),
    "the value is the key": ("fresh[(GROUP + 1) * KEY_PACKS", "fresh[GROUP * KEY_PACKS", DIRECT),
    "older weights are not scaled": ("* keep + factor;", "+ factor;", SHORT),
    "older sums are not scaled": ("* keep + value[e]", "+ value[e]", SHORT),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    with compiled_ahead():
        for case in CASES:
            case.run(joined=False)
            case.run(joined=True)


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_one_launch_gives_what_two_give(case: Case) -> None:
    with simulated_kernels():
        case.check()


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str) -> None:
    old, new, case = MUTANTS[name]
    with simulated_kernels():
        expected = case.run(joined=False)
    with simulated_kernels({"paged_decode": changed(old, new)}):
        try:
            got = case.run(joined=True)
            mx.eval(got)
        except KernelFault:
            return
    near = [
        np.allclose(to_float64(a), to_float64(b), rtol=1e-4, atol=1e-4, equal_nan=True)
        for a, b in zip(got, expected, strict=True)
    ]
    assert not all(near)
