"""Chips are known by their whole names, as MLX gives them."""

from __future__ import annotations

import mlx.core as mx
import pytest

from quire.kernels.choice import chips
from quire.kernels.choice.chips import chip_for, current_chip, current_device

GIB = 2**30


@pytest.mark.parametrize(
    ("name", "bandwidth"),
    [
        ("Apple M1", 68),
        ("Apple M1 Ultra", 800),
        ("Apple M2 Pro", 200),
        ("Apple M3 Pro", 150),
        ("Apple M3 Ultra", 819),
        ("Apple M4", 120),
        ("Apple M4 Max", 546),
        ("Apple M5", 153),
        ("Apple M5 Pro", 307),
        ("NVIDIA H200", 4800),
        ("NVIDIA H100 80GB HBM3", 3350),
        ("NVIDIA H100 PCIe", 2000),
        ("NVIDIA H100 NVL", 3900),
    ],
)
def test_known_chips(name: str, bandwidth: float) -> None:
    chip = chip_for(name)
    assert (chip.name, chip.bandwidth) == (name, bandwidth)
    assert chip.is_known


@pytest.mark.parametrize("generation", range(1, 6))
def test_every_tier_that_was_sold_is_known(generation: int) -> None:
    tiers = ["", " Pro", " Max", *([] if generation == 4 else [" Ultra"])]
    found = [chip_for(f"Apple M{generation}{tier}") for tier in tiers]
    assert all(chip.is_known for chip in found)
    speeds = [chip.bandwidth for chip in found]
    assert speeds == sorted(speeds)


@pytest.mark.parametrize(
    "name",
    [
        "Apple M10",
        "Apple M1 Extreme",
        "Apple M4 Ultra",
        "Apple M",
        "M4 Max",
        "Apple Paravirtual device",
        "NVIDIA H2000",
        "NVIDIA GeForce RTX 5090",
        "Intel(R) Xeon(R) Processor",
        "",
    ],
)
def test_an_unknown_chip_keeps_its_name(name: str) -> None:
    chip = chip_for(name, 36 * GIB)
    assert (chip.name, chip.cores, chip.bandwidth) == (name, (), None)
    assert not chip.is_known


@pytest.mark.parametrize(
    ("name", "memory", "cores", "bandwidth"),
    [
        ("Apple M3 Max", 36, (30,), 300),
        ("Apple M3 Max", 96, (30,), 300),
        ("Apple M3 Max", 128, (40,), 400),
        ("Apple M4 Max", 36, (32,), 410),
        ("Apple M4 Max", 64, (40,), 546),
        ("Apple M5 Max", 36, (32,), 460),
        ("Apple M4 Pro", 24, (16, 20), 273),
    ],
)
def test_memory_tells_the_two_sizes_of_a_max_apart(
    name: str, memory: int, cores: tuple[int, ...], bandwidth: float
) -> None:
    chip = chip_for(name, memory * GIB)
    assert (chip.cores, chip.bandwidth) == (cores, bandwidth)


def test_the_current_chip_is_what_mlx_says(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = mx.device_info(mx.default_device())["device_name"]
    assert current_chip().name == " ".join(str(expected).split())

    info = {"device_name": "Apple M4 Max", "memory_size": 36 * GIB}
    monkeypatch.setattr(chips.mx, "device_info", lambda device: info)
    assert current_chip().bandwidth == 410


def test_the_device_follows_the_default() -> None:
    before = mx.default_device()
    try:
        mx.set_default_device(mx.cpu)
        assert current_device() == "cpu"
    finally:
        mx.set_default_device(before)
    gpu = "metal" if mx.metal.is_available() else "cuda" if mx.cuda.is_available() else "cpu"
    assert current_device() == gpu
