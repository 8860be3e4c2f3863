"""Text arrives in whole characters and equals what the tokenizer decodes."""

import re
from functools import cache

import pytest
from fake_backend import EOS, byte_level_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from quire.serve.detokenizer import Detokenizer, StopStringMatcher, TokenBytes

FAMILY = "👩‍👩‍👧"
TEXTS = st.text(alphabet=f"ab é汉{FAMILY}\n", max_size=12)


@cache
def byte_level() -> Tokenizer:
    return byte_level_tokenizer(["<think>", "two words", "né"])


@cache
def sentencepiece() -> Tokenizer:
    """Byte fallback, spaces as U+2581, and the first space of a text dropped: Llama 2's layout."""
    pieces = [
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "a",
        "b",
        "▁a",
        "é",
        "</s>",
    ]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=[("▁", "a")], byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


@cache
def metaspace() -> Tokenizer:
    vocab = {piece: i for i, piece in enumerate(["<unk>", "▁", "a", "b", "▁a", "▁b", "ab"])}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def deltas(
    tokenizer: Tokenizer, token_ids: list[int], prompt: list[int] | None = None
) -> list[str]:
    detokenizer = Detokenizer(TokenBytes(tokenizer), prompt or [])
    return [*(detokenizer.push([token_id]) for token_id in token_ids), detokenizer.flush()]


def decode_runs(tokenizer: Tokenizer, token_ids: list[int]) -> str:
    """Sentencepiece's text where invalid bytes spoil themselves but not their neighbours."""
    pieces = [tokenizer.id_to_token(token_id) for token_id in token_ids]
    data = b"".join(
        bytes.fromhex(piece[3:5]) if re.fullmatch("<0x..>", piece) else piece.encode()
        for piece in pieces
        if piece != "</s>"
    )
    return data.decode(errors="replace").replace("▁", " ").removeprefix(" ")


def random_ids(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=40)


@settings(deadline=None)
@given(random_ids(byte_level()))
def test_random_byte_level_tokens_give_the_tokenizers_text(token_ids):
    assert "".join(deltas(byte_level(), token_ids)) == byte_level().decode(token_ids)


@settings(deadline=None)
@given(random_ids(sentencepiece()))
def test_random_byte_fallback_tokens_spoil_only_invalid_bytes(token_ids):
    assert "".join(deltas(sentencepiece(), token_ids)) == decode_runs(sentencepiece(), token_ids)


@settings(deadline=None)
@given(random_ids(metaspace()))
def test_random_metaspace_tokens_give_the_tokenizers_text(token_ids):
    assert "".join(deltas(metaspace(), token_ids)) == metaspace().decode(token_ids)


@pytest.mark.parametrize("tokenizer", [byte_level(), sentencepiece()])
@settings(deadline=None)
@given(text=TEXTS)
def test_multi_byte_text_comes_back_in_whole_characters(tokenizer, text):
    token_ids = tokenizer.encode(text).ids
    pieces = deltas(tokenizer, token_ids)
    assert "".join(pieces) == tokenizer.decode(token_ids) == text
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("tokenizer", [byte_level(), sentencepiece(), metaspace()])
@settings(deadline=None)
@given(data=st.data())
def test_a_continuation_keeps_its_leading_space(tokenizer, data):
    words = data.draw(st.lists(st.sampled_from(["a", "b", "ab"]), min_size=1, max_size=6))
    token_ids = tokenizer.encode(" ".join(words)).ids
    cut = data.draw(st.integers(0, len(token_ids)))
    prompt, generated = token_ids[:cut], token_ids[cut:]
    whole = tokenizer.decode(prompt) + "".join(deltas(tokenizer, generated, prompt))
    assert whole == tokenizer.decode(token_ids)


@pytest.mark.parametrize("split", [1, 2])
def test_a_character_begun_in_the_prompt_is_completed(split):
    token_ids = byte_level().encode("汉").ids
    assert "".join(deltas(byte_level(), token_ids[split:], token_ids[:split])) == "汉"


@pytest.mark.parametrize(
    ("tokenizer", "char"),
    [(byte_level(), "é"), (byte_level(), "汉"), (sentencepiece(), "汉"), (sentencepiece(), "👩")],
)
def test_an_incomplete_character_is_held_back_and_flushed_once(tokenizer, char):
    pieces = deltas(tokenizer, tokenizer.encode("b" + char).ids[:-1])
    assert "".join(pieces[:-1]) == "b"
    assert pieces[-1] == "\ufffd"


def test_endless_invalid_bytes_are_never_held_back():
    invalid = byte_level().token_to_id("ÿ")  # how byte-level BPE writes 0xFF
    detokenizer = Detokenizer(TokenBytes(byte_level()), [])
    assert {detokenizer.push([invalid]) for _ in range(5000)} == {"\ufffd"}
    assert detokenizer.flush() == ""


def test_special_and_unknown_tokens_are_not_shown():
    tokenizer = byte_level()
    h, eos, think = (tokenizer.token_to_id(piece) for piece in ("h", EOS, "<think>"))
    assert deltas(tokenizer, [h, eos, 10_000, think, h]) == ["h", "", "", "<think>", "h", ""]


# ---- stop strings


def first_completed(text: str, stops: list[str]) -> tuple[str, bool]:
    for end in range(1, len(text) + 1):
        lengths = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if lengths:
            return text[: end - max(lengths)], True
    return text, False


@settings(deadline=None)
@given(
    st.lists(st.text("ab汉", max_size=5), max_size=8),
    st.lists(st.text("ab汉", min_size=1, max_size=4), min_size=1, max_size=4),
)
def test_stop_strings_are_found_however_the_text_is_cut(pieces, stops):
    matcher = StopStringMatcher(stops)
    shown, found = "", False
    expected, expected_found = first_completed("".join(pieces), stops)
    for piece in pieces:
        text, found = matcher.push(piece)
        shown += text
        assert expected.startswith(shown)
        if found:
            break
    if not found:
        shown += matcher.flush()
    assert (shown, found) == (expected, expected_found)


@settings(deadline=None)
@given(st.text("ab", max_size=30), st.text("ab", min_size=1, max_size=6))
def test_no_more_is_held_back_than_could_become_the_stop_string(text, stop):
    matcher = StopStringMatcher([stop])
    shown, found = matcher.push(text)
    if not found:
        held = text[len(shown) :]
        assert stop.startswith(held)
        assert not any(text.endswith(stop[:n]) for n in range(len(held) + 1, len(stop)))
