"""/v1/completions: several prompts, token ids, and text that continues its prompt."""

import contextlib
import time

import openai
import pytest
from fake_backend import EOS, MODEL, FakeBackend, Script, one_model_app, post, served_model, serving

from quire.serve.backend import GenerationFailed, QueueFull

PATH = "/v1/completions"
SERVED = served_model(["Hello", " wor"])


def ids(text: str) -> list[int]:
    return SERVED.encoder.tokenizer.encode(text).ids


def body(prompt: object = "Once", **fields: object) -> dict[str, object]:
    return {"model": MODEL, "prompt": prompt, **fields}


@contextlib.contextmanager
def completions(*scripts: Script, **options):
    backend = FakeBackend(list(scripts) or [Script([ids("Hello")])], **options)
    with serving(one_model_app(backend, SERVED)) as server:
        yield server, backend


def test_a_whole_answer():
    with completions(Script([ids("Hello"), ids(EOS)])) as (server, _):
        answer = server.request("POST", PATH, body()).json
    assert answer.pop("id").startswith("cmpl-")
    answer.pop("created")
    assert answer == {
        "object": "text_completion",
        "model": MODEL,
        "choices": [{"index": 0, "text": "Hello", "finish_reason": "stop", "logprobs": None}],
        "usage": {
            "prompt_tokens": 4,
            "completion_tokens": 2,
            "total_tokens": 6,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


def test_a_streamed_answer():
    with completions(Script([ids("Hello"), ids(" wor")])) as (server, _):
        *chunks, done = server.events(PATH, body(stream=True))
    assert done == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert all("usage" not in chunk for chunk in chunks)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(choice["text"] for choice in choices) == "Hello wor"
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + [
        "length"
    ]


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("ab", [ids("ab")]),
        (["ab", "c"], [ids("ab"), ids("c")]),
        ([5, 6], [[5, 6]]),
        ([[5], [6, 7]], [[5], [6, 7]]),
    ],
)
def test_every_form_of_prompt(prompt, prompts):
    with completions() as (server, backend):
        assert server.request("POST", PATH, body(prompt)).status == 200
    assert [stream.request.prompt_token_ids for stream in backend.streams] == prompts


SEVERAL = [
    Script([ids("a")] * 6),
    Script([ids("b"), ids(EOS)], cached_tokens=1),
    Script([ids("c")] * 2),
]


def test_several_prompts_keep_their_order():
    with completions(*SEVERAL) as (server, _):
        answer = server.request("POST", PATH, body(["x", "yy", "z"])).json
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert [choice["text"] for choice in answer["choices"]] == ["a" * 6, "b", "cc"]
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["length", "stop", "length"]
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (4, 10)
    assert usage["prompt_tokens_details"] == {"cached_tokens": 1}


def test_several_prompts_in_one_stream():
    with completions(*SEVERAL) as (server, _):
        request = body(["x", "yy", "z"], stream=True, stream_options={"include_usage": True})
        *chunks, usage, done = server.events(PATH, request)
    assert done == "[DONE]"
    texts = ["", "", ""]
    reasons = {}
    for chunk in chunks:
        [choice] = chunk["choices"]
        assert choice["index"] not in reasons
        texts[choice["index"]] += choice["text"]
        if choice["finish_reason"]:
            reasons[choice["index"]] = choice["finish_reason"]
    assert texts == ["a" * 6, "b", "cc"]
    assert reasons == {0: "length", 1: "stop", 2: "length"}
    assert usage["usage"]["completion_tokens"] == 10


@pytest.mark.parametrize("prompt", ["", [""], ["a", ""], [[]], [[1], []], [], [["a"]], [1000]])
def test_a_prompt_without_usable_tokens_is_refused(prompt):
    with completions() as (server, backend):
        reply = server.request("POST", PATH, body(prompt))
        assert server.request("POST", PATH, body("ok")).status == 200
    assert reply.status == 400
    assert reply.error["param"].startswith("prompt")
    assert len(backend.streams) == 1


def test_prompts_are_submitted_all_or_none():
    with completions(Script(["hang"]), refusal=QueueFull("Full.", 1), accept=2) as (
        server,
        backend,
    ):
        reply = server.request("POST", PATH, body(["a", "b", "c"]))
    assert reply.status == 429
    assert [stream.close_reasons for stream in backend.streams] == [["abort"], ["abort"]]


@pytest.mark.parametrize("stream", [False, True])
def test_one_failed_sequence_fails_the_request_and_ends_the_others(stream):
    failing = Script([ids("a"), GenerationFailed("The worker died.")])
    with completions(Script([ids("a"), "hang"]), failing) as (server, backend):
        reply = server.request("POST", PATH, body(["a", "b"], stream=stream))
        backend.wait_until_idle()
    assert b"The worker died." in reply.body
    assert b"[DONE]" not in reply.body
    assert backend.streams[0].close_reasons == ["abort"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_every_sequence(stream):
    with completions(Script([ids("a"), "hang"])) as (server, backend):
        with server.connect(post(PATH, body(["a", "b", "c"], stream=stream))):
            while len(backend.streams) < 3:
                time.sleep(0.005)
        backend.wait_until_idle()
    assert [stream.close_reasons for stream in backend.streams] == [["abort"]] * 3


def test_the_official_client():
    with (
        completions(Script([ids("Hello"), ids(" wor")])) as (server, _),
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        whole = client.completions.create(model=MODEL, prompt="Once", max_tokens=2, stop="zz")
        assert whole.choices[0].text == "Hello wor"
        stream = client.completions.create(model=MODEL, prompt="Once", stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == "Hello wor"
        with pytest.raises(openai.NotFoundError) as caught:
            client.completions.create(model="other", prompt="Once")
        assert caught.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as bad:
            client.completions.create(model=MODEL, prompt="Once", suffix="end")
        assert bad.value.param == "suffix"
