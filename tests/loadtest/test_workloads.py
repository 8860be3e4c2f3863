from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.loadtest.workloads import WORKLOADS, WorkloadName, WorkloadSpec, conversations

NAMES = st.sampled_from(WORKLOADS)


@given(NAMES, st.integers(0, 2**33), st.integers(1, 40))
def test_the_seed_decides_everything(name: WorkloadName, seed: int, requests: int) -> None:
    spec = WorkloadSpec(name=name, seed=seed, requests=requests)
    assert conversations(spec) == conversations(spec)
    other = WorkloadSpec(name=name, seed=seed + 1, requests=requests)
    assert conversations(spec) != conversations(other)


@given(NAMES, st.integers(1, 40), st.integers(0, 40))
def test_a_longer_run_begins_with_the_shorter_one(name: WorkloadName, n: int, more: int) -> None:
    short = conversations(WorkloadSpec(name=name, requests=n))
    assert conversations(WorkloadSpec(name=name, requests=n + more))[: len(short)] == short


@given(NAMES, st.integers(20, 3000), st.integers(0, 99))
def test_texts_are_ascii_without_loose_ends(name: WorkloadName, chars: int, seed: int) -> None:
    for conversation in conversations(
        WorkloadSpec(name=name, requests=4, prompt_chars=chars, seed=seed)
    ):
        for text in conversation.turns:
            assert text.isascii()
            assert text == text.strip()


def test_uniform_prompts_have_one_length_and_differ_from_the_start() -> None:
    made = conversations(WorkloadSpec(name="uniform", requests=100, prompt_chars=90))
    assert {len(c.turns[0]) for c in made} == {90}
    assert {c.max_tokens for c in made} == {64}
    assert len({c.turns[0][:8] for c in made}) == 100


def test_mixed_lengths_spread() -> None:
    made = conversations(WorkloadSpec(name="mixed", requests=500, max_tokens=64))
    lengths = [len(c.turns[0]) for c in made]
    assert min(lengths) >= 20
    assert max(lengths) <= 1500
    assert statistics.median(lengths) == pytest.approx(170, rel=0.15)
    assert max(lengths) > 1200
    outputs = [c.max_tokens for c in made]
    assert 4 <= min(outputs) < 8
    assert 120 < max(outputs) <= 128


def test_shared_prompts_share_the_system_message_only() -> None:
    made = conversations(WorkloadSpec(name="shared", requests=20, system_chars=500))
    assert {c.system for c in made} == {made[0].system}
    assert made[0].system is not None
    assert len(made[0].system) == 500
    assert len({c.turns[0] for c in made}) == 20


def test_multiturn_makes_whole_conversations() -> None:
    made = conversations(WorkloadSpec(name="multiturn", requests=10, turns=4))
    assert [len(c.turns) for c in made] == [4, 4, 4]
    assert len({text for c in made for text in c.turns}) == 12


def test_agents_share_instructions_and_go_on_with_what_tools_bring() -> None:
    made = conversations(WorkloadSpec(name="agent", requests=24))
    assert [len(c.turns) for c in made] == [12, 12]
    assert made[0].system == made[1].system
    assert made[0].system is not None
    assert len(made[0].system) == 4000
    results = [len(text) for c in made for text in c.turns[1:]]
    assert min(results) < 400
    assert max(results) > 1600
    assert len({text for c in made for text in c.turns}) == 24


def test_an_edit_keeps_half_of_a_message_and_changes_nothing_else() -> None:
    plain, edited = (
        conversations(WorkloadSpec(name="agent", requests=24, edit_turn=turn)) for turn in (None, 7)
    )
    for one, other in zip(plain, edited, strict=True):
        assert one.edit is None
        assert other.edit is not None
        assert one.turns == other.turns
        text = one.turns[other.edit.message]
        assert len(other.edit.text) == len(text)
        assert other.edit.text != text
        assert other.edit.text[: len(text) // 2] == text[: len(text) // 2]


@pytest.mark.parametrize(
    ("spec", "option"),
    [
        (WorkloadSpec(requests=0), "--requests"),
        (WorkloadSpec(max_tokens=0), "--max-tokens"),
        (WorkloadSpec(prompt_chars=19), "--prompt-chars"),
        (WorkloadSpec(prompt_chars=0), "--prompt-chars"),
        (WorkloadSpec(name="shared", system_chars=0), "--system-chars"),
        (WorkloadSpec(turns=0), "--turns"),
        (WorkloadSpec(edit_turn=1), "--edit-turn"),
        (WorkloadSpec(name="agent", edit_turn=12), "--edit-turn"),
        (WorkloadSpec(name="agent", edit_turn=0), "--edit-turn"),
    ],
)
def test_impossible_workloads_name_the_option(spec: WorkloadSpec, option: str) -> None:
    with pytest.raises(ValueError, match=option):
        conversations(spec)
