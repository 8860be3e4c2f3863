"""The attention kernels' exact Metal text, run by the simulator, against float64."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import mlx.core as mx
import pytest
from decode_case import BF16, F16, F32, DecodeCase
from latent_case import LatentCase
from metal_sim import compiled_ahead, simulated_kernels
from write_case import WriteCase

# Every pair of two columns' values occurs, but for the pairs of head sizes and groups. Columns:
# dtype, head sizes, group, block size, simdgroups, keys per load, direct, sinks, soft-cap.
DECODES = [
    DecodeCase(*values)
    for values in [
        (F32, (64, 64), 1, 8, 4, 4, True, True, 2.0),
        (BF16, (64, 64), 1, 32, 8, 8, True, False, None),
        (F16, (64, 64), 4, 32, 8, 8, False, False, 2.0),
        (F32, (64, 64), 16, 16, 2, 2, True, True, 2.0),
        (F16, (80, 80), 1, 16, 2, 8, False, False, None),
        (BF16, (80, 80), 2, 32, 8, 4, True, True, 2.0),
        (F32, (80, 80), 16, 8, 4, 2, False, False, None),
        (F16, (96, 96), 2, 16, 8, 2, False, False, None),
        (BF16, (96, 96), 4, 32, 4, 4, True, True, None),
        (F16, (96, 96), 4, 8, 2, 8, False, False, 2.0),
        (F32, (96, 96), 8, 8, 4, 2, True, True, 2.0),
        (BF16, (112, 112), 1, 16, 8, 2, True, True, None),
        (BF16, (112, 112), 2, 8, 4, 8, False, True, 2.0),
        (F32, (112, 112), 2, 32, 2, 2, True, False, None),
        (F16, (112, 112), 2, 16, 4, 4, True, True, None),
        (F16, (128, 128), 3, 8, 4, 2, False, True, None),
        (BF16, (128, 128), 3, 32, 2, 4, True, False, 2.0),
        (F32, (128, 128), 3, 16, 8, 8, False, True, None),
        (F32, (192, 128), 8, 16, 4, 4, False, False, None),
        (BF16, (192, 128), 8, 8, 2, 8, True, True, 2.0),
        (F16, (192, 128), 8, 32, 8, 2, True, True, None),
        (F32, (192, 192), 7, 32, 8, 2, False, False, 2.0),
        (F16, (192, 192), 7, 16, 4, 4, False, True, None),
        (BF16, (192, 192), 7, 8, 2, 8, True, True, 2.0),
        (F32, (256, 256), 4, 16, 2, 2, False, True, 2.0),
        (F16, (256, 256), 16, 8, 8, 4, True, False, None),
        (BF16, (256, 256), 16, 32, 4, 8, True, False, None),
        (F32, (512, 512), 3, 8, 4, 8, True, True, None),
        (F16, (512, 512), 8, 16, 2, 2, False, False, 2.0),
        (BF16, (512, 512), 5, 32, 8, 4, False, True, None),
    ]
]


@pytest.mark.parametrize("case", DECODES, ids=str)
def test_decode(case: DecodeCase) -> None:
    with simulated_kernels():
        case.check()
        # The text is the same with a window, which here begins within a block, and cuts the
        # contexts into items that begin anywhere.
        windowed = replace(case, window=21, split=13, lengths=(0, 5, 21, 22, 50), seed=1)
        windowed.check()


WIDE = [case for case in DECODES if case.dims == (512, 512)]


@pytest.mark.parametrize("case", WIDE, ids=str)
def test_decode_with_as_few_heads_as_on_metal(case: DecodeCase) -> None:
    with mock.patch.object(mx.metal, "is_available", return_value=True), simulated_kernels():
        replace(case, lengths=(0, 5, 50)).check()


LATENT = [
    LatentCase(dtype, settings=settings)
    for dtype in (F32, F16, BF16)
    for settings in ({}, {"split": 32, "simdgroups": 2, "unroll_keys": 2})
]


@pytest.mark.parametrize("case", LATENT, ids=str)
def test_latent_attention(case: LatentCase) -> None:
    with simulated_kernels():
        case.check()
    with mock.patch.object(mx.metal, "is_available", return_value=True), simulated_kernels():
        case.check()


@pytest.mark.parametrize("window", [1, 7, 8, 9, 64])
def test_windows_at_the_edges_of_blocks(window: int) -> None:
    case = replace(DECODES[15], window=window, lengths=(7, 8, 9, 33, 64), split=32)
    with simulated_kernels():
        case.check()


def test_a_row_of_many_items() -> None:
    """More than the merge has lanes or simdgroups."""
    case = replace(DECODES[15], lengths=(75, 3), split=2, kv_heads=1)
    with simulated_kernels():
        case.check()


def test_large_scores() -> None:
    case = replace(DECODES[17], lengths=(40, 3), split=16, magnitude=100.0)
    with simulated_kernels():
        case.check()


WRITES = [
    WriteCase(F32, 8, (2, 64), (2, 64), 3),
    WriteCase(F16, 16, (1, 80), (1, 80), 33),
    WriteCase(BF16, 32, (3, 192), (3, 128), 9),
    WriteCase(BF16, 8, (1, 64), (4, 32), 20),
    WriteCase(BF16, 16, (2, 512), (2, 512), 5),
]


@pytest.mark.parametrize("case", WRITES, ids=str)
def test_write_and_gather(case: WriteCase) -> None:
    with simulated_kernels():
        case.check()


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    with compiled_ahead():
        for decode in (*DECODES, *LATENT):
            decode.run()
        with mock.patch.object(mx.metal, "is_available", return_value=True):
            for decode in (*WIDE, *LATENT):
                decode.run()
        for write in WRITES:
            write.run()
