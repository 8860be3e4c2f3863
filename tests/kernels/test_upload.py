from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from quire.kernels.upload import Staging


@pytest.fixture(autouse=True)
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)


def test_arrays_of_a_step_stay_until_the_step_after_it_is_built() -> None:
    staging = Staging()
    waiting: list[tuple[mx.array, list[int]]] = []
    for step in range(10):
        staging.begin_step()
        for part in range(3):
            values = np.arange(4, dtype=np.int32) + 100 * step + part
            waiting.append((staging.upload([values[:1], values[1:]]), values.tolist()))
        # What the step before uploaded is read only now.
        while len(waiting) > 3:
            array, expected = waiting.pop(0)
            assert array.tolist() == expected


def test_host_memory_is_used_again() -> None:
    staging = Staging()
    staging.begin_step()
    for _ in range(4):
        staging.upload([np.zeros(100_000, np.int32)])
        staging.begin_step()
    active = mx.get_active_memory()
    for _ in range(20):
        mx.eval(staging.upload([np.zeros(100_000, np.int32)]))
        staging.begin_step()
    assert mx.get_active_memory() <= active
