"""Responses that are kept: whose, how many, and where their items are found."""

from __future__ import annotations

import msgspec
import pytest

from quire.serve.errors import ApiError
from quire.serve.response_store import ResponseStore, Stored


def stored(text: str) -> Stored:
    return Stored(msgspec.Raw(msgspec.json.encode([{"text": text}])), {"output": []})


def test_the_store_keeps_to_its_bytes() -> None:
    store = ResponseStore(max_bytes=1000)
    for number in range(10):
        store.add("", f"{number}", stored("x" * 200))
        store.find("", "0" if number < 3 else f"{number}")
    with pytest.raises(ApiError):
        store.find("", "1")
    assert store.find("", "9") == stored("x" * 200)
    store.add("", "huge", stored("x" * 2000))
    with pytest.raises(ApiError):
        store.find("", "huge")
    assert store.find("", "9")


def test_a_key_that_stores_much_costs_others_nothing() -> None:
    store = ResponseStore(max_bytes=1000)
    kept = stored("x" * 200)
    store.add("modest", "0", kept)
    for number in range(20):
        store.add("greedy", f"{number}", kept)
    assert store.find("modest", "0") == kept
    assert store.find("greedy", "19") == kept
    with pytest.raises(ApiError):
        store.find("greedy", "0")
    store.delete("modest", "0")
    with pytest.raises(ApiError):
        store.find("modest", "0")
    for number in range(4):  # room that nobody else asks for is theirs
        store.add("greedy", f"more {number}", kept)
    assert all(store.find("greedy", f"more {number}") for number in range(1, 4))


def test_items_are_found_as_long_as_their_response_and_by_its_owner() -> None:
    store = ResponseStore(max_bytes=1000)
    items = [{"id": name, "text": name * 20} for name in ("a", "b")]
    store.add("modest", "0", Stored(msgspec.Raw(b"[]"), {"output": items}))
    found = store.items("modest")
    assert [msgspec.json.decode(found(name) or b"") for name in ("b", "a")] == items[::-1]
    assert found("c") is None
    assert store.items("greedy")("a") is None
    store.delete("modest", "0")
    assert store.items("modest")("a") is None
    for number in range(9):  # until the first ones give way
        items = [{"id": f"item {number}", "text": "x" * 200}]
        store.add("greedy", f"{number}", Stored(msgspec.Raw(b"[]"), {"output": items}))
    assert store.items("greedy")("item 0") is None
    assert store.items("greedy")("item 8") is not None
