from __future__ import annotations

import mlx.core as mx
import pytest
from metal_sim import simulated_kernels

from quire.kernels.download import Download
from quire.kernels.upload import Staging


@pytest.mark.parametrize("on_cuda", [False, True])
def test_results_of_a_step_can_be_read_until_two_more_have_begun(
    on_cuda: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mx.cuda, "is_available", lambda: on_cuda)
    staging = Staging()
    waiting: list[tuple[Download, list[int]]] = []
    with simulated_kernels():
        for step in range(6):
            staging.begin_step()
            values = [7 * step + i for i in range((5, 300, 1)[step % 3])]
            waiting.append((Download(mx.array(values, mx.int32), staging), values))
            if len(waiting) > 1:
                download, expected = waiting.pop(0)
                assert download.read() == expected
