"""A conversation has the same tokens whatever of it was encoded before."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer

from quire.serve.token_cache import TokenCache

CORPUS = ["the user said hello, and the assistant: it's 1234 words\n\n of text é ü <tag>"] * 3
SPECIAL = ("<|a|>", "<|a|>b", "</s>")
TEXT = st.text(st.sampled_from("the user 's12\n\t é\u0301\u00a0<|a|>/"), max_size=120)


def trained(tokenizer: Tokenizer) -> Tokenizer:
    trainer = BpeTrainer(vocab_size=400, show_progress=False, special_tokens=["<unk>"])
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(s, normalized=False, special=True) for s in SPECIAL])
    return tokenizer


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(
        Regex(r" ?\p{L}+|\p{N}|\s+(?!\S)|\s+|[^\s\p{L}\p{N}]+"), "isolated"
    )
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.normalizer = normalizers.NFC()
    return trained(tokenizer)


def marked(scheme: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    return trained(tokenizer)


def prepended() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    return trained(tokenizer)


TOKENIZERS = {
    "byte level": byte_level(),
    **{f"marked {scheme}": marked(scheme) for scheme in ("always", "first", "never")},
    "prepended": prepended(),
}


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


@pytest.mark.parametrize("name", TOKENIZERS)
@given(st.lists(st.tuples(st.sampled_from(["", *SPECIAL]), TEXT), max_size=6), st.data())
def test_a_conversation_has_the_tokens_of_its_text(
    name: str, parts: list[tuple[str, str]], data: st.DataObject
) -> None:
    tokenizer = TOKENIZERS[name]
    most = data.draw(st.sampled_from([30, 10_000]))
    cache = TokenCache(tokenizer, most, shortest=data.draw(st.sampled_from([1, 20])))
    assert cache.usable
    text = ""
    for special, said in parts:
        text += special + said
        assert cache.encode(text) == encode(tokenizer, text)


class Counting:
    """A tokenizer that remembers what it has encoded."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.encoded: list[str] = []

    def get_added_tokens_decoder(self) -> dict[int, AddedToken]:
        return self._tokenizer.get_added_tokens_decoder()

    def encode_batch_fast(self, texts: list[str], *, add_special_tokens: bool) -> list[object]:
        self.encoded += texts
        return list(self._tokenizer.encode_batch_fast(texts, add_special_tokens=add_special_tokens))


def test_a_turn_encodes_what_is_new() -> None:
    tokenizer = Counting(TOKENIZERS["byte level"])
    cache = TokenCache(tokenizer)  # type: ignore[arg-type]
    first = "<|a|>the user said " + "hello " * 200
    tokenizer.encoded.clear()
    cache.encode(first)
    cache.encode(first + "</s>" + "words " * 200)
    assert tokenizer.encoded == [first, "</s>" + "words " * 200]
    cache.encode(first, salt="another's")
    assert tokenizer.encoded[2:] == [first]
    # Salts of any length and any characters tell apart.
    for salt in ("x" * 64, "x" * 65, "\ud800"):
        tokenizer.encoded.clear()
        cache.encode(first, salt=salt)
        assert tokenizer.encoded == [first]


def test_short_messages_are_encoded_at_once() -> None:
    tokenizer = Counting(TOKENIZERS["byte level"])
    cache = TokenCache(tokenizer)  # type: ignore[arg-type]
    tokenizer.encoded.clear()
    chat = "<|a|>user hello</s><|a|>the assistant"
    assert cache.encode(chat) == encode(TOKENIZERS["byte level"], chat)
    assert tokenizer.encoded == [chat]


def test_what_is_kept_is_bounded() -> None:
    tokenizer = Counting(TOKENIZERS["byte level"])
    cache = TokenCache(tokenizer, max_tokens=4000)  # type: ignore[arg-type]
    parts = ["<|a|>" + f"{number} " * 600 for number in range(20)]
    for part in parts:
        cache.encode(part)
        cache.encode(parts[0])
    assert cache._num_tokens == sum(map(len, cache._parts.values())) <= 4000
    tokenizer.encoded.clear()
    cache.encode(parts[0])  # never out of use
    cache.encode(parts[1])
    assert tokenizer.encoded == [parts[1]]


def test_tokens_that_take_space_from_their_neighbours_stop_it() -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken("<eats>", lstrip=True, normalized=False)])
    assert not TokenCache(tokenizer).usable


def test_without_special_tokens_there_is_nothing_to_keep() -> None:
    tokenizer = Tokenizer(models.BPE())
    assert not TokenCache(tokenizer).usable
