"""What is chosen, and why: measured before default, and never what was dropped."""

from __future__ import annotations

from enum import Enum
from pathlib import Path

import mlx.core as mx
import pytest

from quire.kernels.choice import selection
from quire.kernels.choice.record import Key, Record, Timing, Verdict
from quire.kernels.choice.selection import Selector, UnsupportedShape, Why, selecting
from quire.kernels.choice.spec import ANYWHERE, GPUS, Default, Group, Kind, Limit, Spec
from quire.kernels.choice.spec import Variant as V
from quire.kernels.kv_write_spec import KV_WRITE, WriteShape, WriteVariant
from quire.kernels.matmul_spec import DenseShape
from quire.kernels.paged_decode_spec import PAGED_DECODE, DecodeProblem, DecodeShape, DecodeVariant
from quire.kernels.prompt_attention_spec import PROMPT_ATTENTION, PromptShape
from quire.kernels.prompt_plan import PromptVariant
from quire.kernels.quantized_matmul_spec import QUANTIZED_MATMUL, MatmulShape
from quire.kernels.rotate_and_decode_spec import (
    ROTATE_AND_DECODE,
    RotatingDecodeShape,
    RotatingDecodeVariant,
)
from quire.kernels.sampling_spec import SAMPLE, SampleShape, SampleVariant
from quire.kernels.shared_context_spec import SHARED_CONTEXT, SharedShape, SharedVariant


class Way(Enum):
    PAGES = "pages"
    GATHER = "gather"
    REFERENCE = "reference"


def run(problem: DecodeProblem, settings: object) -> list[mx.array]:
    raise NotImplementedError


NO_SOFTCAP = {"softcap": Limit(values=(False,))}
# Like that of decodes, with one variant more and other limits.
SPEC = Spec(
    name="paged_decode",
    shape=DecodeShape,
    variants={
        Way.PAGES: V(
            run,
            limits={"key_dim": Limit(values=(64, 128)), **NO_SOFTCAP},
            settings={"simdgroups": (2, 4, 8), "split": (128, 256)},
        ),
        Way.GATHER: V(run, Kind.STEPS, ("metal",), limits=NO_SOFTCAP),
        Way.REFERENCE: V(run, Kind.STEPS, ANYWHERE, limits=NO_SOFTCAP),
    },
    reference=Way.REFERENCE,
    problem=PAGED_DECODE.problem,
    checked=(),
    surveyed={},
    defaults=(
        Default(Way.GATHER, GPUS, {"rows": Limit(max=16)}),
        Default(Way.PAGES, GPUS),
    ),
    untimed=("sinks", "softcap"),
)
KEY = Key("Apple M4 Max", "metal", "0.32.4", "0123")
SHAPE = DecodeShape(
    rows=4, context=1000, heads=32, kv_heads=8, key_dim=128, value_dim=128, block_size=16
)


def record(
    *dropped: tuple[str, str], tuned: tuple[DecodeShape, str, dict[str, int]] | None = None
) -> Record:
    verdicts = [Verdict("paged_decode", name, dtype, 0.5, "off") for name, dtype in dropped]
    timings = []
    if tuned is not None:
        shape, variant, settings = tuned
        bucket = tuple(SPEC.timing_bucket(shape))
        timings = [Timing("paged_decode", bucket, "float16", variant, settings, 1.0, 2.0)]
    return Record(KEY, tuple(verdicts), tuple(timings))


def selector(found: Record | None = None) -> Selector:
    return Selector("metal", found, [SPEC])


def test_the_first_default_that_holds() -> None:
    choice = selector().select(SPEC, SHAPE, mx.float16)
    assert (choice.variant, choice.why) == (Way.PAGES, Why.DEFAULT)
    # Settings are the launcher's business.
    assert not choice.settings
    # 2 rows x 8 key heads are within the first default's 16.
    assert selector().select(SPEC, SHAPE._replace(rows=2), mx.float16).variant is Way.GATHER


def test_shapes_of_a_bucket_share_one_choice() -> None:
    chosen = selector()
    first = chosen.select(SPEC, SHAPE, mx.float16)
    for same in (
        SHAPE._replace(context=513),
        SHAPE._replace(context=1024),
        SHAPE._replace(rows=8, heads=16, kv_heads=4),
    ):
        assert chosen.select(SPEC, same, mx.float16) is first
    for other in (
        SHAPE._replace(context=1025),
        SHAPE._replace(heads=64),
        SHAPE._replace(window=True),
    ):
        assert chosen.select(SPEC, other, mx.float16) is not first


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
    assert shape.bucket().bucket() == shape.bucket()


def test_what_rows_share_is_read_together_where_that_pays() -> None:
    shape = SharedShape(64, 1024, 100, 32, 8, 128, 128, 16)
    cuda = Selector("cuda", None)
    assert cuda.select(SHARED_CONTEXT, shape, mx.bfloat16).variant is SharedVariant.CASCADE
    for other in (shape._replace(rows=8), shape._replace(context=128)):
        choice = cuda.select(SHARED_CONTEXT, other, mx.bfloat16)
        assert choice.variant is SharedVariant.PER_ROW
    # No gap: another kernel takes what the first cannot.
    choice = cuda.select(SHARED_CONTEXT, shape, mx.float32)
    assert (choice.variant, choice.why) == (SharedVariant.PER_ROW, Why.DEFAULT)
    metal = Selector("metal", None)
    assert metal.select(SHARED_CONTEXT, shape, mx.bfloat16).variant is SharedVariant.PER_ROW


def test_operations_with_equal_numbers_are_kept_apart() -> None:
    chosen = Selector("cpu", None)
    numbers = (1, 4, 64, 64, 16)
    write = chosen.select(KV_WRITE, WriteShape(*numbers), mx.float32)
    product = chosen.select(QUANTIZED_MATMUL, MatmulShape(*numbers), mx.float32)
    assert (write.variant.value, product.variant.value) == ("scatter", "mlx")


def test_what_was_measured_comes_first() -> None:
    tuned = record(tuned=(SHAPE, "gather", {}))
    choice = selector(tuned).select(SPEC, SHAPE, mx.float16)
    assert (choice.variant, dict(choice.settings), choice.why) == (Way.GATHER, {}, Why.TUNED)
    # Sinks hardly change the time, so what was measured without them holds.
    with_sinks = SHAPE._replace(sinks=True)
    assert selector(tuned).select(SPEC, with_sinks, mx.float16).why is Why.TUNED
    # Other sizes and types were not measured.
    assert selector(tuned).select(SPEC, SHAPE, mx.float32).why is Why.DEFAULT
    longer = SHAPE._replace(context=5000)
    assert selector(tuned).select(SPEC, longer, mx.float16).why is Why.DEFAULT


def test_a_measured_variant_must_support_the_shape_itself() -> None:
    tuned = record(tuned=(SHAPE, "pages", {"simdgroups": 2, "split": 256}))
    assert selector(tuned).select(SPEC, SHAPE, mx.float16).settings["split"] == 256
    with pytest.raises(UnsupportedShape):
        selector(tuned).select(SPEC, SHAPE._replace(softcap=True), mx.float16)


def test_what_was_dropped_is_never_chosen() -> None:
    chosen = selector(record(("pages", "float16"), tuned=(SHAPE, "pages", {"simdgroups": 2})))
    choice = chosen.select(SPEC, SHAPE, mx.float16)
    assert (choice.variant, choice.why) == (Way.REFERENCE, Why.GAP)
    # It was dropped for one type only.
    assert chosen.select(SPEC, SHAPE, mx.float32).variant is Way.PAGES


def test_the_reference_is_never_dropped() -> None:
    everything = [(name, "float16") for name in ("pages", "gather", "reference")]
    choice = selector(record(*everything)).select(SPEC, SHAPE, mx.float16)
    assert choice.variant is Way.REFERENCE


def test_the_only_one() -> None:
    choice = Selector("cpu", None).select(SPEC, SHAPE, mx.float32)
    assert (choice.variant, choice.why) == (Way.REFERENCE, Why.ONLY)


def test_kernels_of_a_group_go_together() -> None:
    """What is chosen is what a model runs: without one of them it does without all."""
    dropped = Record(KEY, (Verdict("kv_write", "in_place", "float16", 0.5, "off"),))
    chosen = Selector("metal", dropped)
    assert [group for group in Group if chosen.runs(group, "float16")] == [Group.STATES]
    assert all(chosen.runs(group, "float32") for group in Group)
    decode = chosen.select(PAGED_DECODE, SHAPE, mx.float16)
    assert (decode.variant, decode.why) == (DecodeVariant.REFERENCE, Why.GAP)
    prompt = PromptShape(64, 64, 8, 2, 64, 64, 16)
    choice = chosen.select(PROMPT_ATTENTION, prompt, mx.float16)
    assert choice.variant is PromptVariant.SDPA_TILED
    rotating = RotatingDecodeShape(2, 40, 4, 4, 64, 64, 16)
    step = chosen.select(ROTATE_AND_DECODE, rotating, mx.float16)
    assert step.variant is RotatingDecodeVariant.SEPARATE
    # Sampling needs no pages.
    sampled = chosen.select(SAMPLE, SampleShape(4, 300), mx.float16)
    assert sampled.variant is SampleVariant.KERNEL
    other = chosen.select(PAGED_DECODE, SHAPE, mx.float32)
    assert other.variant is DecodeVariant.PAGED_KERNEL
    # Blocks can be dropped by themselves, and what is only a step of theirs alone.
    swiglu = Selector("metal", Record(KEY, (Verdict("swiglu", "fused", "float16", None, "no"),)))
    assert all(swiglu.runs(group, "float16") for group in Group)
    wrong = Verdict("rotate_and_write", "fused", "float16", None, "no")
    fused = Selector("metal", Record(KEY, (wrong,)))
    assert [fused.runs(group, "float16") for group in (Group.PAGES, Group.BLOCKS)] == [True, False]
    assert fused.select(ROTATE_AND_DECODE, rotating, mx.float16).why is Why.GAP
    assert fused.select(PAGED_DECODE, SHAPE, mx.float16).why is Why.DEFAULT


def test_a_gap_passes_over_a_kernel() -> None:
    chosen = selector()
    odd = SHAPE._replace(rows=2, key_dim=100)
    assert chosen.select(SPEC, odd, mx.float16).why is Why.DEFAULT
    odd = odd._replace(rows=4)
    assert chosen.select(SPEC, odd, mx.float16).why is Why.GAP
    with pytest.raises(UnsupportedShape, match=r"nothing supports rows 32, .*softcap"):
        chosen.select(SPEC, SHAPE._replace(softcap=True), mx.float16)


def test_a_type_nobody_computes_is_an_error() -> None:
    with pytest.raises(UnsupportedShape, match="in int32"):
        selector().select(SPEC, SHAPE, mx.int32)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(selection, "_selectors", {})


@pytest.mark.usefixtures("fresh")
def test_a_new_record_takes_effect_for_the_process() -> None:
    def chosen() -> WriteVariant:
        shape = WriteShape(5, 2, 64, 64, 16)
        return selection.selector_for("cuda").select(KV_WRITE, shape, mx.float16).variant

    assert chosen() is WriteVariant.IN_PLACE
    dropped = Verdict("kv_write", "in_place", "float16", 0.5, "off")
    selection.use_record("cuda", Record(KEY, (dropped,)))
    assert chosen() is WriteVariant.SCATTER


@pytest.mark.usefixtures("fresh")
def test_one_selector_can_stand_in_for_all() -> None:
    shape = WriteShape(5, 2, 64, 64, 16)
    assert selection.select(KV_WRITE, shape, mx.float16).variant is WriteVariant.SCATTER
    with selecting(Selector("cuda", None)) as outer:
        assert selection.select(KV_WRITE, shape, mx.float16).variant is WriteVariant.IN_PLACE
        with selecting(Selector("cpu", None)):
            assert selection.select(KV_WRITE, shape, mx.float16).variant is WriteVariant.SCATTER
        assert selection.selector_for("metal") is outer
    assert selection.select(KV_WRITE, shape, mx.float16).variant is WriteVariant.SCATTER
