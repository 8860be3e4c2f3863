"""What would go wrong with states of recurrent layers is noticed, and snapshots change nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from model_zoo_traffic import compare_with_reference

from quire.cache.state_pool import EMPTY_SLOT
from quire.cache.state_table import StateTable
from quire.engine.model.paged_model import PagedModel
from quire.engine.recurrent import convolution, plan, seam, states
from quire.engine.recurrent.plan import StatePlan
from quire.kernels.conv_window import Convolution
from quire.kernels.delta_steps import DeltaRows

BLOCK_SIZE = 16

pytestmark = pytest.mark.models


Change = Callable[[np.ndarray], np.ndarray]


def change_sources(monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    """Let layers read the states of other slots than those that the step names."""
    original = states.plan_states

    def changed(*args: Any) -> StatePlan:
        found = original(*args)
        segments = replace(found.segments, sources=change(found.segments.sources))
        rows = found.rows
        if rows is not None:
            rows = replace(rows, sources=change(rows.sources))
        return StatePlan(segments, rows)

    monkeypatch.setattr(states, "plan_states", changed)


@pytest.mark.parametrize("name", ["longcat_flash_ngram", "rwkv7", "baichuan_m1"])
def test_a_window_that_looks_one_row_further_back_is_noticed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = plan._windows

    def further_back(*args: Any) -> np.ndarray:
        return np.maximum(original(*args) - 1, 0)

    monkeypatch.setattr(plan, "_windows", further_back)
    assert compare_with_reference(name).mismatches


@pytest.mark.parametrize("name", ["lfm2", "qwen3_next"])
def test_a_convolution_that_looks_one_row_further_back_is_noticed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = convolution.apply_convolution

    def further_back(x: mx.array, conv: Convolution, *args: Any) -> Any:
        weight = mx.roll(conv.weight, -1, axis=1)
        return original(x, conv._replace(weight=weight), *args)

    monkeypatch.setattr(convolution, "apply_convolution", further_back)
    assert compare_with_reference(name).mismatches


@pytest.mark.parametrize("name", ["lfm2", "nemotron_h", "bailing_moe_linear"])
def test_exchanged_states_are_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def exchange(sources: np.ndarray) -> np.ndarray:
        kept = np.flatnonzero(sources > EMPTY_SLOT)
        exchanged = sources.copy()
        exchanged[kept] = sources[kept[::-1]]
        return exchanged

    change_sources(monkeypatch, exchange)
    assert compare_with_reference(name).mismatches


@pytest.mark.parametrize("name", ["lfm2", "nemotron_h", "bailing_moe_linear"])
def test_a_state_that_is_not_carried_on_is_noticed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_sources(monkeypatch, lambda sources: np.minimum(sources, EMPTY_SLOT))
    assert compare_with_reference(name).mismatches


@pytest.mark.parametrize("name", ["qwen3_next", "kimi_linear"])
def test_a_delta_rule_without_its_gate_is_noticed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = seam.apply_delta_rule

    def without_gate(rows: DeltaRows, *args: Any) -> Any:
        return original(rows._replace(g=mx.ones_like(rows.g)), *args)

    monkeypatch.setattr(seam, "apply_delta_rule", without_gate)
    assert compare_with_reference(name).mismatches


@pytest.mark.parametrize("off_by", [-BLOCK_SIZE, BLOCK_SIZE])
@pytest.mark.parametrize("name", ["lfm2", "nemotron_h"])
def test_a_snapshot_taken_for_that_of_another_block_is_noticed(
    name: str, off_by: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = StateTable._register_slot

    def misplaced(table: StateTable, position: int, slot: int, hash_before: Any) -> None:
        if position + off_by > 0:
            original(table, position + off_by, slot, hash_before)

    monkeypatch.setattr(StateTable, "_register_slot", misplaced)
    assert compare_with_reference(name).mismatches


@pytest.mark.parametrize("name", ["lfm2", "qwen3_next", "nemotron_h", "bailing_moe_v3", "mamba2"])
def test_a_snapshot_behind_every_block_changes_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fewer = compare_with_reference(name)
    monkeypatch.setattr(PagedModel, "state_spacing", BLOCK_SIZE)
    result = compare_with_reference(name)
    assert not result.mismatches
    assert result.hit_tokens >= fewer.hit_tokens > 0
    assert result.stats.states is not None
    assert result.stats.states.used == 0
