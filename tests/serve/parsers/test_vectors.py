"""Every family's answers, whole, by character and cut anywhere: the events joined are equal.

Every single cut is tried here, on the parsers alone; test_vectors_over_http.py sends each answer
through the three APIs in one way of cutting, by tokens, and for chats at once too.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serve.parsers.support import TOOLS, Answer, calls, factory, parse
from serve.parsers.vectors import VECTORS, Vector

MODES = {"text": (False, False), "tokens": (True, False), "special tokens": (True, True)}
# Families whose markers are ordinary words to a user, so that special tokens would lose some.
CASES = [
    pytest.param(vector, mode, id=f"{vector.family} {vector.name} {mode}")
    for vector in VECTORS
    for mode in MODES
    if vector.markers == "both" or vector.markers in mode
]
SHOWN_ONLY = ("6", "7", "quoted tags", "a call that is only thought of")


def run(vector: Vector, mode: str, cuts: list[int] | None = None) -> Answer:
    tokens, special = MODES[mode]
    made = factory(vector.family, tokens=tokens, special=special)
    text = made.markers.fold(vector.text)
    ends = [*sorted(cut % (len(text) + 1) for cut in cuts or []), len(text)]
    starts = [0, *ends[:-1]]
    pieces = [text[start:end] for start, end in zip(starts, ends, strict=True)]
    return parse(made, pieces, truncated=vector.cut, in_reasoning=vector.in_reasoning)


def skip_if_markers_are_words(vector: Vector, mode: str) -> None:
    if mode == "special tokens" and vector.name in SHOWN_ONLY:
        pytest.skip("the answer quotes markers, which special tokens cannot be shown as")


@pytest.mark.parametrize(("vector", "mode"), CASES)
def test_a_whole_answer(vector: Vector, mode: str) -> None:
    skip_if_markers_are_words(vector, mode)
    answer = run(vector, mode)
    assert calls(answer) == list(vector.calls)
    assert answer.content == vector.content
    assert answer.reasoning == vector.reasoning
    expected = len(vector.calls) - vector.cut * bool(vector.calls)
    assert answer.ended == (expected if vector.ended is None else vector.ended)
    if vector.ids:
        assert tuple(call.id for call in answer.calls) == vector.ids


@pytest.mark.parametrize(("vector", "mode"), CASES)
def test_by_character_and_at_every_single_cut(vector: Vector, mode: str) -> None:
    whole = run(vector, mode)
    assert run(vector, mode, list(range(len(vector.text)))) == whole
    for cut in range(len(vector.text)):
        assert run(vector, mode, [cut]) == whole


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_cut_anywhere(data: st.DataObject) -> None:
    vector = data.draw(st.sampled_from(VECTORS), label="vector")
    mode = data.draw(st.sampled_from(sorted(MODES)), label="mode")
    cuts = data.draw(st.lists(st.integers(0, 400), max_size=12), label="cuts")
    assert run(vector, mode, cuts) == run(vector, mode)


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_damaged_answers_are_read_alike_however_they_are_cut(data: st.DataObject) -> None:
    """Whatever a model writes: no exception, and streaming equals the whole."""
    first = data.draw(st.sampled_from(VECTORS), label="first")
    second = data.draw(st.sampled_from([v for v in VECTORS if v.family == first.family]))
    start, end = sorted(data.draw(st.tuples(st.integers(0, 300), st.integers(0, 300))))
    junk = data.draw(st.text(alphabet="{}[]\"'<>/=:,\\ \nfgsn1", max_size=6), label="junk")
    damaged = first.text[:start] + junk + second.text[end:]
    vector = Vector("", first.family, damaged, cut=data.draw(st.booleans()))
    mode = data.draw(st.sampled_from(sorted(MODES)), label="mode")
    cuts = data.draw(st.lists(st.integers(0, 800), max_size=12), label="cuts")
    whole = run(vector, mode)
    assert run(vector, mode, cuts) == whole
    assert all(call.name in TOOLS for call in whole.calls)
