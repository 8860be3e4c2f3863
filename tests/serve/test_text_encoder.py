"""Encoding beside an event loop: what it may hold up, and how long a text can be known to be."""

import asyncio
import itertools
import json
import threading
from importlib.resources import files

import pytest
from fake_backend import byte_level_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from quire.serve.text_encoder import LONG_TEXT, TextEncoder


def demo_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer.from_file(
        str(files("quire.engine.demo") / "quire-demo" / "tokenizer.json")
    )
    tokenizer.no_truncation()
    return tokenizer


def composing_tokenizer(form: normalizers.Normalizer) -> Tokenizer:
    tokenizer = byte_level_tokenizer([" wor", "é"])
    tokenizer.normalizer = form
    return tokenizer


def byte_fallback_tokenizer() -> Tokenizer:
    """As SentencePiece's models are converted: spaces are marks, unknown characters bytes."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a", "▁▁", "▁▁▁▁"]
    merges = [("▁", "a"), ("▁", "▁"), ("▁▁", "▁▁")]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.ByteFallback()
    return tokenizer


KNOWN = {
    "byte level": byte_level_tokenizer([" wor", "é"]),
    "demo": demo_tokenizer(),
    "NFC": composing_tokenizer(normalizers.NFC()),
    "NFKC": composing_tokenizer(normalizers.NFKC()),
    "byte fallback": byte_fallback_tokenizer(),
}
TEXTS = st.one_of(
    st.text(),
    st.lists(
        st.sampled_from(
            [" wor", "é", "e\u0301", "\u212b", "\u03b9\u0308\u0301", "\U0001d400", "a", "▁"]
        ),
        max_size=30,
    ).map("".join),
    st.sampled_from([" ", "  ", "\n", "<|end|>", "\u1112\u1161\u11ab"]).map(lambda s: s * 50),
)


@pytest.mark.parametrize("name", KNOWN)
@given(text=TEXTS)
def test_no_text_has_fewer_tokens_than_its_bytes_allow(name, text):
    tokenizer = KNOWN[name]
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert 0 <= TextEncoder(tokenizer).fewest_tokens(text) <= max(len(ids), 0)


@pytest.mark.parametrize("name", KNOWN)
def test_long_texts_are_known_to_be_long(name):
    assert TextEncoder(KNOWN[name]).fewest_tokens("the cat " * 100_000) >= 10_000


def unknown_words() -> Tokenizer:
    return Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))


def with_removed_spaces() -> Tokenizer:
    tokenizer = byte_level_tokenizer()
    split = pre_tokenizers.Split(" ", "removed")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel()])
    return tokenizer


def with_stripped_text() -> Tokenizer:
    tokenizer = byte_level_tokenizer()
    tokenizer.normalizer = normalizers.Strip()
    return tokenizer


def with_a_stripping_token() -> Tokenizer:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    return tokenizer


def without_some_bytes() -> Tokenizer:
    return Tokenizer(models.BPE(vocab={"a": 0, "<unk>": 1}, merges=[], unk_token="<unk>"))


@pytest.mark.parametrize(
    "make",
    [
        unknown_words,
        with_removed_spaces,
        with_stripped_text,
        with_a_stripping_token,
        without_some_bytes,
    ],
)
def test_nothing_is_claimed_where_a_token_may_stand_for_any_length(make):
    assert TextEncoder(make()).fewest_tokens("the cat " * 1000) == 0


def test_batches_encode_and_decode_as_single_texts_do():
    tokenizer = byte_level_tokenizer([" wor"])
    encoder = TextEncoder(tokenizer)
    texts = ["", "Hello wor", "é<|end|>" * 2000]
    encoded = asyncio.run(encoder.encode(texts))
    assert encoded == [tokenizer.encode(text).ids for text in texts]
    assert [asyncio.run(encoder.decode(ids)) for ids in encoded] == texts


@pytest.mark.parametrize("size", [1, LONG_TEXT + 1])
def test_long_texts_leave_the_event_loop(size):
    encoder = TextEncoder(byte_level_tokenizer())
    thread = asyncio.run(encoder.run(size, threading.current_thread))
    assert (thread is threading.main_thread()) == (size <= LONG_TEXT)


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_the_event_loop_turns_while_a_long_text_is_worked_on(direction):
    """Which it would not if the work kept Python's lock, in a thread or not."""
    encoder = TextEncoder(byte_level_tokenizer())
    text = "the cat sat " * 100_000
    ids = encoder.encode_here([text], False)[0]

    async def turns() -> int:
        work = encoder.encode([text]) if direction == "encode" else encoder.decode(ids * 4)
        task = asyncio.create_task(work)
        for turn in itertools.count():
            if task.done():
                return turn
            await asyncio.sleep(0.001)
        raise AssertionError("unreachable")

    assert asyncio.run(turns()) >= 20


def test_only_so_many_are_encoded_at_once_and_a_caller_that_leaves_is_skipped():
    encoder = TextEncoder(byte_level_tokenizer(), max_threads=1)
    release = threading.Event()
    started: list[int] = []

    async def scenario() -> None:
        def work(number: int) -> int:
            started.append(number)
            release.wait()
            return number

        tasks = [
            asyncio.create_task(encoder.run(10**6, lambda number=number: work(number)))
            for number in range(3)
        ]
        while not started:  # noqa: ASYNC110 - set from another thread
            await asyncio.sleep(0)
        tasks[1].cancel()
        await asyncio.sleep(0)
        assert started == [0]
        release.set()
        assert await asyncio.gather(tasks[0], tasks[2]) == [0, 2]

    asyncio.run(scenario())
    assert started == [0, 2]


def test_the_tokenizer_of_a_model_says_all_that_is_asked_of_it():
    """The parts of the library's own description that the bound is read from."""
    spec = json.loads(byte_fallback_tokenizer().to_str())
    assert {"model", "normalizer", "pre_tokenizer"} <= set(spec)
    assert {"type", "vocab", "byte_fallback"} <= set(spec["model"])
    assert [step["type"] for step in spec["normalizer"]["normalizers"]] == ["Prepend", "Replace"]
