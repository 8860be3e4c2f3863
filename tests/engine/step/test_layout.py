"""The flattened step: every token of the batch has one row, in its own slot and context."""

from __future__ import annotations

from array import array

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.engine.messages import SamplingParams
from quire.engine.step.layout import Layout
from quire.engine.step_batch import Chunk, StepBatch

BLOCK = 4


def chunk(start: int, num_tokens: int, blocks: list[int], samples: bool = True) -> Chunk:
    tokens = [1000 * start + i for i in range(num_tokens)]
    params = SamplingParams()
    return Chunk(
        None, 0, start, num_tokens, tokens, -1, array("i", blocks), samples, params, 0, 0, []
    )  # type: ignore[arg-type]


@st.composite
def batches(draw: st.DrawFn) -> StepBatch:
    heads = [[500 + 40 * h + i for i in range(30)] for h in range(3)]
    chunks = []
    for index in range(draw(st.integers(1, 12))):
        is_decode = draw(st.booleans())
        start = draw(st.integers(0, 110))
        num_tokens = 1 if is_decode else draw(st.integers(2, 20))
        num_blocks = (start + num_tokens - 1) // BLOCK + 1
        shared = draw(st.integers(0, num_blocks - 1)) if draw(st.booleans()) else 0
        head = draw(st.sampled_from(heads))[:shared]
        own = [1000 + 40 * index + i for i in range(num_blocks - len(head))]
        chunks.append(chunk(start, num_tokens, head + own, draw(st.booleans())))
    chunks.sort(key=lambda c: c.num_tokens > 1)
    return StepBatch(0, chunks, sum(c.num_tokens == 1 for c in chunks))


@settings(max_examples=200, deadline=None)
@given(batches(), st.sampled_from(["grouped", "ungrouped", "padded", "tiled"]))
def test_every_token_has_its_row(batch: StepBatch, kind: str) -> None:
    layout = Layout(
        batch,
        BLOCK,
        group_decodes=kind == "grouped",
        padded=kind in ("padded", "tiled"),
        tiled=kind == "tiled",
    )
    assert layout.tiled == (kind == "tiled" and not layout.shared_runs)
    rows = {
        divmod(int(slot), BLOCK): (int(p), int(t))
        for slot, p, t in zip(layout.slot_mapping, layout.positions, layout.token_ids, strict=True)
    }
    if layout.padded:
        padding = len(layout.positions) - batch.num_tokens
        assert rows.pop((0, 0), None) == ((0, 0) if padding else None)
        num_decodes = 0 if layout.tiled else batch.num_decodes
        assert padding - layout.num_after == layout.num_decodes - num_decodes
    expected = {
        (c.block_ids[p // BLOCK], p % BLOCK): (p, c.token_ids[p - c.start])
        for c in batch.chunks
        for p in range(c.start, c.context_length)
    }
    assert rows == expected
    assert {id(c) for c in layout.sampled} == {id(c) for c in batch.sampled}
    for sampled, row in zip(layout.sampled, layout.sampled_rows, strict=True):
        assert layout.positions[row] == sampled.context_length - 1
        assert layout.token_ids[row] == sampled.token_ids[-1]
    ends = [0, *(c.first_row + c.num_rows for c in layout.prompts)]
    if layout.tiled:
        assert [c.first_row for c in layout.prompts] == ends[:-1]
        assert ends[-1] == batch.num_tokens
    for attended in layout.prompts:
        first = attended.first_row
        assert layout.positions[first] == attended.start
        slot = layout.slot_mapping[first]
        assert slot // BLOCK == attended.block_ids[attended.start // BLOCK]
        assert len(attended.block_ids) == -(-attended.context_length // BLOCK)


@settings(max_examples=200, deadline=None)
@given(batches())
def test_groups_cover_the_decodes_with_their_own_blocks(batch: StepBatch) -> None:
    layout = Layout(batch, BLOCK)
    tables = {c.block_ids[-1]: c for c in batch.chunks[: batch.num_decodes]}
    covered = 0
    for group in layout.groups:
        assert group.first_row == covered
        covered += group.num_rows
        shared = group.block_tables[:, : group.num_shared_blocks]
        assert (shared == shared[0]).all()
        for row, length in enumerate(group.context_lengths):
            num_blocks = -(-int(length) // BLOCK)
            assert group.num_shared_blocks < num_blocks
            own = group.block_tables[row, :num_blocks]
            source = tables[int(own[-1])]
            assert own.tolist() == source.block_ids.tolist()
            assert length == source.context_length
    assert covered == batch.num_decodes


def test_rows_with_a_long_common_prefix_share_it() -> None:
    common = list(range(1, 21))
    decodes = [chunk(4 * 20 + i, 1, [*common, 100 + i, 200 + i]) for i in range(4)]
    decodes[1:1] = [chunk(90, 1, list(range(300, 323)))]
    [alone, together] = Layout(StepBatch(0, decodes, 5), BLOCK).groups
    assert alone.num_shared_blocks == 0
    assert alone.num_rows == 1
    assert together.num_shared_blocks == 20
    assert together.num_rows == 4


def test_decodes_that_share_are_not_chunks_of_their_own() -> None:
    common = list(range(1, 21))
    decodes = [chunk(4 * 20 + i, 1, [*common, 100 + i, 200 + i]) for i in range(3)]
    batch = StepBatch(0, [*decodes, chunk(0, 6, [300, 301])], 3)
    options = {"group_decodes": False, "padded": True, "tiled": True}
    shared = Layout(batch, BLOCK, **options)
    assert not shared.tiled
    assert [(run.first_row, run.num_rows) for run in shared.shared_runs] == [(0, 3)]
    assert [c.num_rows for c in shared.prompts] == [6]
    alone = Layout(batch, BLOCK, share_decodes=False, **options)
    assert alone.tiled
    assert alone.num_decodes == 0
    assert [c.num_rows for c in alone.prompts] == [1, 1, 1, 6]


def test_rows_of_very_different_length_are_not_padded_to_one() -> None:
    decodes = [
        chunk(n, 1, [1000 * i + b for b in range(n // BLOCK + 1)])
        for i, n in enumerate([3, 4000, 5, 3900, 7], start=1)
    ]
    groups = Layout(StepBatch(0, decodes, 5), BLOCK).groups
    assert [g.num_rows for g in groups] == [3, 2]
    assert np.prod(groups[0].block_tables.shape) < 10


def test_what_most_blocks_are_saved_by_is_shared() -> None:
    """All begin with the same two blocks, some go on with one long prefix, some with another."""
    first, second = [1, 2, *range(10, 30)], [1, 2, *range(40, 70)]
    blocks = [first, second, [1, 2], first, second, first]
    tables = [[*shared, 100 + i] for i, shared in enumerate(blocks)]
    decodes = [chunk(BLOCK * len(table) - 1, 1, table) for table in tables]
    layout = Layout(StepBatch(0, decodes, 6), BLOCK, group_decodes=False)
    assert sorted(layout.shared_runs) == [(1, 3, 4 * 22), (4, 2, 4 * 32)]
    for run in layout.shared_runs:
        own = layout.decode_tables[run.first_row : run.first_row + run.num_rows]
        num_shared = run.num_tokens // BLOCK
        assert (own[:, :num_shared] == own[0, :num_shared]).all()
    # Where all share nearly as much as some do, one set is better than two.
    decodes = [chunk(BLOCK * 22 + 3, 1, [*range(1, 22), 50 + i % 2, 100 + i]) for i in range(4)]
    layout = Layout(StepBatch(0, decodes, 4), BLOCK, group_decodes=False)
    assert layout.shared_runs == [(0, 4, 4 * 21)]


@settings(max_examples=200, deadline=None)
@given(batches())
def test_runs_share_whole_blocks_and_have_more(batch: StepBatch) -> None:
    layout = Layout(batch, BLOCK, group_decodes=False)
    for run in layout.shared_runs:
        rows = slice(run.first_row, run.first_row + run.num_rows)
        shared = layout.decode_tables[rows, : run.num_tokens // BLOCK]
        assert run.num_rows > 1
        assert run.num_tokens % BLOCK == 0
        assert (shared == shared[0]).all()
        assert (layout.positions[rows] >= run.num_tokens).all()
