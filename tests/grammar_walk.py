"""A small tokenizer, and texts drawn at random through a grammar's masks."""

from __future__ import annotations

import functools
from typing import Final, NamedTuple

import numpy as np
from llguidance import LLTokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from quire.engine.grammar import GrammarCompiler, GrammarState, mask_words
from quire.engine.grammar_tokens import make_tokenizer

EOS: Final = "<|im_end|>"
# Added tokens, as model families have them; the last ones are not "special".
MARKERS: Final = (EOS, "<|call|>")
PLAIN_MARKERS: Final = ("<think>", "</think>", "<tool_call>", "</tool_call>")

_CORPUS: Final = [
    '{"name": "value", "type": "string", "items": [1, 2.5, true, false, null], "id": "a-b_c"}\n',
    '{"city": "Rome", "properties": {"x": {"y": "2024-01-31T10:20:30Z"}}, "email": "a@b.org"}\n',
    "The quick brown fox jumps over the lazy dog. http://example.com/path?q=1 ünïcode ✓\n",
    "<function=f>\n<parameter=n>\n1\n</parameter>\n</function>\n",
] * 8


@functools.cache
def small_tokenizer() -> Tokenizer:
    """Byte-level BPE of some 500 tokens, one for each byte among them, and markers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        show_progress=False,
        special_tokens=list(MARKERS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_tokens([AddedToken(text, special=False) for text in PLAIN_MARKERS])
    return tokenizer


@functools.cache
def grammar_tokenizer() -> LLTokenizer:
    return make_tokenizer(small_tokenizer().to_str(), [small_tokenizer().token_to_id(EOS)])


@functools.cache
def compiler() -> GrammarCompiler:
    return GrammarCompiler(grammar_tokenizer(), threads=1)


def start(grammar: str) -> GrammarState:
    return compiler().new_state(compiler().compile(grammar).result())


class Text(NamedTuple):
    token_ids: list[int]
    content: bytes  # markers included, the end token not
    is_complete: bool  # False: cut after the longest length


@functools.cache
def _closing() -> np.ndarray:
    """Which tokens bring a text nearer to its end: quotes, brackets, markers, the end itself."""
    table = grammar_tokenizer()
    return np.array(
        [
            table.is_special_token(token)
            or table.decode_bytes([token]).lstrip()[:1] in (b'"', b"}", b"]", b"<", b"\n")
            for token in range(table.vocab_size)
        ],
        np.float64,
    )


def allowed_tokens(state: GrammarState, maker: GrammarCompiler | None = None) -> np.ndarray:
    """The token ids that may come next; ``maker`` has made ``state``, None: :func:`compiler`."""
    maker = maker or compiler()
    out = np.empty((1, mask_words(maker.vocab_size)), np.int32)
    maker.fill_masks([state], out)
    state.check()
    bits = np.unpackbits(out.view(np.uint8), bitorder="little")[: maker.vocab_size]
    return np.flatnonzero(bits)


def may_end(state: GrammarState, maker: GrammarCompiler | None = None) -> bool:
    """Whether the text so far is complete, even if more could follow."""
    return small_tokenizer().token_to_id(EOS) in allowed_tokens(state, maker)


def draw_text(state: GrammarState, rng: np.random.Generator, max_tokens: int = 300) -> Text:
    """Draw tokens as a model without any sense would, ever more eager to come to an end."""
    eos = small_tokenizer().token_to_id(EOS)
    token_ids: list[int] = []
    for step in range(max_tokens):
        if state.is_finished:
            return Text(token_ids, _content(token_ids), True)
        allowed = allowed_tokens(state)
        assert allowed.size, f"nothing may follow {_content(token_ids)!r}"
        eagerness = _closing()[allowed] * (step / 20)
        token = int(allowed[np.argmax(rng.gumbel(size=allowed.size) + eagerness)])
        if token == eos:
            state.accept(token)
            assert state.is_finished
            return Text(token_ids, _content(token_ids), True)
        state.accept(token)
        token_ids.append(token)
    return Text(token_ids, _content(token_ids), state.is_finished)


def _content(token_ids: list[int]) -> bytes:
    table, markers = grammar_tokenizer(), small_tokenizer().get_added_tokens_decoder()
    pieces = [
        markers[token].content.encode() if token in markers else table.decode_bytes([token])
        for token in token_ids
    ]
    return b"".join(pieces)
