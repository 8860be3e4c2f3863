"""Fields about tokens, through HTTP: choices, log-probabilities, echo, ids, limits."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import pytest
from fake_backend import (
    EOS,
    MODEL,
    FakeBackend,
    Script,
    Server,
    logprobs_of,
    one_model_app,
    ready,
    served_model,
    serving,
)

from quire.engine.messages import ThinkingBudget
from quire.serve.logprob_format import chat_logprobs, completion_logprobs
from quire.serve.sampling_fields import seed_of_choice
from quire.serve.token_log import ShownToken

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if tools %}<tool_call>{% endif %}{% if add_generation_prompt %}<assistant>{% endif %}"
    "{% if false %}<think></think>{% endif %}"
)
WORDS = ["Hello", " wor", "ld", "<think>", "</think>", "<tool_call>", "</tool_call>"]
SERVED = served_model(WORDS, TEMPLATE)
TABLE = SERVED.all_token_bytes


def ids(text: str) -> list[int]:
    return SERVED.encoder.tokenizer.encode(text).ids


def completion(prompt: object = "Once", **fields: object) -> dict[str, object]:
    return {"model": MODEL, "prompt": prompt, **fields}


def chat(**fields: object) -> dict[str, object]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], **fields}


@contextlib.contextmanager
def server(*scripts: Script, **options: Any) -> Iterator[tuple[Server, FakeBackend]]:
    backend = FakeBackend(list(scripts) or [Script([ids("Hello")])], **options)
    with serving(one_model_app(backend, SERVED)) as running:
        yield running, backend


# ---- choices


def test_several_answers_to_one_prompt_draw_from_seeds_of_their_own() -> None:
    scripts = [
        Script([ids(text)], cached_tokens=cached)
        for text, cached in (("a", 16), ("bb", 0), ("ccc", 16), ("d", 8), ("ee", 24), ("fff", 24))
    ]
    with server(*scripts) as (running, backend):
        answer = running.request("POST", COMPLETIONS, completion(["x", "yy"], n=3, seed=7)).json
    assert [choice["text"] for choice in answer["choices"]] == ["a", "bb", "ccc", "d", "ee", "fff"]
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert answer["usage"]["prompt_tokens"] == 3, "each prompt counts once"
    assert answer["usage"]["completion_tokens"] == 12
    # Whoever ran first computed the prompt for the others.
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0 + 8
    seeds = [stream.request.sampling.seed for stream in backend.streams]
    assert seeds == [seed_of_choice(7, i) for i in range(3)] * 2
    assert seeds[0] == 7
    assert len(set(seeds)) == 3


def test_choices_of_a_chat_begin_in_their_order() -> None:
    scripts = [Script([ids("a"), ids("b")]), Script([ids("c")])]
    with server(*scripts) as (running, _):
        *chunks, done = running.events(CHAT, chat(n=2, stream=True))
    assert done == "[DONE]"
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert [choice["index"] for choice in choices][:2] == [0, 1]
    assert all(choice["delta"]["role"] == "assistant" for choice in choices[:2])
    texts = ["", ""]
    for choice in choices:
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == ["ab", "c"]
    reasons = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
    assert len(reasons) == 2


def test_more_answers_than_the_server_takes_at_a_time_are_refused_for_good() -> None:
    with server(max_in_flight=10) as (running, backend):
        many = running.request("POST", COMPLETIONS, completion(["x"] * 11))
        choices = running.request("POST", CHAT, chat(n=11))
        assert running.request("POST", COMPLETIONS, completion(["x"] * 10)).status == 200
    assert (many.status, many.error["param"]) == (400, "prompt")
    assert (choices.status, choices.error["param"]) == (400, "n")
    assert len(backend.streams) == 10


def test_the_likeliest_of_several_are_the_answer() -> None:
    # Made-up log-probabilities fall with the token's id.
    scripts = [Script([ids("z")]), Script([ids("a")]), Script([ids("m")])]
    with server(*scripts) as (running, _):
        answer = running.request("POST", COMPLETIONS, completion(best_of=3, n=2)).json
    assert [choice["text"] for choice in answer["choices"]] == ["a", "m"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert answer["choices"][0]["logprobs"] is None
    assert answer["usage"]["completion_tokens"] == 3


# ---- log-probabilities


def test_logprobs_of_a_chat_name_each_token_its_bytes_and_alternatives() -> None:
    with server(Script([ids("Hello"), ids("é"), ids(EOS)])) as (running, _):
        answer = running.request("POST", CHAT, chat(logprobs=True, top_logprobs=2)).json
    [choice] = answer["choices"]
    assert choice["message"]["content"] == "Helloé"
    content = choice["logprobs"]["content"]
    assert choice["logprobs"]["refusal"] is None
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == "Helloé"
    assert [entry["token"] for entry in content] == ["Hello", "\ufffd", "\ufffd"]
    assert content[0]["logprob"] == -ids("Hello")[0] / 1000
    assert [len(entry["top_logprobs"]) for entry in content] == [2, 2, 2]
    assert set(content[0]["top_logprobs"][0]) == {"token", "logprob", "bytes"}


def test_reasoning_and_calls_have_no_logprobs() -> None:
    text = '<think>why</think>Hello wor<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    tool = {"type": "function", "function": {"name": "f"}}
    script = Script([[token] for token in ids(text)] + [ids(EOS)])
    with server(script) as (running, _):
        request = chat(logprobs=True, tools=[tool])
        [choice] = running.request("POST", CHAT, request).json["choices"]
        chunks = running.events(CHAT, {**request, "stream": True})[:-1]
    assert choice["message"]["tool_calls"]
    assert choice["message"]["reasoning_content"] == "why"
    assert [entry["token"] for entry in choice["logprobs"]["content"]] == ["Hello", " wor"]
    assert entries(chunks) == choice["logprobs"]["content"]


def entries(chunks: list[Any]) -> list[Any]:
    found = []
    for chunk in chunks:
        for choice in chunk["choices"]:
            found += (choice["logprobs"] or {"content": []})["content"]
    return found


@pytest.mark.parametrize("shown", [False, True])
def test_tokens_of_a_stop_string_have_none_unless_it_is_shown(shown: bool) -> None:
    script = Script([[token] for token in ids("Hello world wor")])
    fields = {"logprobs": True, "stop": ["world"], "include_stop_str_in_output": shown}
    with server(script) as (running, backend):
        [choice] = running.request("POST", CHAT, chat(**fields)).json["choices"]
        chunks = running.events(CHAT, chat(**fields, stream=True))[:-1]
        [plain] = running.request(
            "POST", COMPLETIONS, completion(**fields, max_tokens=9) | {"logprobs": 1}
        ).json["choices"]
        backend.wait_until_idle()
    text = "Hello world" if shown else "Hello "
    assert choice["message"]["content"] == plain["text"] == text
    tokens = [entry["token"] for entry in choice["logprobs"]["content"]]
    # A token that the cut goes through is there whole.
    assert (
        tokens
        == plain["logprobs"]["tokens"]
        == (["Hello", " wor", "ld"] if shown else ["Hello", " wor"])
    )
    assert entries(chunks) == choice["logprobs"]["content"]
    assert choice["finish_reason"] == plain["finish_reason"] == "stop"


def test_logprobs_of_a_completion() -> None:
    with server(Script([ids("Hello"), ids(" wor")])) as (running, _):
        [choice] = running.request("POST", COMPLETIONS, completion(logprobs=1)).json["choices"]
        [bare] = running.request("POST", COMPLETIONS, completion(logprobs=0)).json["choices"]
    hello, world = ids("Hello")[0], ids(" wor")[0]
    assert choice["logprobs"] == {
        "tokens": ["Hello", " wor"],
        "token_logprobs": [-hello / 1000, -world / 1000],
        "top_logprobs": [
            {TABLE[0].decode(): 0.0, "Hello": -hello / 1000},
            {TABLE[0].decode(): 0.0, " wor": -world / 1000},
        ],
        "text_offset": [0, 5],
    }
    assert bare["logprobs"]["top_logprobs"][0] == {"Hello": -hello / 1000}


def test_infinities_do_not_reach_json() -> None:
    token = ShownToken(0, 0, logprobs_of(1, 1).__class__(-float("inf"), [1], [-float("inf")]))
    whole = chat_logprobs([token], TABLE, 1)
    assert whole.content[0].logprob == whole.content[0].top_logprobs[0].logprob == -9999.0
    old = completion_logprobs([token], TABLE, 1)
    assert old.token_logprobs == [-9999.0]


# ---- prompts


def test_echo_puts_the_prompt_in_front_with_its_logprobs() -> None:
    with server(Script([ids("Hello"), ids(EOS)])) as (running, backend):
        request = completion("ab", echo=True, logprobs=1)
        [choice] = running.request("POST", COMPLETIONS, request).json["choices"]
        chunks = running.events(COMPLETIONS, {**request, "stream": True})[:-1]
    assert backend.streams[0].request.prompt_logprobs == 1
    assert choice["text"] == "abHello"
    assert choice["logprobs"]["tokens"] == ["a", "b", "Hello"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2]
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert choice["logprobs"]["token_logprobs"][1] == -ids("b")[0] / 1000
    assert choice["logprobs"]["top_logprobs"][0] is None
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "abHello"
    streamed = [c["choices"][0]["logprobs"] for c in chunks if c["choices"][0]["logprobs"]]
    for key, value in choice["logprobs"].items():
        assert [item for part in streamed for item in part[key]] == value


def test_a_prompt_is_scored_without_an_answer() -> None:
    with server(Script([ids("Hello")])) as (running, _):
        request = completion("abc", echo=True, logprobs=0, max_tokens=0)
        answer = running.request("POST", COMPLETIONS, request).json
    [choice] = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("abc", "length")
    assert choice["logprobs"]["tokens"] == ["a", "b", "c"]
    assert answer["usage"]["completion_tokens"] == 0


def test_only_the_end_of_a_prompt_is_kept_where_that_is_asked_for() -> None:
    with server(info=ready(max_model_len=50)) as (running, backend):
        request = completion("x" * 100 + "yz", truncate_prompt_tokens=2, echo=True)
        assert running.request("POST", COMPLETIONS, request).json["choices"][0]["text"] == "yzHello"
        assert running.request("POST", CHAT, chat(truncate_prompt_tokens=3)).status == 200
        assert running.request("POST", COMPLETIONS, completion("x" * 100)).status == 400
    assert backend.streams[0].request.prompt_token_ids == ids("yz")
    assert len(backend.streams[1].request.prompt_token_ids) == 3


def test_a_completion_has_16_tokens_unless_it_says_otherwise() -> None:
    with server() as (running, backend):
        running.request("POST", COMPLETIONS, completion())
        running.request("POST", COMPLETIONS, completion(max_tokens=3))
    assert [stream.request.max_tokens for stream in backend.streams] == [16, 3]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_token_ids_are_given_on_request(path: str) -> None:
    script = Script([ids("Hello"), ids(" wor"), ids(EOS)])
    body = completion("ab") if path == COMPLETIONS else chat()
    with server(script) as (running, backend):
        whole = running.request("POST", path, {**body, "return_token_ids": True}).json
        chunks = running.events(path, {**body, "return_token_ids": True, "stream": True})[:-1]
        silent = running.request("POST", path, body)
    expected = [*ids("Hello"), *ids(" wor"), *ids(EOS)]
    assert whole["choices"][0]["token_ids"] == expected
    assert [t for c in chunks for t in c["choices"][0].get("token_ids", [])] == expected
    prompt = backend.streams[0].request.prompt_token_ids
    holders = [whole, *whole["choices"]]
    assert [h["prompt_token_ids"] for h in holders if "prompt_token_ids" in h] == [prompt]
    holders = [holder for chunk in chunks for holder in (chunk, *chunk["choices"])]
    assert [h["prompt_token_ids"] for h in holders if "prompt_token_ids" in h] == [prompt]
    assert b"token_ids" not in silent.body


def test_special_tokens_are_shown_on_request() -> None:
    script = Script([ids("Hello") + ids(EOS) + ids("ld")])
    with server(script) as (running, _):
        request = completion(ignore_eos=True)
        hidden = running.request("POST", COMPLETIONS, request).json
        shown = running.request("POST", COMPLETIONS, {**request, "skip_special_tokens": False}).json
    assert hidden["choices"][0]["text"] == "Hellold"
    assert shown["choices"][0]["text"] == f"Hello{EOS}ld"


def test_a_reply_is_continued_where_it_ends() -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well, "}]
    with server(Script([ids("Hello"), ids(EOS)])) as (running, backend):
        body = {"model": MODEL, "messages": messages, "continue_final_message": True}
        answer = running.request("POST", CHAT, body).json
        running.request("POST", CHAT, chat(add_generation_prompt=False))
    assert backend.streams[0].request.prompt_token_ids == ids("<user>hi\n<assistant>Well, ")
    assert backend.streams[1].request.prompt_token_ids == ids("<user>hi\n")
    assert answer["choices"][0]["message"]["content"] == "Hello"


# ---- what goes to the engine


def test_fields_of_sampling_reach_the_engine() -> None:
    fields = {
        "logit_bias": {"5": 1.5, "7": -100},
        "presence_penalty": 0.5,
        "frequency_penalty": -0.25,
        "repetition_penalty": 1.25,
        "bad_words": ["ld"],
        "cache_salt": "mine",
        "priority": -3,
    }
    with server() as (running, backend):
        assert running.request("POST", CHAT, chat(**fields)).status == 200
        assert running.request("POST", CHAT, chat(allowed_token_ids=[3, 1, 3])).status == 200
    sent = backend.streams[0].request
    assert sent.sampling.logit_bias == {5: 1.5, 7: -100}
    assert sent.sampling.presence_penalty == 0.5
    assert sent.sampling.frequency_penalty == -0.25
    assert sent.sampling.repetition_penalty == 1.25
    assert sent.sampling.bad_words == [ids("ld"), ids(" ld")]
    assert (sent.cache_salt, sent.priority) == ("mine", -3)
    assert backend.streams[1].request.sampling.allowed_token_ids == [1, 3]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logit_bias": {"1000": 1}}, "logit_bias"),
        ({"allowed_token_ids": [1000]}, "allowed_token_ids"),
        ({"allowed_token_ids": ids(EOS), "min_tokens": 2}, "allowed_token_ids"),
        ({"bad_words": ["x" * 65]}, "bad_words[0]"),
        ({"bad_words": ["a", "ab " * 100_000]}, "bad_words[1]"),
    ],
)
def test_tokens_that_cannot_be_are_refused(fields: dict[str, object], param: str) -> None:
    with server() as (running, backend):
        for path, body in ((CHAT, chat(**fields)), (COMPLETIONS, completion(**fields))):
            reply = running.request("POST", path, body)
            assert (reply.status, reply.error["param"]) == (400, param)
    assert not backend.streams


def test_without_calls_the_tools_stay_in_the_prompt_and_the_opening_marker_is_banned() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    with server() as (running, backend):
        running.request("POST", CHAT, chat(tools=[tool]))
        running.request("POST", CHAT, chat(tools=[tool], tool_choice="none"))
    with_calls, without = (stream.request for stream in backend.streams)
    assert with_calls.prompt_token_ids == without.prompt_token_ids
    assert with_calls.sampling.bad_words == []
    assert without.sampling.bad_words == [ids("<tool_call>")]


@pytest.mark.parametrize("opened", [False, True])
def test_a_budget_of_thinking_closes_it_in_the_models_form(opened: bool) -> None:
    template = TEMPLATE.replace("<assistant>", "<assistant><think>") if opened else TEMPLATE
    backend = FakeBackend()
    with serving(one_model_app(backend, served_model(WORDS, template))) as running:
        assert running.request("POST", CHAT, chat(thinking_token_budget=7)).status == 200
        thinking = {"type": "enabled", "budget_tokens": 9}
        request = chat(max_tokens=20, thinking=thinking)
        reply = running.request("POST", "/v1/messages", request)
        assert reply.status == 200
        assert "x-quire-ignored" not in reply.headers
        assert running.request("POST", CHAT, chat()).status == 200
    mine, anthropics, without = (stream.request.thinking for stream in backend.streams)
    assert mine == ThinkingBudget(7, ids("</think>"), [], ids("<think>"), opened)
    assert anthropics == ThinkingBudget(9, ids("</think>"), [], ids("<think>"), opened)
    assert without is None


def test_a_budget_for_a_model_that_does_not_think() -> None:
    backend = FakeBackend()
    with serving(one_model_app(backend, served_model())) as running:
        reply = running.request("POST", CHAT, chat(thinking_token_budget=7))
        assert (reply.status, reply.error["param"]) == (400, "thinking_token_budget")
        thinking = {"type": "enabled", "budget_tokens": 9}
        request = chat(max_tokens=20, thinking=thinking)
        reply = running.request("POST", "/v1/messages", request)
    assert reply.headers["x-quire-ignored"] == "thinking.budget_tokens"


def test_suffix_asks_for_what_stands_between() -> None:
    marks = ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"]
    model = served_model(marks)
    backend = FakeBackend([Script([ids("a")])])
    with serving(one_model_app(backend, model)) as running:
        reply = running.request("POST", COMPLETIONS, completion("def ", suffix=" end"))
        assert reply.status == 200, reply.body
    prefix, suffix, middle = (model.encoder.tokenizer.token_to_id(mark) for mark in marks)
    assert backend.streams[0].request.prompt_token_ids == [
        prefix, *ids("def "), suffix, *ids(" end"), middle,
    ]  # fmt: skip
    with server() as (running, _):
        reply = running.request("POST", COMPLETIONS, completion(suffix="x"))
        assert (reply.status, reply.error["param"]) == (400, "suffix")
        assert json.loads(reply.body)
