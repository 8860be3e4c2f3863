"""What would go wrong with states of recurrent layers is noticed, and snapshots change nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from model_zoo_traffic import compare_with_reference

from quire.cache.state_pool import EMPTY_SLOT
from quire.cache.state_table import StateTable
from quire.engine.model.paged_model import PagedModel
from quire.engine.recurrent import plan, seam, states
from quire.engine.recurrent.layer import StateHandle
from quire.engine.recurrent.plan import StatePlan

BLOCK_SIZE = 16

pytestmark = pytest.mark.models


def change_plan(change: Callable[[StatePlan], StatePlan]) -> Callable[..., StatePlan]:
    original = states.plan_states

    def changed(*args: Any) -> StatePlan:
        return change(original(*args))

    return changed


@pytest.mark.parametrize("name", ["lfm2", "qwen3_next", "longcat_flash_ngram"])
def test_a_window_that_looks_one_row_further_back_is_noticed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = plan._windows

    def further_back(*args: Any) -> np.ndarray:
        return np.maximum(original(*args) - 1, 0)

    monkeypatch.setattr(plan, "_windows", further_back)
    assert compare_with_reference(name).mismatches


@pytest.mark.parametrize("name", ["lfm2", "nemotron_h", "bailing_moe_linear"])
def test_exchanged_states_are_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exchanged = change_plan(lambda found: replace(found, sources=found.sources[::-1].copy()))
    monkeypatch.setattr(states, "plan_states", exchanged)
    assert compare_with_reference(name).mismatches


@pytest.mark.parametrize("name", ["lfm2", "nemotron_h", "bailing_moe_linear"])
def test_a_state_that_is_not_carried_on_is_noticed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = change_plan(lambda p: replace(p, sources=np.full_like(p.sources, EMPTY_SLOT)))
    monkeypatch.setattr(states, "plan_states", empty)
    assert compare_with_reference(name).mismatches


@pytest.mark.parametrize("name", ["qwen3_next", "kimi_linear"])
def test_a_delta_rule_without_its_gate_is_noticed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = seam.scan

    def without_gate(function: Any, handle: StateHandle, rows: Sequence[mx.array]) -> Any:
        q, k, v, gate, beta = rows
        return original(function, handle, [q, k, v, mx.ones_like(gate), beta])

    monkeypatch.setattr(seam, "scan", without_gate)
    assert compare_with_reference(name).mismatches


@pytest.mark.parametrize("off_by", [-BLOCK_SIZE, BLOCK_SIZE])
@pytest.mark.parametrize("name", ["lfm2", "nemotron_h"])
def test_a_snapshot_taken_for_that_of_another_block_is_noticed(
    name: str, off_by: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = StateTable._register

    def misnamed(table: StateTable, position: int, slot: int, name_before: Any) -> None:
        if position + off_by > 0:
            original(table, position + off_by, slot, name_before)

    monkeypatch.setattr(StateTable, "_register", misnamed)
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
