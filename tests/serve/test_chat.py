"""/v1/chat/completions over HTTP, read by OpenAI's client and byte by byte."""

import contextlib
import time

import openai
import pytest
from fake_backend import (
    EOS,
    MODEL,
    FakeBackend,
    Script,
    one_model_app,
    post,
    ready,
    served_model,
    serving,
)

from quire.serve.backend import GenerationFailed, QueueFull, Unavailable

PATH = "/v1/chat/completions"
WORDS = ["Hello", " wor", "ld!"]
SERVED = served_model(WORDS)
USER = [{"role": "user", "content": "hi"}]
PROMPT_TOKENS = len(SERVED.encoder.tokenizer.encode("<user>hi\n<assistant>").ids)


def ids(text: str) -> list[int]:
    return SERVED.encoder.tokenizer.encode(text, add_special_tokens=False).ids


def steps(text: str) -> list[list[int]]:
    return [[token_id] for token_id in ids(text)]


def body(**fields: object) -> dict[str, object]:
    return {"model": MODEL, "messages": USER, **fields}


@contextlib.contextmanager
def chat(*scripts: Script, **options):
    backend = FakeBackend(list(scripts) or [Script(steps("Hello world!"))], **options)
    with serving(one_model_app(backend, SERVED)) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        with contextlib.closing(client):
            yield server, client, backend


def stream_with_helper(client: openai.OpenAI, **fields):
    """The official accumulator is the judge of a stream."""
    with client.chat.completions.stream(model=MODEL, messages=USER, **fields) as stream:
        for _ in stream:
            pass
        try:
            return stream.get_final_completion()
        except openai.LengthFinishReasonError as error:
            return error.completion


def test_a_whole_answer():
    with chat(Script([*steps("Hello world!"), ids(EOS)], cached_tokens=2)) as (server, _, _):
        answer = server.request("POST", PATH, body()).json
    assert answer.pop("id").startswith("chatcmpl-")
    assert abs(answer.pop("created") - time.time()) < 60
    assert answer == {
        "object": "chat.completion",
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello world!", "refusal": None},
                "finish_reason": "stop",
                "logprobs": None,
            }
        ],
        "usage": {
            "prompt_tokens": PROMPT_TOKENS,
            "completion_tokens": 4,
            "total_tokens": PROMPT_TOKENS + 4,
            "prompt_tokens_details": {"cached_tokens": 2},
        },
    }


def test_a_streamed_answer():
    with chat(Script([*steps("Hello world!"), ids(EOS)])) as (server, _, _):
        *chunks, done = server.events(PATH, body(stream=True))
    assert done == "[DONE]"
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    for chunk in chunks:
        assert list(chunk) == ["object", "id", "created", "model", "choices"]
        assert chunk["object"] == "chat.completion.chunk"
        [choice] = chunk["choices"]
        assert (choice["index"], choice["logprobs"]) == (0, None)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert all(set(delta) == {"content"} for delta in deltas[1:-1])
    assert deltas[-1] == {}
    assert "".join(delta.get("content", "") for delta in deltas) == "Hello world!"
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]


def test_usage_comes_in_a_chunk_of_its_own_when_asked_for():
    with chat() as (server, _, _):
        options = {"include_usage": True, "include_obfuscation": False}
        *chunks, last, done = server.events(PATH, body(stream=True, stream_options=options))
        whole = server.request("POST", PATH, body()).json
    assert done == "[DONE]"
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]


def test_usage_so_far_on_every_chunk():
    with chat() as (server, _, _):
        options = {"include_usage": True, "continuous_usage_stats": True}
        *chunks, _ = server.events(PATH, body(stream=True, stream_options=options))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (1, 3)


@pytest.mark.parametrize(
    ("text", "fields", "content", "reason", "tokens"),
    [
        ("Hello world!", {}, "Hello world!", "length", 3),
        (f"Hello{EOS}", {}, "Hello", "stop", 2),
        (EOS, {}, "", "stop", 1),
        ("Hello world!", {"max_tokens": 1}, "Hello", "length", 1),
        ("Hello world!", {"max_completion_tokens": 2}, "Hello wor", "length", 2),
        ("é汉👩‍👩‍👧!", {}, "é汉👩‍👩‍👧!", "length", 24),
        ("é汉", {"max_tokens": 3}, "é\ufffd", "length", 3),
        ("Hello world!", {"stop": "lo w"}, "Hel", "stop", 2),
        ("Hello world!", {"stop": ["zz", "Hel"]}, "", "stop", 1),
        ("Hello world!", {"stop": "ld!!"}, "Hello world!", "length", 3),
    ],
)
def test_whole_and_streamed_answers_agree(text, fields, content, reason, tokens):
    with chat(Script(steps(text))) as (_, client, _):
        whole = client.chat.completions.create(model=MODEL, messages=USER, **fields)
        streamed = stream_with_helper(client, stream_options={"include_usage": True}, **fields)
    for answer in (whole, streamed):
        [choice] = answer.choices
        assert choice.message.role == "assistant"
        assert choice.message.content == content
        assert choice.finish_reason == reason
        assert answer.usage.completion_tokens == tokens


def test_a_stop_string_ends_the_generation():
    script = Script([*steps("Hello world!"), "hang"])
    for stream in (False, True):
        with chat(script) as (server, _, backend):
            server.request("POST", PATH, body(stop=["wor"], stream=stream))
            assert [stream.close_reasons for stream in backend.streams] == [["stop"]]


def test_the_request_reaches_the_engine():
    with chat() as (server, _, backend):
        server.request(
            "POST",
            PATH,
            body(
                temperature=0.5,
                top_p=0.25,
                top_k=7,
                min_p=0.125,
                seed=-5,
                max_tokens=9,
                min_tokens=3,
                stop_token_ids=[5],
            ),
        )
        request = backend.streams[0].request
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.25, 7)
    assert (sampling.min_p, sampling.seed) == (0.125, -5)
    assert (request.max_tokens, request.min_tokens) == (9, 3)
    assert request.stop_token_ids == [5, *SERVED.eos_token_ids]
    assert SERVED.encoder.tokenizer.decode(request.prompt_token_ids) == "<user>hi\n<assistant>"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (1.0, 1.0, 0)),
        ({"top_k": -1}, (1.0, 1.0, 0)),
        ({"top_p": 0}, (1.0, 1.0, 1)),
        ({"temperature": None, "top_p": None}, (1.0, 1.0, 0)),
    ],
)
def test_sampling_defaults(fields, expected):
    with chat() as (server, _, backend):
        server.request("POST", PATH, body(**fields))
        sampling = backend.streams[0].request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == expected


def test_ignore_eos_leaves_the_eos_ids_out():
    with chat(Script([*steps("Hello"), ids(EOS), *steps(" wor")])) as (server, _, backend):
        answer = server.request("POST", PATH, body(ignore_eos=True, stop_token_ids=[3])).json
    assert backend.streams[0].request.stop_token_ids == [3]
    assert answer["choices"][0]["message"]["content"] == "Hello wor"


def test_max_tokens_defaults_to_what_the_context_holds():
    with chat(info=ready(max_model_len=100)) as (server, _, backend):
        server.request("POST", PATH, body())
    assert backend.streams[0].request.max_tokens == 100 - PROMPT_TOKENS


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_limit_beyond_the_context_is_lowered_and_named(field, stream):
    with chat(info=ready(max_model_len=100)) as (server, _, backend):
        reply = server.request("POST", PATH, body(stream=stream, **{field: 32000}))
        assert reply.headers["x-quire-ignored"] == field
        assert "x-quire-ignored" not in server.request("POST", PATH, body(max_tokens=50)).headers
    assert backend.streams[0].request.max_tokens == 100 - PROMPT_TOKENS


def test_more_than_the_context_holds_is_refused_with_the_numbers():
    messages = [{"role": "user", "content": "x" * 100}]
    with chat(info=ready(max_model_len=100)) as (server, _, backend):
        error = server.request("POST", PATH, body(messages=messages)).error
    assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")
    assert "100" in error["message"]
    assert backend.streams == []


@pytest.mark.parametrize(
    ("fields", "status", "param", "code"),
    [
        ({"model": "other"}, 404, "model", "model_not_found"),
        ({"model": "../" + MODEL}, 404, "model", "model_not_found"),
        ({"messages": []}, 400, "messages", None),
        ({"tools": [{"type": "function"}]}, 400, "tools[0].function", None),
        ({"min_tokens": 5, "max_tokens": 4}, 400, "min_tokens", None),
        ({"stop_token_ids": [1000]}, 400, "stop_token_ids", None),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options", None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_before_the_first_byte_are_real_statuses(fields, status, param, code, stream):
    with chat() as (server, _, backend):
        if "stream_options" not in fields:
            fields = {**fields, "stream": stream}
        reply = server.request("POST", PATH, body(**fields))
    assert reply.status == status
    assert (reply.error["param"], reply.error["code"]) == (param, code)
    assert backend.streams == []


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("refusal", "status", "kind"),
    [
        (QueueFull("Full.", 3), 429, "rate_limit_error"),
        (Unavailable("Draining.", 3), 503, "server_error"),
    ],
)
def test_a_refused_submission_says_when_to_come_back(refusal, status, kind, stream):
    with chat(refusal=refusal) as (server, _, _):
        reply = server.request("POST", PATH, body(stream=stream))
    assert (reply.status, reply.headers["retry-after"]) == (status, "3")
    assert reply.error["type"] == kind
    assert reply.error["message"] == refusal.message


def test_a_loading_model_is_unavailable():
    with chat(info=None) as (server, client, _):
        reply = server.request("POST", PATH, body())
        with pytest.raises(openai.InternalServerError):
            client.chat.completions.create(model=MODEL, messages=USER)
    assert reply.status == 503
    assert int(reply.headers["retry-after"]) >= 1


def test_a_failure_before_any_token_fails_a_whole_answer():
    with chat(Script([GenerationFailed("The worker died.")])) as (server, _, _):
        reply = server.request("POST", PATH, body())
    assert reply.status == 500
    assert reply.error["message"] == "The worker died."


def test_a_failure_in_mid_stream_is_an_event_without_done():
    failing = Script([*steps("Hello"), GenerationFailed("The worker died.")])
    with chat(failing) as (server, client, _):
        *_, last = server.events(PATH, body(stream=True))
        with pytest.raises(openai.APIError, match="The worker died"):
            stream_with_helper(client)
    assert last["error"]["message"] == "The worker died."
    assert last["error"]["type"] == "server_error"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("script", [["hang"], [ids("Hello"), "hang"]], ids=["waiting", "running"])
def test_a_client_that_leaves_ends_its_generation(script, stream):
    with chat(Script(script)) as (server, _, backend):
        with server.connect(post(PATH, body(stream=stream))) as connection:
            if stream:
                assert connection.recv(1 << 16)
            while not backend.streams:
                time.sleep(0.005)
        backend.wait_until_idle()
        assert backend.streams[0].close_reasons == ["abort"]
        assert server.request("GET", "/health").status == 200


def test_streams_do_not_mix():
    scripts = [Script([ids(word)] * 20) for word in WORDS]
    with chat(*scripts) as (_, client, backend):
        streams = [
            client.chat.completions.create(model=MODEL, messages=USER, stream=True) for _ in WORDS
        ]
        texts = []
        for stream in streams:
            texts.append("".join(c.choices[0].delta.content or "" for c in stream))
    assert sorted(texts) == sorted(word * 20 for word in WORDS)
    assert backend.active == 0


def test_messages_reach_the_template():
    turns = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c"},
        {"role": "tool", "content": "d", "tool_call_id": "1"},
    ]
    with chat() as (server, _, backend):
        server.request("POST", PATH, body(messages=turns))
    prompt = SERVED.encoder.tokenizer.decode(backend.streams[0].request.prompt_token_ids)
    assert prompt == "<system>be brief\n<user>ab\n<assistant>c\n<tool>d\n<assistant>"


def test_a_model_without_a_template_refuses_chats():
    app = one_model_app(FakeBackend(), served_model(template=None))
    with serving(app) as server:
        reply = server.request("POST", PATH, body())
    assert reply.status == 400
    assert "/v1/completions" in reply.error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"structured_outputs": {"choice": ["a"]}}, "structured_outputs.choice"),
    ],
)
def test_a_wanted_form_is_refused_where_the_worker_takes_no_grammars(fields, param):
    with chat() as (server, _, backend):
        reply = server.request("POST", PATH, body(**fields))
    assert (reply.status, reply.error["param"]) == (400, param)
    assert "takes no grammars" in reply.error["message"]
    assert backend.streams == []
