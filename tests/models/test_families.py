"""Paged, batched, preempted and resumed: every output equals mlx-lm's single-sequence output."""

from typing import Any

import pytest
from model_zoo import FAMILIES, UNPAGED, UNRUNNABLE, build
from model_zoo_traffic import compare_with_reference

from quire.engine.config import EngineConfig
from quire.engine.engine import Engine
from quire.engine.errors import UnsupportedModel
from quire.engine.model.seam import PagedLayer, WindowMask

# One of each kind of attention and feed-forward layer; the others run with the `models` marker, and
# some of those with windows in test_windows.py.
REPRESENTATIVE = [
    "llama",
    "qwen3",
    "qwen3_moe",
    "gemma3_text",
    "deepseek_v3",
    "qwen3_next",
    "nemotron_h",
    "lfm2",
]
AHEAD_WITH_SMALL_BLOCKS = {"llama", "gemma3_text", "deepseek_v3", "lfm2"}


def assert_equals_reference(name: str, block_size: int, encode_ahead: bool = False) -> None:
    result = compare_with_reference(name, block_size, encode_ahead=encode_ahead)
    for tie in result.ties:
        print(f"{name}: tie {tie}")
    assert not result.mismatches
    assert result.stats.preemptions > 0
    assert result.stats.cache.evictions > 0
    assert result.hit_tokens > 0
    assert result.stats.blocks_used == 0
    assert result.stats.states is None or result.stats.states.used == 0


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_representative_family_equals_reference(name: str):
    block_size, encode_ahead = (8, True) if name in AHEAD_WITH_SMALL_BLOCKS else (16, False)
    assert_equals_reference(name, block_size, encode_ahead)


@pytest.mark.models
@pytest.mark.parametrize("name", sorted(set(FAMILIES) - set(REPRESENTATIVE)))
def test_family_equals_reference(name: str):
    assert_equals_reference(name, 16)


@pytest.mark.models
@pytest.mark.parametrize("name", ["gemma3_text", "cohere2"])
def test_a_window_one_token_too_wide_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch):
    def wider(layer: PagedLayer, *args: Any, **kwargs: Any) -> WindowMask | None:
        mask = make_mask(layer, *args, **kwargs)
        return None if mask is None else WindowMask(mask.size + 1)

    make_mask = PagedLayer.make_mask
    monkeypatch.setattr(PagedLayer, "make_mask", wider)
    assert compare_with_reference(name).mismatches


@pytest.mark.models
@pytest.mark.parametrize("name", sorted(set(UNPAGED) - UNRUNNABLE))
def test_unpaged_family_is_refused_by_name(name: str):
    with pytest.raises(UnsupportedModel) as refusal:
        Engine(build(name), EngineConfig(num_blocks=8), name)
    assert refusal.value.name == name
    assert repr(name) in str(refusal.value)
    assert "\n" not in str(refusal.value)
