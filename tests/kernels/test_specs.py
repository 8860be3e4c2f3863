"""What ships as specifications holds together, and launchers take what these promise."""

from __future__ import annotations

from itertools import product
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.kernels import matmul, quantized_matmul
from quire.kernels.choice.spec import ANYWHERE, DTYPES, AnySpec, Kind, Limit
from quire.kernels.decode_plan import DecodeSettings
from quire.kernels.matmul_spec import MATMUL, MatmulVariant
from quire.kernels.paged_decode import fits_lanes
from quire.kernels.paged_decode_spec import PAGED_DECODE, DecodeShape, DecodeVariant
from quire.kernels.quantized_matmul_spec import QUANTIZED_MATMUL, QuantizedVariant
from quire.kernels.specs import SPECS, find_spec

# Rounded up in a bucket, so that a limit on them is known only up to a power of two.
ROUNDED = {"rows", "context", "own", "sequences", "blocks", "outputs", "inputs", "vocab"}
# Rows of a bucket of these do not count rows alone.
HEADS_IN_ROWS = {"paged_decode", "shared_context"}

every_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)


def test_names() -> None:
    assert len({spec.name for spec in SPECS}) == len(SPECS)
    for spec in SPECS:
        assert find_spec(spec.name) is spec
        for variant in spec.variants:
            assert spec.variant(variant.value) is variant
    with pytest.raises(ValueError, match="no operation paged_encode"):
        find_spec("paged_encode")
    with pytest.raises(ValueError, match=r"no kv_write\.nowhere"):
        find_spec("kv_write").variant("nowhere")


@every_spec
def test_a_specification_holds_together(spec: AnySpec) -> None:
    reference = spec.variants[spec.reference]
    assert set(reference.devices) == set(ANYWHERE)
    assert set(reference.dtypes) == set(DTYPES)
    assert any(variant.kind is Kind.KERNEL for variant in spec.variants.values())
    assert set(spec.variants) == set(type(spec.reference)), "a member without an entry"
    fields = {*spec.shape._fields, "group"}
    for variant in spec.variants.values():
        assert "cpu" not in variant.devices or variant.kind is Kind.STEPS
        assert set(variant.dtypes) <= set(DTYPES)
        assert all(variant.settings.values())
        for name, limit in variant.limits.items():
            assert name in fields
            if name in ROUNDED:
                assert limit == Limit(max=limit.max)
                assert name != "rows" or spec.name not in HEADS_IN_ROWS
                assert is_power_of_two(limit.max)
    for default in spec.defaults:
        assert set(default.devices) <= set(spec.variants[default.variant].devices)
        for name, limit in default.when.items():
            assert name in fields
            assert name not in ROUNDED or limit.max is None or is_power_of_two(limit.max)
    for shape in (*spec.checked, *spec.surveyed.values()):
        assert type(shape) is spec.shape
    assert set(spec.untimed) <= fields


def is_power_of_two(size: int | None) -> bool:
    return size is not None and size & (size - 1) == 0


@every_spec
def test_every_kernel_is_checked_in_every_type(spec: AnySpec) -> None:
    for name, variant in spec.variants.items():
        for device, dtype in product(variant.devices, variant.dtypes):
            assert any(variant.supports(s.bucket(), dtype, device) for s in spec.checked), (
                name,
                device,
                dtype,
            )


@every_spec
@settings(deadline=None)
@given(data=st.data())
def test_a_bucket_is_supported_only_if_all_of_its_shapes_are(spec: AnySpec, data: Any) -> None:
    shape = data.draw(st.sampled_from([*spec.checked, *spec.surveyed.values()]))
    sizes = {name: st.integers(1, 5000) for name in ROUNDED & set(shape._fields)}
    if getattr(shape, "from_start", False) or "from_start" in shape._fields:
        sizes.pop("context")  # not less than rows
    shape = shape._replace(**{name: data.draw(size) for name, size in sizes.items()})
    bucket = shape.bucket()
    assert bucket.bucket() == bucket
    assert spec.timing_bucket(bucket) == spec.timing_bucket(spec.timing_bucket(bucket))
    for variant, dtype in product(spec.variants.values(), DTYPES):
        for device in variant.devices:
            if variant.supports(bucket, dtype, device):
                assert variant.supports(shape, dtype, device)


def test_limits() -> None:
    assert Limit(values=(4, 8)).allows(8)
    assert not Limit(values=(4, 8)).allows(5)
    between = Limit(min=32, max=256, multiple_of=8)
    assert [between.allows(n) for n in (24, 32, 36, 256, 264)] == [False, True, False, True, False]
    assert str(between) == "from 32 to 256 in steps of 8"
    assert str(Limit(values=(4, 8))) == "4 or 8"
    assert str(Limit(values=(False,))) == "no"


def test_the_decode_kernel_takes_what_its_specification_promises() -> None:
    kernel = PAGED_DECODE.variants[DecodeVariant.PAGED_KERNEL]
    dims = (16, 32, 40, 64, 72, 80, 96, 112, 128, 192, 256, 320, 512, 576)
    taken = 0
    for key_dim, value_dim, block_size, dtype in product(dims, dims, (4, 8, 16, 32, 64), DTYPES):
        shape = DecodeShape(1, 64, 8, 2, key_dim, value_dim, block_size)
        if kernel.supports(shape.bucket(), dtype, "metal"):
            taken += 1
            # Packs of 16 bytes, in at most 32 lanes, and no load of keys from two blocks.
            kind: mx.Dtype = getattr(mx, dtype)
            assert key_dim * kind.size % 16 == value_dim * kind.size % 16 == 0
            assert max(key_dim, value_dim) <= 512
            assert fits_lanes((key_dim, value_dim), kind, block_size)
    assert taken > 800
    assert kernel.settings.keys() <= set(DecodeSettings._fields)


def test_settings_are_those_of_the_launchers() -> None:
    skinny = MATMUL.variants[MatmulVariant.SKINNY]
    assert skinny.settings.keys() == set(matmul.SkinnySettings._fields)
    for name, fields in (
        (QuantizedVariant.ROWS, quantized_matmul.RowsSettings),
        (QuantizedVariant.MATRIX, quantized_matmul.MatrixSettings),
    ):
        variant = QUANTIZED_MATMUL.variants[name]
        assert variant.settings.keys() == set(fields._fields)
        assert variant.has_settings({})
        smallest = {key: values[0] for key, values in variant.settings.items()}
        assert variant.has_settings(smallest)
        assert not variant.has_settings({**smallest, "depth": 99})
        assert not variant.has_settings({**smallest, "lanes": 1})
        assert not variant.has_settings({"depth": smallest["depth"]})
