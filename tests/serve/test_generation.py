"""One sequence of tokens to text, counts and a finish reason."""

import asyncio

import pytest
from fake_backend import EOS, FakeStream, Script, served_model
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.engine.messages import GenerateRequest, SamplingParams
from quire.serve.backend import GenerationFailed
from quire.serve.detokenizer import Detokenizer
from quire.serve.generation import Generation, GenerationGroup, Reading

WORDS = ["Hello", " wor", "ld!", "STOP", "aab", "</s", ">x", "STO", "汉b"]
MODEL = served_model(WORDS)


def ids(*pieces: str) -> list[int]:
    """One token for each of WORDS, one a byte for anything else."""
    tokenizer = MODEL.encoder.tokenizer
    return [
        token_id
        for piece in pieces
        for token_id in (
            [tokenizer.token_to_id(piece)]
            if piece in WORDS or piece == EOS
            else tokenizer.encode(piece).ids
        )
    ]


def generation(script: Script, *, index: int = 0, max_tokens: int = 100, **options) -> Generation:
    request = GenerateRequest(
        index, [0], max_tokens, SamplingParams(), stop_token_ids=list(MODEL.eos_token_ids)
    )
    stream = FakeStream(request, script)
    detokenizer = Detokenizer(MODEL.token_bytes, ids("p"))
    made = Generation(stream, [0], detokenizer, Reading(index=index, **options))
    made.stream = stream
    return made


def read(made: Generation) -> list[str]:
    async def collect() -> list[str]:
        return [delta.text async for delta in made.deltas()]

    return asyncio.run(collect())


STOP_CASES = {
    "inside one token": (["el"], ["Hello", "ld!"], "H", 1),
    "one whole token": (["STOP"], ["Hello", "STOP", "ld!"], "Hello", 2),
    "across two tokens": (["o w"], ["Hello", " wor", "ld!"], "Hell", 2),
    "across four tokens": (["llo world"], ["Hello", " wor", "l", "d", "!"], "He", 4),
    "at the first token": (["Hel"], ["Hello", "ld!"], "", 1),
    "a prefix that diverges": (["STOPS"], ["STOP", "aab"], "STOPaab", 2),
    "a prefix held to the end": (["STOPS"], ["Hello", "STOP"], "HelloSTOP", 2),
    "longer than the output": (["x" * 50], ["Hello"], "Hello", 1),
    "the earliest of two": (["d!", "o w"], ["Hello", " wor", "ld!"], "Hell", 2),
    "overlapping itself": (["ab"], ["aab"], "a", 1),
    "restart inside a match": (["STOP"], ["STO", "STOP"], "STO", 2),
    "beside a character of several bytes": (["b"], ["汉b"], "汉", 1),
    "a character of several bytes": (["汉"], ["a汉c"], "a", 4),
    "looks like a special token": (["</s>"], ["Hello", "</s", ">x"], "Hello", 3),
}


@pytest.mark.parametrize(("stops", "pieces", "text", "tokens"), STOP_CASES.values(), ids=STOP_CASES)
@pytest.mark.parametrize("together", [False, True], ids=["one by one", "in one output"])
def test_stop_strings(stops, pieces, text, tokens, together):
    token_ids = ids(*pieces)
    steps = [token_ids] if together else [[token_id] for token_id in token_ids]
    made = generation(Script(steps, "length"), stop_strings=stops)
    stopped = text != "".join(pieces)
    shown = read(made)
    assert "".join(shown) == text
    assert made.completion_tokens == tokens
    assert made.finish_reason == ("stop" if stopped else "length")
    if stopped and tokens < len(token_ids) and not together:
        assert made.stream.close_reasons == ["stop"]
        assert made.stream.outputs_sent == tokens


def test_min_tokens_hides_earlier_tokens_from_stop_strings():
    made = generation(
        Script([ids("STOP"), ids("STOP"), ids("STOP")]), stop_strings=["STOP"], min_tokens=2
    )
    assert "".join(read(made)) == "STOPSTOP"
    assert made.completion_tokens == 3


@pytest.mark.parametrize("stops", [[], ["zzz"]])
def test_the_stop_token_is_counted_and_not_shown(stops):
    made = generation(Script([ids("Hello"), ids(EOS)]), stop_strings=stops)
    assert read(made) == ["Hello", ""]
    assert (made.finish_reason, made.completion_tokens) == ("stop", 2)


def test_a_stop_token_of_ordinary_text_is_not_shown():
    made = generation(Script([ids("Hello"), ids("STOP")], finish_reason="stop"))
    assert "".join(read(made)) == "Hello"
    assert made.completion_tokens == 2


def test_a_stop_token_at_once_gives_an_empty_text():
    made = generation(Script([ids(EOS)]))
    assert read(made) == [""]
    assert made.completion_tokens == 1


def test_length_flushes_an_unfinished_character():
    made = generation(Script([ids("a汉")]), max_tokens=3)
    assert read(made) == ["a\ufffd"]
    assert made.finish_reason == "length"


def test_cached_tokens_come_from_the_first_output():
    made = generation(Script([ids("a"), ids("b")], cached_tokens=7))
    read(made)
    assert made.cached_tokens == 7


@pytest.mark.parametrize(
    "script",
    [
        Script([ids("a"), GenerationFailed("The worker died.")]),
        Script([ids("a"), []], finish_reason="error", error="The worker died."),
        Script([ids("a"), []], finish_reason="abort", error="The worker died."),
    ],
    ids=["raised", "error", "abort"],
)
@pytest.mark.parametrize("count", [1, 2])
def test_a_failure_reaches_the_reader(script, count):
    group = GenerationGroup([generation(script, index=i) for i in range(count)])

    async def collect() -> None:
        async for _ in group.deltas():
            pass

    with pytest.raises(GenerationFailed, match="The worker died"):
        asyncio.run(collect())


def test_several_sequences_are_merged_and_summed():
    group = GenerationGroup(
        [
            generation(Script([ids("Hello"), ids(" wor")]), index=0),
            generation(Script([ids("ld!")] * 5, cached_tokens=1), index=1),
        ]
    )
    texts = ["", ""]
    finished = []

    async def collect() -> None:
        async for batch in group.deltas():
            for delta in batch:
                texts[delta.index] += delta.text
                if delta.finish_reason:
                    finished.append(delta.index)

    asyncio.run(collect())
    assert texts == ["Hello wor", "ld!" * 5]
    assert sorted(finished) == [0, 1]
    usage = group.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (2, 7, 9)
    assert usage.prompt_tokens_details.cached_tokens == 1


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(ids(*WORDS, "é", "a", EOS)), min_size=1, max_size=12),
    st.lists(st.sampled_from(["ld", "STOP", "ab", "o w", "é", "汉b"]), max_size=3, unique=True),
    st.integers(0, 4),
    st.data(),
)
def test_the_answer_does_not_depend_on_how_outputs_are_grouped(token_ids, stops, minimum, data):
    cuts = data.draw(st.lists(st.integers(0, len(token_ids)), max_size=4).map(sorted))
    bounds = zip([0, *cuts], [*cuts, len(token_ids)], strict=True)
    grouped = [token_ids[start:end] for start, end in bounds]
    answers = []
    for steps in ([[token_id] for token_id in token_ids], grouped):
        made = generation(Script(steps), stop_strings=stops, min_tokens=minimum)
        answers.append(("".join(read(made)), made.completion_tokens, made.finish_reason))
    assert answers[0] == answers[1]
