"""The manifest: what ships is right, and what is wrong is refused by name."""

from __future__ import annotations

from itertools import product

import mlx.core as mx
import pytest

from quire.kernels import matmul, paged_decode, quantized_matmul
from quire.kernels.choice.manifest import DTYPES, ManifestError, load_manifest, parse_manifest
from quire.kernels.choice.shapes import SHAPES, DecodeShape, MatmulShape
from quire.kernels.decode_plan import DecodeSettings

VALID = """
[paged_decode]
reference = "reference"

[[paged_decode.variants]]
name = "pages"
kind = "kernel"
devices = ["metal", "cuda"]
dtypes = ["float16", "bfloat16"]
limits.key_dim = [64, 128]
limits.value_dim = { min = 32, max = 256, multiple_of = 8 }
limits.context = { max = 1024 }
limits.softcap = false
settings.simdgroups = { values = [2, 4], default = 4 }
settings.split = { values = [128, 256] }

[[paged_decode.variants]]
name = "reference"
kind = "mlx"
devices = ["metal", "cuda", "cpu"]

[[paged_decode.defaults]]
devices = ["metal", "cuda"]
variant = "pages"
when.rows = { max = 64 }
settings = { split = 256 }
"""


def test_every_operation_ships_with_variants() -> None:
    manifest = load_manifest()
    assert manifest.keys() == SHAPES.keys()
    for operation in manifest.values():
        assert any(variant.kind == "kernel" for variant in operation.variants.values()) or (
            operation.name == "prompt_attention"
        )


def test_a_manifest_is_read() -> None:
    operation = parse_manifest(VALID)["paged_decode"]
    pages = operation.variants["pages"]
    plain = DecodeShape(4, 1000, 8, 2, 128, 96, 16).bucket()
    assert pages.supports(plain, "float16", "metal")
    assert not pages.supports(plain, "float32", "metal")
    assert not pages.supports(plain, "float16", "cpu")
    for change in ({"key_dim": 96}, {"value_dim": 100}, {"context": 1025}, {"softcap": True}):
        assert not pages.supports(plain._replace(**change).bucket(), "float16", "metal"), change
    assert dict(pages.default_settings) == {"simdgroups": 4}
    (default,) = operation.defaults
    assert dict(default.settings) == {"simdgroups": 4, "split": 256}
    assert default.matches(DecodeShape(16, 10, 8, 4, 64, 64, 16).bucket(), "cuda")
    assert not default.matches(DecodeShape(17, 10, 8, 4, 64, 64, 16).bucket(), "cuda")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[paged_decode]", "[paged_decode", "not TOML"),
        ("paged_decode", "paged_encode", "paged_encode: no such operation"),
        ('reference = "reference"', "", "paged_decode: lacks reference"),
        ('reference = "reference"', 'reference = "other"', "paged_decode.reference: no variant"),
        (
            'reference = "reference"',
            'reference = "reference"\nonce = 1',
            "paged_decode.once: must be",
        ),
        ('name = "reference"', 'name = "pages"', "paged_decode.pages: named twice"),
        ('name = "pages"', 'name = "the pages"', r"variants\[0\].name: must be an identifier"),
        ('kind = "kernel"', 'kind = "metal"', "paged_decode.pages.kind: must be one of"),
        ('kind = "mlx"', 'kind = "kernel"', "paged_decode.reference.devices: kernels run on GPUs"),
        ('"cuda", "cpu"', '"cuda", "tpu"', "paged_decode.reference.devices: 'tpu' is none of"),
        ('"cuda", "cpu"', '"cuda"', "paged_decode.reference: the reference must run everywhere"),
        ('"bfloat16"]', '"int8"]', "paged_decode.pages.dtypes: 'int8' is none of"),
        ('dtypes = ["float16", "bfloat16"]', "dtypes = []", "pages.dtypes: must be a list with"),
        ("limits.key_dim", "limits.head_dim", "pages.limits.head_dim: a shape of paged_decode has"),
        ("limits.key_dim", "limits.bucket", "pages.limits.bucket: a shape of paged_decode has no"),
        ("[64, 128]", "[64, -1]", "pages.limits.key_dim: -1 is not a positive"),
        ("[64, 128]", "{}", "pages.limits.key_dim: limits nothing"),
        ("[64, 128]", "64", "pages.limits.key_dim: must be a table"),
        ("multiple_of = 8", "divides = 8", "pages.limits.value_dim: has no divides"),
        ("max = 1024", "max = 1000", "pages.limits.context.max: must be a power of two"),
        ("context = { max = 1024 }", "context = [1024]", "limits.context: is rounded up"),
        ("limits.context", "limits.rows", "pages.limits.rows: .* count heads as rows"),
        ("default = 4", "default = 3", r"pages.settings.simdgroups.default: must be one of \[2, 4"),
        ("values = [128, 256]", 'values = ["128"]', "pages.settings.split.values: '128' is not a"),
        ("split = 256", "split = 512", r"paged_decode.defaults\[0\].settings: pages does not have"),
        ("split = 256", "depth = 1", r"paged_decode.defaults\[0\].settings: pages does not have"),
        ('variant = "pages"', 'variant = "page"', r"defaults\[0\].variant: no variant is named"),
        ("when.rows", "when.row", r"paged_decode.defaults\[0\].when.row: a shape"),
        (
            '["metal", "cuda"]\nvariant',
            '["cpu"]\nvariant',
            r"defaults\[0\].devices: pages does not run on cpu",
        ),
        ("when.rows = { max", "unless.rows = { max", r"paged_decode.defaults\[0\]: has no unless"),
    ],
)
def test_what_is_wrong_is_named(old: str, new: str, message: str) -> None:
    assert old in VALID
    with pytest.raises(ManifestError, match=message):
        parse_manifest(VALID.replace(old, new))


def test_the_launchers_take_what_the_manifest_promises() -> None:
    pages = load_manifest()["paged_decode"].variants["pages"]
    dims = (16, 32, 40, 64, 72, 80, 96, 112, 128, 192, 256, 320)
    for key_dim, value_dim, block_size, dtype in product(dims, dims, (4, 8, 16, 32, 64), DTYPES):
        shape = DecodeShape(1, 64, 8, 2, key_dim, value_dim, block_size)
        if pages.supports(shape.bucket(), dtype, "metal"):
            assert paged_decode.supports(
                (2, 2), (key_dim, value_dim), getattr(mx, dtype), block_size
            ), (shape, dtype)
    assert pages.settings.keys() <= set(DecodeSettings._fields)

    shared = load_manifest()["shared_context"].variants
    assert shared["together"].limits == shared["each"].limits == pages.limits

    dense = load_manifest()["matmul"].variants
    assert dense.keys() == set(matmul.VARIANTS)
    assert dense["skinny"].settings.keys() == set(matmul.SkinnySettings._fields)

    matmuls = load_manifest()["quantized_matmul"].variants
    assert matmuls.keys() == quantized_matmul.VARIANTS.keys()
    for name, settings in (
        ("rows", quantized_matmul.RowsSettings),
        ("matrix", quantized_matmul.MatrixSettings),
    ):
        assert matmuls[name].settings.keys() == set(settings._fields)
        for bits, group_size, dtype in product((2, 3, 4, 6, 8), (16, 32, 64, 128), DTYPES):
            shape = MatmulShape(8, 4096, 4096, bits, group_size)
            if matmuls[name].supports(shape.bucket(), dtype, "cuda"):
                both = (getattr(mx, dtype),) * 2
                assert quantized_matmul.supports(4096, 4096, bits, group_size, both)
