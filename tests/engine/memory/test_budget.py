"""How memory is divided: over Macs of every size, and for any pools."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.engine.errors import EngineError
from quire.engine.memory.budget import Budget, DoesNotFit, Pool, divide, working_set
from quire.engine.memory.fit import Demand, size_pools, too_heavy

GIB = 1 << 30
MACS = (8, 16, 24, 36, 64, 128, 192, 512)  # GB


@dataclass(frozen=True)
class Model:
    weights: int
    activations: int  # of a step of 512 tokens
    kv_per_token: int
    context: int
    dtype: str = "4-bit"


MODELS = {
    "demo": Model(8 << 20, 20 << 20, 6144, 2048, "float32"),
    "0.6B": Model(1200 << 20, 200 << 20, 114_688, 40_960, "bfloat16"),
    "8B 4-bit": Model(4600 << 20, 600 << 20, 147_456, 40_960),
    "70B 4-bit": Model(39 * GIB, 900 << 20, 327_680, 131_072),
}


def on_mac(gigabytes: int, model: Model, fraction: float | None = None) -> tuple[Budget, Demand]:
    usable = working_set(gigabytes * GIB, "metal")
    budget = Budget("metal", usable, fraction, model.weights, model.activations)
    return budget, Demand(model.context, 64, 512, 16, model.kv_per_token, model.dtype)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("gigabytes", MACS)
@pytest.mark.parametrize("fraction", [None, 0.5, 0.95])
def test_every_mac(gigabytes: int, name: str, fraction: float | None) -> None:
    model = MODELS[name]
    budget, demand = on_mac(gigabytes, model, fraction)
    if model.weights + 2 * model.activations > budget.limit:
        with pytest.raises(EngineError, match="would fit"):
            size_pools(budget, demand, None)
        return
    blocks = size_pools(budget, demand, None).blocks
    pages = blocks * 16 * model.kv_per_token
    sequences = 64 * -(-model.context // 16)
    assert 5 <= blocks <= 1 + sequences
    # With the activations of a step, and as many freed buffers, nothing passes the limit.
    everything = model.weights + pages + model.activations + budget.cache_bytes(pages)
    assert everything <= budget.limit <= working_set(gigabytes * GIB, "metal")
    assert budget.cache_bytes(pages) >= model.activations
    # Half of the rest is the Mac's owner's, but for one request of full length.
    block = 16 * model.kv_per_token
    one = block * (1 + -(-model.context // 16))
    room = budget.rest if fraction else max(budget.rest / 2, min(budget.rest, one))
    assert pages <= room
    assert blocks == 1 + sequences or pages + block > room


def test_the_demo_takes_what_its_requests_could_use() -> None:
    budget, demand = on_mac(64, MODELS["demo"])
    blocks = size_pools(budget, demand, None).blocks
    assert blocks == 1 + 64 * 128
    assert blocks * 16 * 6144 < 0.81e9


@pytest.mark.parametrize("device", ["cpu", "cuda", "metal"])
def test_a_load_leaves_no_more_than_a_tenth(device: str) -> None:
    """Weights, pages and freed buffers, against weights, pages and a step's peak."""
    for model in MODELS.values():
        budget = Budget(device, 200 * GIB, None, model.weights, model.activations)
        pages = min(10 * GIB, budget.pool_bytes(0))
        bound = 1.1 * (model.weights + pages + model.activations)
        assert model.weights + pages + budget.cache_bytes(pages) <= bound


def test_what_would_fit_is_said_and_does() -> None:
    """An 8B model in half precision whose steps of 8,192 tokens need 46 GB, on a GPU of 80."""
    budget = Budget("cuda", 80 * GIB, None, 16 * GIB, 46 * GIB)
    demand = Demand(40_960, 64, 8192, 16, 147_456, "bfloat16")
    with pytest.raises(EngineError) as caught:
        size_pools(budget, demand, None)
    text = str(caught.value)
    assert "46.0GiB that steps of 8192 tokens need" in text
    assert text.endswith("--max-num-batched-tokens 4096 would fit")
    smaller = replace(budget, activations=23 * GIB)
    assert size_pools(smaller, replace(demand, step_tokens=4096), None).blocks > 5
    # A model that only four bits, or more of the machine, make small enough.
    budget = Budget("metal", 16 * GIB, None, 14 * GIB, 1 << 20)
    with pytest.raises(EngineError, match=r": --memory-fraction 0.95 or 4-bit weights would fit"):
        size_pools(budget, demand, None)
    assert size_pools(replace(budget, fraction=0.95), demand, None).blocks >= 5
    with pytest.raises(EngineError, match="a smaller model would fit"):
        size_pools(replace(budget, weights=40 * GIB), replace(demand, dtype="4-bit"), None)
    text = too_heavy(20 * GIB, "bfloat16", 12 * GIB)
    assert text.endswith("at 4 bits they would take about 5.6GiB")
    assert "4 bits" not in too_heavy(20 * GIB, "4-bit", 12 * GIB)


def test_a_wanted_size_is_given_or_refused() -> None:
    budget, demand = on_mac(64, MODELS["demo"])
    assert size_pools(budget, demand, 4 * GIB).blocks == 4 * GIB // (16 * 6144)
    with pytest.raises(EngineError, match="raise it to at least"):
        size_pools(budget, demand, 100_000)
    with pytest.raises(EngineError, match=r"60.0GiB does not fit .* 48.0GiB: 48.0GiB would"):
        size_pools(budget, demand, 60 * GIB)


units = st.integers(0, 10**5)
pools = st.builds(
    Pool, st.integers(1, 10**6), st.integers(0, 100), enough=units, one=units, usual=units
)


@given(st.integers(0, 10**9), st.lists(pools, min_size=1, max_size=3))
def test_pools_share_what_there_is(room: int, wanted: list[Pool]) -> None:
    least = sum(pool.least * pool.unit_bytes for pool in wanted)
    if least > room:
        with pytest.raises(DoesNotFit):
            divide(room, wanted)
        return
    units = divide(room, wanted)
    assert all(n >= pool.least for n, pool in zip(units, wanted, strict=True))
    assert all(n <= max(pool.least, pool.enough) for n, pool in zip(units, wanted, strict=True))
    assert sum(n * pool.unit_bytes for n, pool in zip(units, wanted, strict=True)) <= room
    most = sum(max(pool.least, pool.enough) * pool.unit_bytes for pool in wanted)
    if most <= room:
        assert units == [max(pool.least, pool.enough) for pool in wanted]


def test_states_of_recurrent_layers_share_the_room_with_pages():
    # Qwen3.5-9B at 4 bits: 32 KiB of pages a token, 51.5 MB of states a sequence.
    per_token, per_state = 32 << 10, 51_500_000
    budget = Budget("metal", 18 * GIB, None, weights=5 * GIB, activations=GIB // 4)
    demand = Demand(262_144, 64, 512, 16, per_token, "4-bit", per_state, 1568)
    blocks, slots, _ = size_pools(budget, demand, None)
    taken = blocks * 16 * per_token + slots * per_state
    assert taken <= demand.pool_bytes(budget)
    assert taken > 0.98 * demand.pool_bytes(budget)
    assert slots >= 3
    blocks, slots, _ = size_pools(budget, demand, 4 * GIB)
    assert blocks * 16 * per_token == pytest.approx(2 * GIB, rel=0.05)
    assert slots * per_state == pytest.approx(2 * GIB, rel=0.05)
    with pytest.raises(EngineError, match="64 tokens and 3 states"):
        size_pools(budget, demand, 100 << 20)


def test_a_model_without_pages_gives_all_to_states():
    budget = Budget("metal", 18 * GIB, None, weights=5 * GIB, activations=GIB // 4)
    demand = Demand(8192, 64, 512, 16, 0, "bfloat16", 100 << 20, 2048)
    blocks, slots, _ = size_pools(budget, demand, None)
    assert blocks == 1 + 64 * 512
    assert slots == int(demand.pool_bytes(budget) - blocks) // (100 << 20)
    assert size_pools(budget, demand, 2 * GIB) == (blocks, 20, 0)
    assert size_pools(budget, replace(demand, bytes_per_state=1000), None).slots == 1 + 128 + 256


# Gemma 4 31B: 10 layers of 4 heads of 512 whose keys are values too, and 50 of 16 of 256.
GEMMA = Demand(
    262_144, 64, 512, 16, 80 << 10, "4-bit", window=1024, bytes_per_window_token=800 << 10
)


@pytest.mark.parametrize("gigabytes", [48, 64, 128, 512])
def test_windows_share_the_room_with_pages(gigabytes: int):
    budget = Budget("metal", working_set(gigabytes * GIB, "metal"), None, 17 * GIB, GIB // 4)
    room = GEMMA.pool_bytes(budget)
    sizes = size_pools(budget, GEMMA, None)
    block, window_block = 16 * (80 << 10), 16 * (800 << 10)
    taken = sizes.blocks * block + sizes.window_blocks * window_block
    assert room - block - window_block < taken <= room
    tokens, windows = (sizes.blocks - 1) * 16, (sizes.window_blocks - 1) // 65
    assert windows >= 4 or tokens < 262_144, "a context as long as can be, and no windows"
    assert windows == 64 or tokens / windows < 66_000, "contexts without windows"
    assert tokens / windows > 8192, "windows without contexts"


def test_one_request_of_full_length_comes_before_windows_for_many():
    budget = Budget("cuda", 80 * GIB, None, 40 * GIB, GIB)
    demand = replace(GEMMA, context=131_072)
    one = 131_072 * (80 << 10)
    for room in (15 * GIB, 20 * GIB, 40 * GIB):
        tight = replace(budget, usable=int((42 * GIB + room) / 0.85))
        assert size_pools(tight, demand, None).blocks * 16 * (80 << 10) >= one


def test_a_wanted_size_leaves_to_blocks_what_windows_need_not():
    budget = Budget("metal", 100 * GIB, None, 12 * GIB, GIB // 4)
    # gpt-oss-20b: 12 layers of each kind, 8 heads of 64, a window of 128.
    demand = Demand(
        131_072, 64, 512, 16, 24 << 10, "4-bit", window=128, bytes_per_window_token=24 << 10
    )
    sizes = size_pools(budget, demand, 8 * GIB)
    windows = sizes.window_blocks * 16 * (24 << 10)
    assert windows < 0.7 * GIB
    assert sizes.blocks * 16 * (24 << 10) + windows == pytest.approx(8 * GIB, rel=0.001)
    with pytest.raises(EngineError, match="64 tokens and a window of 128 with a step of 128"):
        size_pools(budget, demand, 1 << 20)
    # Without other layers a block of theirs is only a number, and windows get all.
    alone = size_pools(budget, replace(demand, bytes_per_token=0), 2 * GIB)
    assert alone.window_blocks * 16 * (24 << 10) == pytest.approx(2 * GIB, rel=0.01)


def test_a_window_wider_than_the_context_is_no_wider_than_that():
    budget = Budget("metal", 100 * GIB, None, 12 * GIB, GIB // 4)
    sizes = size_pools(budget, replace(GEMMA, context=256, max_num_seqs=2), None)
    assert sizes.window_blocks <= 2 * (1 + 64 + 2 * 17)
