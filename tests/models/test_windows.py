"""Pages behind sliding windows and chunks are given to others while sequences run, and nothing
changes.

Windows are 24 tokens and chunks 32, prompts have up to 300 and come in chunks of up to 64.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import mlx.core as mx
import pytest
from model_zoo import build
from model_zoo_traffic import Comparison, compare_with_reference

from quire.cache.pages import LayerPages
from quire.cache.window_pool import WindowPool
from quire.cache.window_table import WindowTable
from quire.engine.attention.decode_rows import Reach
from quire.engine.config import EngineConfig
from quire.engine.engine import Engine
from quire.engine.errors import UnsupportedModel
from quire.engine.step_batch import Chunk

# Blocks of 16 tokens for windows: four sequences have two or three each, and a chunk has four. All
# that runs at a time has tokens in 25.
FEW_BLOCKS = 14
WINDOWED = [
    *("gemma3_text", "gemma4_text", "gemma4_k_eq_v", "gemma3n", "gpt_oss", "cohere2", "exaone4"),
    *("exaone_moe", "ministral3", "mistral3_ministral3", "llama_sliding", "olmo3", "afmoe", "gear"),
    *("iquestloopcoder", "muse_glimmer", "spark2_5", "plamo3", "laguna", "mellum", "step3p5"),
    *("mimo_v2_flash", "baichuan_m1", "recurrent_gemma", "llama4", "llama4_dense"),
]
REPRESENTATIVE = ["gemma4_text", "gpt_oss", "llama4"]


def spoil_free_blocks(engine: Engine) -> None:
    """Whoever reads a page of a window that was given back, and not written since, shows it."""
    pool = engine._pools.windows
    assert pool is not None
    free = mx.array(pool._free, mx.int32)
    for layer in engine.model.layers:
        if free.size and layer.pages.windowed:
            layer.pages.keys[free] = 1e3
            layer.pages.values[free] = 1e3


def compare(name: str, **settings: Any) -> Comparison:
    settings = {"num_window_blocks": FEW_BLOCKS, "after_step": spoil_free_blocks, **settings}
    result = compare_with_reference(name, **settings)
    assert result.stats.windows is not None
    assert result.stats.windows.used == result.stats.blocks_used == 0
    return result


def assert_nothing_changes(name: str) -> None:
    result = compare(name)
    assert not result.mismatches
    assert result.stats.preemptions > 0
    assert result.hit_tokens > 0


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_few_blocks_for_windows_change_nothing(name: str) -> None:
    assert_nothing_changes(name)


@pytest.mark.models
@pytest.mark.parametrize("name", sorted(set(WINDOWED) - set(REPRESENTATIVE)))
def test_few_blocks_for_windows_change_nothing_in_any_family(name: str) -> None:
    assert_nothing_changes(name)


@pytest.mark.models
@pytest.mark.parametrize("name", ["gemma3_text", "cohere2", "llama_sliding", "llama4"])
def test_steps_that_are_encoded_ahead_change_nothing(name: str) -> None:
    result = compare_with_reference(name, 8, encode_ahead=True, num_window_blocks=2 * FEW_BLOCKS)
    assert not result.mismatches
    assert result.hit_tokens > 0


@pytest.mark.models
@pytest.mark.parametrize("name", ["gemma3_text", "gpt_oss"])
def test_blocks_given_back_too_early_are_noticed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = WindowTable._first_needed

    def one_more(table: WindowTable, num_tokens: int) -> int:
        return min(original(table, num_tokens) + 1, len(table.block_ids))

    monkeypatch.setattr(WindowTable, "_first_needed", one_more)
    assert compare(name).mismatches


@pytest.mark.models
def test_a_hit_whose_window_is_a_block_short_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = WindowPool.deepest

    def shorter(pool: WindowPool, names: Any) -> tuple[int, list[int]]:
        depth, found = original(pool, names)
        return depth, found[1:]

    monkeypatch.setattr(WindowPool, "deepest", shorter)
    assert compare("gemma3_text").mismatches


@pytest.mark.models
def test_a_context_that_begins_behind_its_window_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def skipped(reach: Reach, position: int, block_size: int) -> int:
        return max(0, position - reach.size + 1 + block_size) // block_size

    monkeypatch.setattr(Reach, "skipped_blocks", skipped)
    assert compare("gemma3_text").mismatches


@pytest.mark.models
def test_prompts_cut_a_token_behind_a_chunk_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Reach.pieces

    def late(reach: Reach, chunk: Chunk) -> Iterator[range]:
        first, *others = original(reach, chunk)
        starts = [first.start, *(piece.start + 1 for piece in others)]
        starts = [start for start in starts if start < chunk.context_length]
        for start, end in pairwise([*starts, chunk.context_length]):
            yield range(start, end)

    monkeypatch.setattr(Reach, "pieces", late)
    assert compare("llama4").mismatches


def test_blocks_that_chunks_do_not_begin_with_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="chunks of 32 tokens, which blocks of 12 cut"):
        Engine(build("llama4"), EngineConfig(num_blocks=20, block_size=12))


@pytest.mark.models
def test_the_first_token_of_a_chunk_with_the_chunk_before_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = Reach.skipped_blocks

    def late(reach: Reach, position: int, block_size: int) -> int:
        return original(reach, max(0, position - 1), block_size)

    monkeypatch.setattr(Reach, "skipped_blocks", late)
    assert compare("llama4").mismatches


@pytest.mark.models
def test_keys_of_windows_in_the_slots_of_other_layers_are_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = LayerPages.__init__

    def not_windowed(pages: LayerPages, *args: Any, windowed: bool = False) -> None:
        original(pages, *args, windowed=False)

    monkeypatch.setattr(LayerPages, "__init__", not_windowed)
    # As many as others: MLX does not tell of indices behind the end.
    assert compare("gemma3_text", after_step=None, num_window_blocks=None).mismatches
