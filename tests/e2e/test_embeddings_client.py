"""Vectors from a real server by the official openai package, beside streams."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import numpy as np
import openai
import pytest
from live_server import Server
from mlx_lm.utils import load_model
from openai import OpenAI

MODEL = "small"
TEXTS = ["Hello there", "a", "Something longer than a block of the cache. " * 6]


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


def tokens_of(server: Server, text: str) -> list[int]:
    tokens: list[int] = json.loads(server.post("/tokenize", {"prompt": text})[2])["tokens"]
    return tokens


def embed(client: OpenAI, input: object, **options: object) -> np.ndarray:
    answer = client.embeddings.create(model=MODEL, input=input, **options)  # type: ignore[call-overload]
    assert [each.index for each in answer.data] == list(range(len(answer.data)))
    return np.array([each.embedding for each in answer.data])


def test_vectors_are_those_of_mlx_lm(client: OpenAI, server: Server, small_model: Path) -> None:
    model, _ = load_model(small_model)
    tokens = [tokens_of(server, text) for text in TEXTS]
    found = embed(client, TEXTS)
    for row, each in zip(found, tokens, strict=True):
        with mx.stream(mx.cpu):
            hidden = np.array(model.model(mx.array([each]))[0, -1].astype(mx.float32))
        np.testing.assert_allclose(row, hidden / np.linalg.norm(hidden), atol=2e-5)
    # Token arrays, and the other encoding, which the client only uses when told to.
    np.testing.assert_allclose(embed(client, tokens), found, atol=2e-5)
    np.testing.assert_allclose(embed(client, TEXTS, encoding_format="float"), found, atol=2e-5)


def test_fewer_dimensions_are_of_length_one_again(client: OpenAI) -> None:
    whole, short = embed(client, TEXTS), embed(client, TEXTS, dimensions=8)
    assert short.shape == (len(TEXTS), 8)
    for row, cut in zip(whole, short, strict=True):
        np.testing.assert_allclose(cut, row[:8] / np.linalg.norm(row[:8]), atol=2e-5)
        assert math.isclose(np.linalg.norm(cut), 1, abs_tol=1e-5)
    with pytest.raises(openai.BadRequestError) as refused:
        embed(client, "a", dimensions=10_000)
    assert refused.value.param == "dimensions"


def test_streams_beside_vectors_are_as_alone(client: OpenAI, server: Server) -> None:
    def stream(seed: int) -> str:
        chunks = client.completions.create(
            model=MODEL, prompt=f"number {seed}", max_tokens=60, seed=seed, stream=True
        )
        return "".join(chunk.choices[0].text for chunk in chunks)

    alone, expected = [stream(seed) for seed in range(4)], embed(client, TEXTS)
    with ThreadPoolExecutor(8) as pool:
        streams = [pool.submit(stream, seed) for seed in range(4)]
        vectors = [pool.submit(embed, client, TEXTS * 20) for _ in range(3)]
        assert [each.result() for each in streams] == alone
        for each in vectors:
            np.testing.assert_allclose(each.result(), np.tile(expected, (20, 1)), atol=2e-5)
    server.idle_metrics()
