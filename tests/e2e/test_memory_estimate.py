"""`quire estimate` against what a server takes."""

from __future__ import annotations

from pathlib import Path

import pytest
from live_server import Server, eventually

from quire.loadtest.model_folder import ModelShape, make_model
from quire.serve.memory_plan import judge, memory
from quire.serve.model_facts import read_facts

STEP = 512  # the default
TOLERANCE = 1.05
# Beside other work MLX comes further ahead of a CPU, and keeps more buffers than it needs.
ATTEMPTS = 3
KINDS = ("weights", "kv_cache", "peak")


@pytest.mark.parametrize(
    "shape",
    [
        ModelShape(layers=2),
        ModelShape(architecture="qwen3", layers=2, intermediate=2560),
        ModelShape(layers=2, dtype="bfloat16", bits=4),
        ModelShape(layers=2, intermediate=512),
    ],
    ids=["llama", "qwen3", "4 bits", "attention the most"],
)
def test_weights_cache_and_peak(shape: ModelShape, tmp_path: Path):
    folder = tmp_path / "model"
    make_model(folder, shape)
    facts = read_facts(folder)
    per_token = memory(facts, "cpu", 1, 1).kv_per_token
    for _ in range(ATTEMPTS):
        taken = measure(folder)
        expected = memory(facts, "cpu", int(taken["kv_cache"]) // per_token, STEP)
        if taken["peak"] <= TOLERANCE * expected.total:
            break
    assert expected.weights == taken["weights"]
    assert expected.kv_cache == taken["kv_cache"]
    assert expected.total == pytest.approx(taken["peak"], rel=TOLERANCE - 1)


def test_the_context_that_a_server_has_room_for(tmp_path: Path):
    """The 2 GiB that it takes by default hold less than its machine could, and one long context."""
    folder = tmp_path / "model"
    shape = ModelShape(
        hidden=64, layers=2, heads=8, kv_heads=8, head_dim=512, intermediate=64, max_position=32768
    )
    make_model(folder, shape)
    server = Server(model=folder).wait_ready()
    try:
        metrics = server.metrics()
        blocks = sum(n for name, n in metrics.items() if name.startswith("quire_kv_blocks{"))
    finally:
        server.stop()
    assert judge(read_facts(folder), "cpu", 16 << 30, 4096).by_default == 16 * blocks


def measure(folder: Path) -> dict[str, float]:
    """Bytes that a server takes for one long prompt, by kind."""
    flags = ("--kv-cache-memory", "32MiB", "--max-num-batched-tokens", str(STEP))
    server = Server(*flags, "--max-num-seqs", "8", model=folder).wait_ready()
    try:
        prompt = [7 * i % 256 for i in range(STEP + 100)]
        body = {"model": "model", "prompt": prompt, "max_tokens": 1}
        assert server.post("/v1/completions", body)[0] == 200
        # The worker's last report may come a moment after its answer.
        eventually(lambda: server.metrics()["quire_steps_total"] == 2, "both steps are reported")
        metrics = server.metrics()
    finally:
        server.stop()
    return {kind: metrics[f'quire_memory_bytes{{kind="{kind}"}}'] for kind in KINDS}
