"""Grammars in the worker: states, masks, and what a bad grammar may do."""

from __future__ import annotations

import json
import re
import time

import numpy as np
import pytest
from grammar_walk import (
    EOS,
    allowed_tokens,
    compiler,
    draw_text,
    grammar_tokenizer,
    small_tokenizer,
    start,
)
from llguidance import LLMatcher

from quire.engine.errors import GrammarError
from quire.engine.grammar import GrammarCompiler, forbid, mask_words
from quire.engine.grammar_tokens import make_tokenizer

NUMBER = LLMatcher.grammar_from_regex("[0-9]{3}")
# Its automaton has far too many states, which shows only as text is drawn.
EXPLODING = LLMatcher.grammar_from_regex("(.*a.{60}|.*b.{61}|.*c.{62}|.*d.{63})e")


def ids(text: str) -> list[int]:
    return small_tokenizer().encode(text).ids


def accept(grammar: str, text: str):
    state = start(grammar)
    for token in ids(text):
        state.accept(token)
    return state


def test_a_state_knows_when_its_text_may_and_must_end() -> None:
    grammar = LLMatcher.grammar_from_lark('start: "ab" "c"?')
    state = accept(grammar, "ab")
    assert not state.is_finished
    assert set(allowed_tokens(state)) == {small_tokenizer().token_to_id(EOS), *ids("c")}
    (token,) = ids("c")
    state.accept(token)
    assert state.is_finished
    assert list(allowed_tokens(state)) == [small_tokenizer().token_to_id(EOS)]


def test_a_token_that_is_not_allowed_fails_the_state_for_good() -> None:
    state, other = start(NUMBER), start(NUMBER)
    with pytest.raises(GrammarError, match="the grammar failed"):
        state.accept(ids("x")[0])
    assert not state.is_finished
    with pytest.raises(GrammarError):
        state.check()
    # Its neighbours in a batch go on, and its own row is left open.
    out = np.zeros((2, mask_words(compiler().vocab_size)), np.int32)
    compiler().fill_masks([state, other], out)
    assert (out[0] == -1).all()
    assert not (out[1] == -1).any()
    other.check()


def test_rows_without_a_grammar_allow_everything_and_rows_do_not_mix() -> None:
    digits, letters = start(NUMBER), start(LLMatcher.grammar_from_regex("[a-z]+"))
    out = np.zeros((4, mask_words(compiler().vocab_size)), np.int32)
    compiler().fill_masks([None, digits, None, letters], out)
    assert (out[[0, 2]] == -1).all()
    compiler().fill_masks([None], out[:1])  # all have ended
    for row, state in ((1, digits), (3, letters)):
        bits = np.unpackbits(out[row].view(np.uint8), bitorder="little")
        assert list(np.flatnonzero(bits)) == list(allowed_tokens(state))
        texts = [small_tokenizer().decode([int(t)]) for t in allowed_tokens(state)]
        assert all(re.fullmatch("[0-9]+" if row == 1 else "[a-z]+", text) for text in texts)


def test_a_vocabulary_wider_than_the_tokenizer_is_never_drawn_beyond_its_end() -> None:
    width = small_tokenizer().get_vocab_size() + 100
    wide = make_tokenizer(small_tokenizer().to_str(), [0], width)
    grammars = GrammarCompiler(wide, threads=1)
    state = grammars.new_state(grammars.compile(LLMatcher.grammar_from_regex(".*")).result())
    out = np.zeros((1, mask_words(width)), np.int32)
    grammars.fill_masks([state], out)
    bits = np.unpackbits(out.view(np.uint8), bitorder="little")
    assert bits[: width - 100].any()
    assert not bits[width - 100 :].any()


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        ("start: missing", "unknown name"),
        ('{"grammars":[{"json_schema":{"not":{}}}]}', "Unimplemented keys"),
        ("start: <no-such-token>", "unknown special token"),
        ("", "failed"),
    ],
)
def test_a_wrong_grammar_is_an_error_of_its_own(grammar: str, reason: str) -> None:
    for _ in range(2):  # it is remembered
        with pytest.raises(GrammarError, match=reason) as error:
            compiler().compile(grammar).result()
        assert "\n" not in str(error.value)


def test_a_grammar_that_grows_too_large_fails_while_it_runs_and_harms_nobody() -> None:
    failing, fine = start(EXPLODING), start(NUMBER)
    out = np.zeros((2, mask_words(compiler().vocab_size)), np.int32)
    rng = np.random.default_rng(0)

    def grow() -> None:
        for _ in range(2000):
            compiler().fill_masks([failing, fine], out)
            failing.check()
            failing.accept(ids(rng.choice(list("abcd")))[0])

    with pytest.raises(GrammarError):
        grow()
    fine.check()
    assert draw_text(fine, rng).is_complete


def test_compiled_grammars_are_kept_and_the_oldest_forgotten() -> None:
    grammars = GrammarCompiler(grammar_tokenizer(), max_kept=2, threads=1)
    first = grammars.compile("start: /a/")
    second = grammars.compile("start: /b/")
    assert grammars.compile("start: /a/") is first
    grammars.compile("start: /c/")  # the oldest in use is the second now
    assert grammars.compile("start: /a/") is first
    assert grammars.compile("start: /b/") is not second


def test_compiling_leaves_the_interpreter_to_others() -> None:
    strings = {f"p{i}": {"type": "string", "pattern": f"[a-z]{{{i % 9 + 1}}}"} for i in range(800)}
    schema = {"type": "object", "properties": strings, "additionalProperties": False}
    pending = compiler().compile(LLMatcher.grammar_from_json_schema(json.dumps(schema)))
    turns = 0
    while not pending.done():
        turns += 1
        time.sleep(0)
    assert turns > 50  # hundreds; one or two if the lock were held
    state = compiler().new_state(pending.result())
    assert draw_text(state, np.random.default_rng(1), max_tokens=5).token_ids


def test_forbidden_tokens_leave_a_mask_unless_nothing_would_be_left() -> None:
    row = np.array([0b101, -(2**31)], np.int32)
    forbid(row, [0, 63])
    assert list(row) == [0b100, 0]
    forbid(row, [2, 7])
    assert list(row) == [0b100, 0]
