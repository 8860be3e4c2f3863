"""Tokenizers know more tokens than some models have logits."""

from __future__ import annotations

from fake_backend import ready
from test_token_fields import CHAT, COMPLETIONS, chat, completion, ids, server


def test_tokens_without_logits_are_no_bad_words_and_mark_no_reasoning() -> None:
    known = min(ids("<think>") + ids("</think>") + ids("ld") + ids(" ld"))
    with server(info=ready(vocab_size=known)) as (running, backend):
        fields = completion("H", bad_words=["ld", "H"], max_tokens=1)
        assert running.request("POST", COMPLETIONS, fields).status == 200
        sent = backend.streams[0].request.sampling.bad_words
        refused = running.request("POST", CHAT, chat(thinking_token_budget=7))
    assert all(max(word) < known for word in sent)
    assert ids("H") in sent
    assert refused.error["param"] == "thinking_token_budget"
