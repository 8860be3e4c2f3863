"""The flattened step: every token of the batch has one row, in its own slot and context."""

from __future__ import annotations

from array import array

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.engine.attention.decode_rows import DecodeRows, Reach
from quire.engine.attention.mlx_pages import MlxPages
from quire.engine.attention.rows import Rows, round_rows
from quire.engine.messages import SamplingParams
from quire.engine.step_batch import Chunk, StepBatch
from quire.kernels.padding import pad_size
from quire.kernels.ragged import DecodeGroup

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


def laid_out(batch: StepBatch, kind: str) -> Rows:
    """As one of the backends would, or as all of them could."""
    decodes = DecodeRows.of(batch.chunks[: batch.num_decodes], BLOCK)
    if batch.num_decodes:
        decodes = decodes.clustered()
    if kind == "mlx":
        return MlxPages(BLOCK).lay_out(batch)
    if kind == "plain":
        return Rows(batch, decodes, BLOCK)
    count = batch.num_decodes
    num_decode_rows = count if kind == "chunks" else pad_size(count) if count else 0
    return Rows(
        batch,
        decodes,
        BLOCK,
        num_decode_rows=num_decode_rows,
        num_rows=round_rows(num_decode_rows + batch.num_tokens - count),
        decodes_as_chunks=kind == "chunks",
    )


@settings(max_examples=200, deadline=None)
@given(batches(), st.sampled_from(["mlx", "plain", "padded", "chunks"]))
def test_every_token_has_its_row(batch: StepBatch, kind: str) -> None:
    rows = laid_out(batch, kind)
    found = {
        divmod(int(slot), BLOCK): (int(p), int(t))
        for slot, p, t in zip(rows.full.slot_mapping, rows.positions, rows.token_ids, strict=True)
    }
    padding = len(rows) - batch.num_tokens
    assert padding == rows.num_padding_rows + rows.num_decode_rows - batch.num_decodes
    assert found.pop((0, 0), None) == ((0, 0) if padding else None)
    expected = {
        (c.block_ids[p // BLOCK], p % BLOCK): (p, c.token_ids[p - c.start])
        for c in batch.chunks
        for p in range(c.start, c.context_length)
    }
    assert found == expected
    for sampled, row in zip(batch.sampled, rows.logits_rows, strict=True):
        assert rows.positions[row] == sampled.context_length - 1
        assert rows.token_ids[row] == sampled.token_ids[-1]
        slot = sampled.block_ids[(sampled.context_length - 1) // BLOCK]
        assert rows.full.slot_mapping[row] // BLOCK == slot
    chunks = rows.full.chunks if kind == "chunks" else rows.full.prompts
    ends = [rows.num_decode_rows, *(c.first_row + c.num_rows for c in chunks)]
    if kind == "chunks":
        assert [c.first_row for c in chunks] == [0, *ends[1:-1]]
        assert ends[-1] == batch.num_tokens
    for attended in chunks:
        first = attended.first_row
        assert rows.positions[first] == attended.start
        slot = rows.full.slot_mapping[first]
        assert slot // BLOCK == attended.block_ids[attended.start // BLOCK]
        assert len(attended.block_ids) == -(-attended.context_length // BLOCK)


@settings(max_examples=200, deadline=None)
@given(batches(), st.sampled_from([4, 12, 32]))
def test_rows_of_chunks_see_their_own(batch: StepBatch, size: int) -> None:
    count = batch.num_decodes
    decodes = DecodeRows.of(batch.chunks[:count], BLOCK)
    rows = Rows(batch, decodes, BLOCK, reach=Reach(size, chunked=True))
    assert rows.windowed is not None
    assert (rows.windowed.slot_mapping == rows.full.slot_mapping).all()
    own = [(c, p) for c in batch.chunks for p in range(c.start, c.context_length)]
    seen = rows.windowed.chunks
    assert [c.first_row for c in seen] == [0, *np.cumsum([c.num_rows for c in seen])[:-1]]
    for attended in seen:
        for row in range(attended.num_rows):
            chunk, position = own[attended.first_row + row]
            slots = [
                attended.block_ids[p // BLOCK] * BLOCK + p % BLOCK
                for p in range(attended.start + row + 1)
            ]
            first = position // size * size
            assert slots == [
                chunk.block_ids[p // BLOCK] * BLOCK + p % BLOCK for p in range(first, position + 1)
            ]


def groups_of(batch: StepBatch) -> list[DecodeGroup]:
    backend = MlxPages(BLOCK)
    return backend.plan(backend.lay_out(batch)).full.groups


@settings(max_examples=200, deadline=None)
@given(batches())
def test_groups_cover_the_decodes_with_their_own_blocks(batch: StepBatch) -> None:
    tables = {c.block_ids[-1]: c for c in batch.chunks[: batch.num_decodes]}
    covered = 0
    for group in groups_of(batch):
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
    [alone, together] = groups_of(StepBatch(0, decodes, 5))
    assert alone.num_shared_blocks == 0
    assert alone.num_rows == 1
    assert together.num_shared_blocks == 20
    assert together.num_rows == 4


def test_rows_of_very_different_length_are_not_padded_to_one() -> None:
    decodes = [
        chunk(n, 1, [1000 * i + b for b in range(n // BLOCK + 1)])
        for i, n in enumerate([3, 4000, 5, 3900, 7], start=1)
    ]
    groups = groups_of(StepBatch(0, decodes, 5))
    assert [g.num_rows for g in groups] == [3, 2]
    assert np.prod(groups[0].block_tables.shape) < 10


def test_what_most_blocks_are_saved_by_is_shared() -> None:
    """All begin with the same two blocks, some go on with one long prefix, some with another."""
    first, second = [1, 2, *range(10, 30)], [1, 2, *range(40, 70)]
    blocks = [first, second, [1, 2], first, second, first]
    tables = [[*shared, 100 + i] for i, shared in enumerate(blocks)]
    decodes = [chunk(BLOCK * len(table) - 1, 1, table) for table in tables]
    rows = DecodeRows.of(decodes, BLOCK).clustered()
    runs = rows.runs(BLOCK)
    assert sorted(runs) == [(1, 3, 4 * 22), (4, 2, 4 * 32)]
    for run in runs:
        own = rows.tables[run.first_row : run.first_row + run.num_rows]
        num_shared = run.num_tokens // BLOCK
        assert (own[:, :num_shared] == own[0, :num_shared]).all()
    # Where all share nearly as much as some do, one set is better than two.
    decodes = [chunk(BLOCK * 22 + 3, 1, [*range(1, 22), 50 + i % 2, 100 + i]) for i in range(4)]
    assert DecodeRows.of(decodes, BLOCK).clustered().runs(BLOCK) == [(0, 4, 4 * 21)]


@settings(max_examples=200, deadline=None)
@given(batches())
def test_runs_share_whole_blocks_and_have_more(batch: StepBatch) -> None:
    if not batch.num_decodes:
        return
    rows = DecodeRows.of(batch.chunks[: batch.num_decodes], BLOCK).clustered()
    for run in rows.runs(BLOCK):
        among = slice(run.first_row, run.first_row + run.num_rows)
        shared = rows.tables[among, : run.num_tokens // BLOCK]
        assert run.num_rows > 1
        assert run.num_tokens % BLOCK == 0
        assert (shared == shared[0]).all()
        assert (rows.positions[among] >= run.num_tokens).all()
