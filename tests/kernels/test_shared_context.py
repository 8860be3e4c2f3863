"""Contexts that begin alike, read together: the exact Metal texts in the simulator, against
float64; broken ones; and how the shared tokens are cut."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest
from decode_case import BF16, F16, DecodeCase
from hypothesis import given, settings
from hypothesis import strategies as st
from metal_sim import KernelFault, build_all, changed, collected_texts, simulated_kernels

from quire.kernels import paged_prompt
from quire.kernels.decode_plan import DecodePlan, plan_items
from quire.kernels.heads import Scoring
from quire.kernels.page_arrays import PageArrays
from quire.kernels.paged_decode import paged_decode
from quire.kernels.ragged import SharedRun
from quire.kernels.shared_context import attend_shared, plan_shared


@dataclass(frozen=True)
class SharedCase(DecodeCase):
    """Rows of which those of each run begin with the same blocks.

    Results of shared parts of rows that share nothing stay what the simulator fills memory with.
    """

    runs: tuple[SharedRun, ...] = ()
    parts: frozenset[int] = frozenset([1])  # that shared tokens are cut into, by run

    @cached_property
    def _tokens(self) -> list[tuple[mx.array, mx.array]]:
        tokens = super()._tokens
        for first, count, n in self.runs:
            for row in range(first + 1, first + count):
                pairs = zip(tokens[first], tokens[row], strict=True)
                keys, values = (mx.concatenate([a[:n], b[n:]]) for a, b in pairs)
                tokens[row] = keys, values
        return tokens

    def _pages(self) -> tuple[mx.array, mx.array, mx.array]:
        keys, values, tables = super()._pages()
        for first, count, num_tokens in self.runs:
            shared = slice(num_tokens // self.block_size)
            for row in range(first + 1, first + count):
                # Nobody's blocks now.
                keys[tables[row, shared]] = mx.nan
                values[tables[row, shared]] = mx.nan
                tables[row, shared] = tables[first, shared]
        return keys, values, tables

    def plan(self) -> DecodePlan:
        plan = super().plan()
        lengths = np.array(self.lengths, np.int32)
        shared = plan_shared(self.runs, len(lengths), self.kv_heads * self.group, self.kv_heads)
        assert set(shared.num_parts[shared.num_parts > 0]) == self.parts
        items = np.array(plan.items)
        first_items = None
        if self.direct:
            items[:, 1], items[:, 3] = shared.num_tokens, shared.num_parts
        else:
            items, first_items = plan_items(lengths, None, self.split, shared)
        return DecodePlan(
            mx.array(items),
            None if first_items is None else mx.array(first_items),
            plan.simdgroups,
            plan.unroll_keys,
            mx.array(np.pad(shared.items, ((0, 2), (0, 0)))),  # as the engine pads them
            max(self.parts),
        )

    def run(self) -> mx.array:
        keys, values, tables = self._pages()
        queries, sinks = self._queries
        pages = PageArrays(keys, values, mx.zeros((1,), mx.int32))
        decoding = queries, pages, tables, self.plan(), Scoring(self.scale, sinks=sinks)
        with mock.patch.object(paged_prompt, "_num_stages", return_value=1):  # as on Metal
            shared = attend_shared(*decoding)
        assert shared is not None
        return paged_decode(*decoding, shared=shared)


# Row 0 shares nothing, nor do rows between the runs; own parts begin anywhere in a tile.
DIRECT = SharedCase(
    BF16,
    lengths=(20, 150, 137, 190, 1, 140, 131),
    runs=(SharedRun(1, 3, 136), SharedRun(5, 2, 64)),
    parts=frozenset([1, 2]),
    magnitude=2.0,
)
CUT = replace(
    DIRECT, dtype=F16, block_size=16, direct=False, split=16, sinks=True,
    lengths=(0, 150, 145, 190, 33, 140, 129), runs=(SharedRun(1, 3, 144), SharedRun(5, 2, 64)),
)  # fmt: skip
CASES = [
    DIRECT,
    CUT,
    replace(
        DIRECT, dims=(80, 72), group=7, sinks=True,
        lengths=(30, 25, 11, 9), runs=(SharedRun(0, 2, 24), SharedRun(2, 2, 8)),
        parts=frozenset([1]),
    ),
    # More rows than a tile of the shared part has; unequal head dims.
    replace(
        CUT, dims=(192, 128), group=16, kv_heads=1, block_size=32, split=32,
        lengths=(65, 97, 70, 130, 66, 79), runs=(SharedRun(0, 6, 64),), parts=frozenset([1]),
    ),
]  # fmt: skip

# A change of a kernel's text, and a case it must break.
MUTANTS = {
    "decode: nothing of what is shared is added": (
        "paged_decode",
        "+ values[e] * factor",
        "",
        DIRECT,
    ),
    "decode: the shared weights' sum is not rescaled": (
        "paged_decode",
        "shared_stats[at * 2 + 1] * factor",
        "shared_stats[at * 2 + 1]",
        DIRECT,
    ),
    "decode: the row's own sum is not rescaled": (
        "paged_decode",
        "acc[g][i * 4 + e] * keep",
        "acc[g][i * 4 + e]",
        DIRECT,
    ),
    "decode: the row's own weights are not rescaled": (
        "paged_decode",
        "head_total[g] * keep + shared",
        "head_total[g] + shared",
        DIRECT,
    ),
    "decode: all take the shared results of row 1": (
        "paged_decode",
        "size_t(row * most_parts + p)",
        "size_t(most_parts + p)",
        DIRECT,
    ),
    "decode: every simdgroup adds all shared parts": (
        "paged_decode",
        "int p = simdgroup;",
        "int p = 0;",
        DIRECT,
    ),
    "decode: only the first shared part": (
        "paged_decode",
        "p < items[item * 4 + 3]",
        "p < 1",
        DIRECT,
    ),
    "decode: rows that share nothing take results too": (
        "paged_decode",
        "p < items[item * 4 + 3]",
        "p < most_parts",
        DIRECT,
    ),
    "decode: the highest shared score is forgotten": (
        "paged_decode",
        "head_peak[g] = highest;\nhead_total[g] = head_total[g] * keep + shared",
        "head_total[g] = head_total[g] * keep + shared",
        DIRECT,
    ),
    "merge: nothing of what is shared is added": (
        "paged_merge",
        "own + (MAY_SHARE && own > 0 ? items[begin * 4 + 3] : 0)",
        "own",
        CUT,
    ),
    "merge: sharing rows by another row's item": (
        "paged_merge",
        "items[begin * 4 + 3]",
        "items[row * 4 + 3]",
        CUT,
    ),
    "merge: rows that share nothing take results too": (
        "paged_merge",
        "items[begin * 4 + 3] : 0",
        "most_parts : 0",
        CUT,
    ),
    "merge: rows without context have an item": (
        "paged_merge",
        "MAY_SHARE && own > 0",
        "MAY_SHARE",
        replace(
            CUT,
            lengths=(150, 145, 190, 0),
            runs=(SharedRun(0, 3, 144),),
            parts=frozenset([2]),
        ),
    ),
    "merge: all take the shared results of row 1": (
        "paged_merge",
        "size_t(row) * most_parts",
        "size_t(1) * most_parts",
        CUT,
    ),
    "merge: weights' sums are not rescaled": (
        "paged_merge",
        "total * quire::exp2(peak - highest)",
        "total",
        CUT,
    ),
}


@pytest.fixture(scope="module")
def _compiled() -> None:
    texts = []
    with collected_texts() as found:
        for case in (*CASES, *(mutant[-1] for mutant in MUTANTS.values())):
            case.run()
    texts += found
    for kernel, old, new, case in MUTANTS.values():
        with collected_texts({kernel: changed(old, new)}) as found:
            case.run()
        texts += found
    build_all(texts)


@pytest.mark.usefixtures("_compiled")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_that_begin_alike(case: SharedCase) -> None:
    with simulated_kernels():
        case.check()


@pytest.mark.usefixtures("_compiled")
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str) -> None:
    kernel, old, new, case = MUTANTS[name]
    with simulated_kernels(orders=1):
        case.check()
    with (
        pytest.raises((AssertionError, KernelFault)),
        simulated_kernels({kernel: changed(old, new)}, orders=1),
    ):
        case.check()


# Rows that share nothing, rows of a run, and blocks that these share.
stretches = st.lists(
    st.tuples(st.integers(0, 3), st.integers(2, 70), st.integers(1, 60)), min_size=1, max_size=5
)


@settings(max_examples=50)
@given(stretches, st.sampled_from([8, 16, 32]), st.sampled_from([1, 2, 8]), st.integers(1, 20))
def test_every_row_sees_what_it_shares_once(
    sizes: list[tuple[int, int, int]], block_size: int, kv_heads: int, group: int
) -> None:
    runs, num_rows = [], 0
    for alone, count, blocks in sizes:
        runs.append(SharedRun(num_rows + alone, count, blocks * block_size))
        num_rows += alone + count
    shared = plan_shared(runs, num_rows, kv_heads * group, kv_heads)
    items, num_shared, most = shared.items, shared.num_tokens, int(shared.num_parts.max())
    assert items.dtype == np.int32
    seen: dict[int, list[range]] = {row: [] for row in range(num_rows)}
    results: dict[int, list[int]] = {row: [] for row in range(num_rows)}
    for first, count, position, table, begin, end, result, distance in items.tolist():
        (run,) = (r for r in runs if r.first_row <= first < r.first_row + r.num_rows)
        assert count <= run.first_row + run.num_rows - first
        assert 0 < count * -(-group // -(-group // 16)) <= 64  # rows of a threadgroup
        assert 0 <= table - run.first_row < run.num_rows
        assert 0 <= begin < end <= run.num_tokens <= position + 1  # no key is behind a row
        for token in range(count):
            seen[first + token].append(range(begin, end))
            results[first + token].append(result + token * distance)
    for row in range(num_rows):
        stretch = [key for part in sorted(seen[row], key=lambda p: p.start) for key in part]
        assert stretch == list(range(num_shared[row]))
        mine = range(row * most, row * most + shared.num_parts[row])
        assert sorted(results[row]) == list(mine)
    own, first_items = plan_items(num_shared + 300, None, 128, shared)
    for row in range(num_rows):
        mine_only = own[first_items[row] : first_items[row + 1]]
        assert mine_only[0, 1] == num_shared[row]
        assert (mine_only[:, 3] == shared.num_parts[row]).all()
        assert (mine_only[1:, 1] == mine_only[:-1, 2]).all()
        assert mine_only[-1, 2] == num_shared[row] + 300
