"""What is chosen, and why: measured before default, and never what was dropped."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from quire.kernels.choice import selection
from quire.kernels.choice.manifest import load_manifest, parse_manifest
from quire.kernels.choice.record import Key, Record, Timing, Verdict
from quire.kernels.choice.selection import Selector, UnsupportedShape, Why
from quire.kernels.choice.shapes import (
    DecodeShape,
    DenseShape,
    MatmulShape,
    PromptShape,
    SampleShape,
    SharedShape,
    WriteShape,
    timing_bucket,
)

MANIFEST = parse_manifest("""
[paged_decode]
reference = "reference"

[[paged_decode.variants]]
name = "pages"
kind = "kernel"
devices = ["metal", "cuda"]
limits.key_dim = [64, 128]
limits.softcap = false
settings.simdgroups = { values = [2, 4, 8], default = 4 }
settings.split = { values = [128, 256] }

[[paged_decode.variants]]
name = "gather"
kind = "mlx"
devices = ["metal"]
limits.softcap = false

[[paged_decode.variants]]
name = "reference"
kind = "mlx"
devices = ["metal", "cuda", "cpu"]
limits.softcap = false

[[paged_decode.defaults]]
devices = ["metal", "cuda"]
variant = "pages"
when.rows = { max = 16 }
settings = { simdgroups = 8, split = 128 }

[[paged_decode.defaults]]
devices = ["metal", "cuda"]
variant = "pages"
""")
KEY = Key("Apple M4 Max", "metal", "0.32.4", "0123")
SHAPE = DecodeShape(
    rows=2, context=1000, heads=32, kv_heads=8, key_dim=128, value_dim=128, block_size=16
)


def record(
    *dropped: tuple[str, str], tuned: tuple[DecodeShape, str, dict[str, int]] | None = None
) -> Record:
    verdicts = [Verdict("paged_decode", name, dtype, 0.5, "off") for name, dtype in dropped]
    timings = []
    if tuned is not None:
        shape, variant, settings = tuned
        bucket = timing_bucket(shape)
        timings = [Timing("paged_decode", bucket, "float16", variant, settings, 1.0, 2.0)]
    return Record(KEY, tuple(verdicts), tuple(timings))


def selector(found: Record | None = None) -> Selector:
    return Selector("metal", MANIFEST, found)


def test_the_first_default_that_holds() -> None:
    choice = selector().select("paged_decode", SHAPE, mx.float16)
    assert (choice.variant, choice.why) == ("pages", Why.DEFAULT)
    assert dict(choice.settings) == {"simdgroups": 8, "split": 128}
    # 4 rows x 8 key heads are beyond the first default's 16; the split is the launcher's business.
    choice = selector().select("paged_decode", SHAPE._replace(rows=4), mx.float16)
    assert dict(choice.settings) == {"simdgroups": 4}


def test_shapes_of_a_bucket_share_one_choice() -> None:
    chosen = selector()
    first = chosen.select("paged_decode", SHAPE, mx.float16)
    for same in (
        SHAPE._replace(context=513),
        SHAPE._replace(context=1024),
        SHAPE._replace(rows=4, heads=16, kv_heads=4),
    ):
        assert chosen.select("paged_decode", same, mx.float16) is first
    for other in (
        SHAPE._replace(context=1025),
        SHAPE._replace(heads=64),
        SHAPE._replace(window=True),
    ):
        assert chosen.select("paged_decode", other, mx.float16) is not first


@pytest.mark.parametrize(
    "shape",
    [
        SHAPE,
        SharedShape(9, 700, 33, 14, 2, 64, 64, 16),
        PromptShape(300, 700, 14, 2, 64, 64, 16, from_start=False),
        WriteShape(5, 2, 64, 64, 16),
        DenseShape(3, 24576, 4096),
        MatmulShape(3, 151936, 4096, 4, 64),
        SampleShape(33, 151936),
    ],
)
def test_a_bucket_is_its_own_bucket(shape: DecodeShape) -> None:
    bucket = shape.bucket()
    assert bucket.bucket() == bucket
    assert timing_bucket(bucket) == timing_bucket(timing_bucket(bucket))


def test_what_rows_share_is_read_together_where_that_pays() -> None:
    shape = SharedShape(64, 1024, 100, 32, 8, 128, 128, 16)
    cuda = Selector("cuda", load_manifest(), None)
    assert cuda.select("shared_context", shape, mx.bfloat16).variant == "together"
    for other in (shape._replace(rows=8), shape._replace(context=128)):
        assert cuda.select("shared_context", other, mx.bfloat16).variant == "each"
    # No gap: another kernel takes what the first cannot.
    choice = cuda.select("shared_context", shape, mx.float32)
    assert (choice.variant, choice.why) == ("each", Why.DEFAULT)
    metal = Selector("metal", load_manifest(), None)
    assert metal.select("shared_context", shape, mx.bfloat16).variant == "each"


def test_operations_with_equal_numbers_are_kept_apart() -> None:
    chosen = Selector("cpu", load_manifest(), None)
    numbers = (1, 4, 64, 64, 16)
    write = chosen.select("kv_write", WriteShape(*numbers), mx.float32)
    product = chosen.select("quantized_matmul", MatmulShape(*numbers), mx.float32)
    assert (write.variant, product.variant) == ("scatter", "mlx")


def test_what_was_measured_comes_first() -> None:
    tuned = record(tuned=(SHAPE, "gather", {}))
    choice = selector(tuned).select("paged_decode", SHAPE, mx.float16)
    assert (choice.variant, dict(choice.settings), choice.why) == ("gather", {}, Why.TUNED)
    # Sinks hardly change the time, so what was measured without them holds.
    with_sinks = SHAPE._replace(sinks=True)
    assert selector(tuned).select("paged_decode", with_sinks, mx.float16).why is Why.TUNED
    # Other sizes and types were not measured.
    assert selector(tuned).select("paged_decode", SHAPE, mx.float32).why is Why.DEFAULT
    longer = SHAPE._replace(context=5000)
    assert selector(tuned).select("paged_decode", longer, mx.float16).why is Why.DEFAULT


def test_a_measured_variant_must_support_the_shape_itself() -> None:
    tuned = record(tuned=(SHAPE, "pages", {"simdgroups": 2, "split": 256}))
    assert selector(tuned).select("paged_decode", SHAPE, mx.float16).settings["split"] == 256
    with pytest.raises(UnsupportedShape):
        selector(tuned).select("paged_decode", SHAPE._replace(softcap=True), mx.float16)


def test_what_was_dropped_is_never_chosen() -> None:
    chosen = selector(record(("pages", "float16"), tuned=(SHAPE, "pages", {"simdgroups": 2})))
    choice = chosen.select("paged_decode", SHAPE, mx.float16)
    assert (choice.variant, choice.why) == ("gather", Why.GAP)
    # It was dropped for one type only.
    assert chosen.select("paged_decode", SHAPE, mx.float32).variant == "pages"


def test_the_reference_is_never_dropped() -> None:
    everything = [(name, "float16") for name in ("pages", "gather", "reference")]
    choice = selector(record(*everything)).select("paged_decode", SHAPE, mx.float16)
    assert choice.variant == "reference"


def test_the_only_one() -> None:
    choice = Selector("cpu", MANIFEST, None).select("paged_decode", SHAPE, mx.float32)
    assert (choice.variant, choice.why) == ("reference", Why.ONLY)


def test_gaps_are_listed_once() -> None:
    chosen = selector()
    odd = SHAPE._replace(key_dim=100)
    assert chosen.select("paged_decode", odd, mx.float16).why is Why.GAP
    chosen.select("paged_decode", odd._replace(context=999), mx.float16)
    chosen.select("paged_decode", SHAPE, mx.float16)
    with pytest.raises(UnsupportedShape, match=r"nothing supports rows 16, .*softcap"):
        chosen.select("paged_decode", SHAPE._replace(softcap=True), mx.float16)
    gaps = [(gap.operation, gap.shape, gap.variant) for gap in chosen.gaps()]
    assert gaps == [
        ("paged_decode", odd.bucket(), "gather"),
        ("paged_decode", SHAPE._replace(softcap=True).bucket(), None),
    ]


def test_a_type_nobody_computes_is_an_error() -> None:
    with pytest.raises(UnsupportedShape, match="in int32"):
        selector().select("paged_decode", SHAPE, mx.int32)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(selection, "_selectors", {})


@pytest.mark.usefixtures("fresh")
def test_a_new_record_takes_effect_for_the_process() -> None:
    assert selection.select("paged_decode", SHAPE, mx.float16, "cuda").variant == "pages"
    assert selection.gaps() == []
    selection.use_record("cuda", record(("pages", "float16")))
    assert selection.select("paged_decode", SHAPE, mx.float16, "cuda").variant == "reference"
    (gap,) = selection.gaps()
    assert (gap.operation, gap.device, gap.dtype) == ("paged_decode", "cuda", "float16")
