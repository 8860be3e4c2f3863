"""Memory under load: weights, pages and little else."""

from __future__ import annotations

import concurrent.futures
import random
from pathlib import Path

from live_server import Server


def test_the_peak_stays_near_weights_and_pages(small_model: Path) -> None:
    """MLX's own peak counter, over a burst of prompts and decodes that fills the pool."""
    server = Server(
        "--kv-cache-memory", "512MiB", "--max-num-seqs", "16", model=small_model
    ).wait_ready()
    try:
        draw = random.Random(0)
        bodies = [
            {
                "model": "small",
                "prompt": [draw.randrange(3, 250) for _ in range(draw.randint(1, 900))],
                "max_tokens": draw.randint(1, 60),
                "temperature": draw.choice([0, 1]),
                "ignore_eos": True,
            }
            for _ in range(120)
        ]
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda body: server.post("/v1/completions", body)[0], bodies))
        assert set(answers) == {200}
        memory = server.metrics()
        kinds = ("weights", "kv_cache", "peak")
        weights, pages, peak = (memory[f'quire_memory_bytes{{kind="{k}"}}'] for k in kinds)
        assert pages > 500 << 20
        assert peak <= 1.1 * (weights + pages)
    finally:
        assert server.stop() == 0
