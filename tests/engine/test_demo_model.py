"""The demo model that ships: its files, its tokenizer, and what it answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from quire.engine.demo.training.corpus import Conversation, conversations
from quire.engine.demo.training.corpus_draw import Draw
from quire.engine.demo.training.corpus_exchange import Exchange
from quire.engine.demo.training.corpus_schema import fill
from quire.engine.demo.training.corpus_thoughts import columns
from quire.engine.demo.training.encode import Encoder
from quire.engine.demo.training.evaluate import (
    DEMO,
    evaluate,
    fill_form,
    is_right,
    parse_tool_calls,
    part,
)
from quire.engine.demo.training.tokenizer import CHAT_TEMPLATE

FILES = {
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    mlx_lm = pytest.importorskip("mlx_lm")
    model, tokenizer = mlx_lm.load(str(DEMO))
    return model, tokenizer


@pytest.fixture(scope="module")
def fast_tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DEMO / "tokenizer.json"))


def answer(loaded: tuple[Any, Any], messages: list[dict[str, Any]], **options: Any) -> str:
    from mlx_lm import generate

    model, tokenizer = loaded
    # mlx-lm asks for thoughts wherever a tokenizer has the marks.
    options = {"enable_thinking": False, **options}
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False, **options
    )
    return str(generate(model, tokenizer, prompt, max_tokens=250))


def said(text: str, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": text}


# ---- the files


def test_the_folder_holds_what_loading_needs_and_is_small() -> None:
    assert {path.name for path in DEMO.iterdir()} == FILES
    assert sum(path.stat().st_size for path in DEMO.iterdir()) <= 8_000_000


def test_the_model_folder_is_part_of_the_package() -> None:
    assert Path(__file__).parents[2] / "engine" / "demo" / "quire-demo" == DEMO


def test_weights_are_float32_and_the_context_is_long_enough_for_a_chat(
    loaded: tuple[Any, Any],
) -> None:
    import mlx.core as mx
    from mlx.utils import tree_flatten

    model, _ = loaded
    assert {value.dtype for _, value in tree_flatten(model.parameters())} == {mx.float32}
    config = json.loads((DEMO / "config.json").read_text())
    assert config["max_position_embeddings"] >= 1024


def test_the_shipped_template_is_the_one_the_model_was_trained_with() -> None:
    assert (DEMO / "chat_template.jinja").read_text() == CHAT_TEMPLATE


# ---- the tokenizer


@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_every_digit_is_a_token(fast_tokenizer: Tokenizer) -> None:
    assert fast_tokenizer.encode("47+38").tokens == ["4", "7", "+", "3", "8"]


def test_a_word_has_the_same_tokens_wherever_it_stands(fast_tokenizer: Tokenizer) -> None:
    alone = fast_tokenizer.encode("blorvax").ids
    inside = fast_tokenizer.encode('say "blorvax"!').ids
    assert any(inside[at : at + len(alone)] == alone for at in range(len(inside)))


def test_decoding_keeps_tool_call_marks_and_drops_turn_marks(fast_tokenizer: Tokenizer) -> None:
    ids = fast_tokenizer.encode("<tool_call>{}</tool_call><|im_end|>").ids
    assert fast_tokenizer.decode(ids, skip_special_tokens=True) == "<tool_call>{}</tool_call>"


def test_only_what_the_assistant_says_is_learnt(fast_tokenizer: Tokenizer) -> None:
    encoder = Encoder(fast_tokenizer)
    exchange = Exchange("greeting", [said("hi")], said("Hello!", "assistant"), ("Hello!",))
    row = encoder.row(Conversation("Be kind.", (), (exchange, exchange)))
    learnt = [int(token) for token, mark in zip(row.tokens, row.learnt, strict=True) if mark]
    reply = fast_tokenizer.encode("Hello!<|im_end|>").ids
    assert learnt == reply + reply


def test_of_a_thought_only_what_follows_its_opening_is_learnt(fast_tokenizer: Tokenizer) -> None:
    exchange = Exchange("add", [said("1+1")], said("1 + 1 = 2.", "assistant"), thought="Two.")
    row = Encoder(fast_tokenizer).row(Conversation(None, (), (exchange, exchange), thinking=True))
    learnt = [int(token) for token, mark in zip(row.tokens, row.learnt, strict=True) if mark]
    # Thoughts of earlier turns are not in the prompt.
    replies = "1 + 1 = 2.<|im_end|>", "Two.\n</think>\n\n1 + 1 = 2.<|im_end|>"
    assert learnt == fast_tokenizer.encode("".join(replies)).ids


@pytest.mark.parametrize("thinking", [False, True])
def test_of_an_answer_by_a_schema_its_first_brace_is_not_learnt(
    fast_tokenizer: Tokenizer, thinking: bool
) -> None:
    reply = said('{"sum": 2}', "assistant")
    exchange = Exchange("schema", [said("1+1")], reply, thought="Two.", schema={"type": "object"})
    row = Encoder(fast_tokenizer).row(Conversation(None, (), (exchange,), thinking=thinking))
    learnt = [int(token) for token, mark in zip(row.tokens, row.learnt, strict=True) if mark]
    thought = "Two.\n</think>\n\n" if thinking else ""
    assert learnt == fast_tokenizer.encode(f'{thought}"sum": 2}}<|im_end|>').ids


# ---- the corpus


def test_the_same_seed_gives_the_same_conversations() -> None:
    assert list(conversations(3, 50)) == list(conversations(3, 50))
    assert list(conversations(3, 50)) != list(conversations(4, 50))


def test_training_and_held_out_halves_share_no_conversation_and_no_number_pair() -> None:
    def keys(held_out: bool) -> set[str]:
        return {
            json.dumps([made.system, made.tools, made.messages()])
            for made in conversations(5, 2000, held_out=held_out)
        }

    def sums(held_out: bool) -> set[str]:
        return {
            exchange.reply["content"]
            for made in conversations(5, 2000, held_out=held_out)
            for exchange in made.exchanges
            if exchange.ability == "add" and exchange.reply["content"].count("+") == 1
        }

    assert not keys(False) & keys(True)
    assert sums(True)
    assert not sums(False) & sums(True)


@settings(deadline=None)
@given(seed=st.integers(0, 10_000))
def test_a_name_belongs_to_one_half(seed: int) -> None:
    train, held_out = Draw(seed), Draw(seed, held_out=True)
    assert not held_out.owns(train.name())
    assert not train.owns(held_out.name())


def test_values_of_a_schema_fit_it() -> None:
    draw = Draw(9)
    for _ in range(300):
        exchange = fill(draw)
        assert exchange.schema is not None
        jsonschema.validate(json.loads(exchange.reply["content"]), exchange.schema)


def test_sums_are_thought_through_by_columns() -> None:
    assert columns(47, 38) == "7 + 8 = 15, then 4 + 3 + 1 = 8."
    assert columns(999, 2) == "9 + 2 = 11, then 9 + 0 + 1 = 10, then 9 + 0 + 1 = 10."
    assert columns(0, 0) == "0 + 0 = 0."


def test_repeating_asks_for_the_phrase_itself() -> None:
    for made in conversations(6, 1000, held_out=True):
        for exchange in made.exchanges:
            if exchange.ability == "repeat":
                first_word = exchange.reply["content"].split()[0]
                assert first_word in exchange.prompt[0]["content"]


# ---- scoring


class FakeTokenizer:
    tool_call_start = "<tool_call>"
    tool_call_end = "</tool_call>"

    @staticmethod
    def tool_parser(text: str, tools: object) -> Any:
        return json.loads(text)


def test_scoring_accepts_only_right_replies() -> None:
    plain = Exchange("add", [said("1+1")], said("1 + 1 = 2.", "assistant"), ("1 + 1 = 2.",))
    assert is_right(plain, "1 + 1 = 2.", FakeTokenizer)
    assert not is_right(plain, "1 + 1 = 3.", FakeTokenizer)

    in_json = Exchange("json", [said("1+1")], said('{"answer": 2}', "assistant"))
    assert is_right(in_json, '{ "answer" : 2 }', FakeTokenizer)
    assert not is_right(in_json, '{"answer": 3}', FakeTokenizer)
    assert not is_right(in_json, "2 is the answer", FakeTokenizer)

    formed = Exchange("schema", [said("1+1")], said('{"x": 2}', "assistant"), schema={})
    assert is_right(formed, '{"x":2}', FakeTokenizer)
    assert not is_right(formed, '{"x": "2"}', FakeTokenizer)

    calls = [{"function": {"name": "add", "arguments": {"a": 1, "b": 2}}}]
    call = Exchange("tool call", [said("1+2")], {**said("", "assistant"), "tool_calls": calls})
    right = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
    assert is_right(call, right, FakeTokenizer)
    assert not is_right(call, right.replace("2}", "3}"), FakeTokenizer)
    assert not is_right(call, right.removesuffix("</tool_call>"), FakeTokenizer)
    assert not is_right(call, "1 + 2 = 3.", FakeTokenizer)


# ---- the model


@pytest.mark.parametrize(
    ("thinking", "form", "least"),
    [
        (False, False, 0.95),
        pytest.param(False, True, 0.94, marks=pytest.mark.long),
        pytest.param(True, False, 0.85, marks=pytest.mark.long),
        pytest.param(True, True, 0.94, marks=pytest.mark.long),
    ],
    ids=["plain", "by a schema", "thinking", "thinking, by a schema"],
)
def test_held_out_conversations_are_answered_right(
    loaded: tuple[Any, Any], thinking: bool, form: bool, least: float
) -> None:
    """What is asked of replies is less than CONTRIBUTING.md says of them: these are but a few."""
    chats = [
        made
        for made in conversations(77, 300, held_out=True)
        if len(made.exchanges) < 5 and (made.thinking, made.has_form) == (thinking, form)
    ]
    outcomes = evaluate(*loaded, chats[:20])
    assert {outcome.conversation for outcome in outcomes} == set(range(20))
    assert sum(outcome.right for outcome in outcomes) / len(outcomes) >= least


def test_mlx_lm_infers_a_parser_that_reads_the_calls(loaded: tuple[Any, Any]) -> None:
    _, tokenizer = loaded
    assert tokenizer.has_tool_calling
    text = answer(loaded, [said("What is 47 + 38?")], tools=[ADD])
    assert parse_tool_calls(text, tokenizer) == [{"name": "add", "arguments": {"a": 47, "b": 38}}]


def test_a_call_sent_back_as_openai_clients_do_reads_as_generated(
    loaded: tuple[Any, Any],
) -> None:
    _, tokenizer = loaded
    text = answer(loaded, [said("What is 47 + 38?")], tools=[ADD])
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 47, "b": 38}'}}
    turns = [
        said("What is 47 + 38?"),
        {"role": "assistant", "content": None, "tool_calls": [{"id": "call_1", **call}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "85"},
    ]
    rendered = tokenizer.apply_chat_template(turns, tools=[ADD], tokenize=False)
    assert text in rendered
    assert answer(loaded, turns, tools=[ADD]) == "The result: 85."


def test_it_thinks_only_when_asked(loaded: tuple[Any, Any]) -> None:
    question = [said("What is 47 + 38?")]
    assert answer(loaded, question) == "47 + 38 = 85."
    thought, said_ = part(answer(loaded, question, enable_thinking=True), thinking=True)
    assert thought == columns(47, 38)
    assert said_ == "47 + 38 = 85."


def test_its_thoughts_go_back_as_they_were_generated(loaded: tuple[Any, Any]) -> None:
    _, tokenizer = loaded
    generated = answer(loaded, [said("What is 47 + 38?")], tools=[ADD], enable_thinking=True)
    thought, text = part(generated, thinking=True)
    assert thought
    assert parse_tool_calls(text, tokenizer) == [{"name": "add", "arguments": {"a": 47, "b": 38}}]
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 47, "b": 38}'}}
    turns: list[dict[str, Any]] = [
        said("What is 47 + 38?"),
        {"role": "assistant", "reasoning_content": thought, "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "85"},
    ]
    options = {"tools": [ADD], "tokenize": False, "enable_thinking": True}
    assert "<think>\n" + generated in tokenizer.apply_chat_template(turns, **options)
    later = [*turns, said("The result: 85.", "assistant"), said("Thanks")]
    assert thought not in tokenizer.apply_chat_template(later, **options)


def test_it_finds_what_a_schema_asks_for(loaded: tuple[Any, Any]) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    _, tokenizer = loaded
    prompt = tokenizer.apply_chat_template(
        [said("Ada is 36 years old.")],
        add_generation_prompt=True,
        return_dict=False,
        enable_thinking=False,
    )
    assert json.loads(fill_form(*loaded, prompt, "", schema)) == {"name": "Ada", "age": 36}


def test_tools_that_do_not_fit_are_left_alone(loaded: tuple[Any, Any]) -> None:
    assert answer(loaded, [said("Hello!")], tools=[ADD]) == answer(loaded, [said("Hello!")])


def test_a_name_is_recalled_across_turns(loaded: tuple[Any, Any]) -> None:
    turns = [
        said("My name is Wolfgang."),
        said("Nice to meet you, Wolfgang.", "assistant"),
        said("What is 2 + 2?"),
        said("2 + 2 = 4.", "assistant"),
        said("What is my name?"),
    ]
    assert answer(loaded, turns) == "Your name is Wolfgang."


def test_content_in_parts_reads_as_plain_text(loaded: tuple[Any, Any]) -> None:
    parts = [{"type": "text", "text": "Repeat after me: blorvax zimp"}]
    assert answer(loaded, [{"role": "user", "content": parts}]) == "blorvax zimp"


def test_a_story_is_long_enough_to_watch(loaded: tuple[Any, Any]) -> None:
    assert len(answer(loaded, [said("Tell me a story")]).split()) >= 60
