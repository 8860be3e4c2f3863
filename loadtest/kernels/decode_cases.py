"""Decode attention: one query per sequence over its pages."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from quire.kernels.choice.selection import select
from quire.kernels.choice.shapes import DecodeShape
from quire.kernels.decode_plan import DecodeSettings, default_settings, plan_on_device
from quire.kernels.paged_attention import paged_attention
from quire.kernels.paged_decode import paged_decode
from quire.kernels.ragged import DecodeGroup, RaggedBatch
from quire.loadtest.kernels.case import Case, Profile
from quire.loadtest.kernels.paged_inputs import BLOCK_SIZE, Heads, PagedContexts, contiguous

# Bound before anything wraps the attribute of the module.
_sdpa = mx.fast.scaled_dot_product_attention

_EVEN = {
    "gpu": ((64, 4096), (64, 1024), (16, 4096), (8, 1024), (1, 32768), (1, 4096)),
    "cpu": ((8, 1024), (8, 256), (2, 1024), (1, 4096)),
}


def decode_cases(profile: Profile) -> Iterator[Case]:
    """Equal contexts at several batch sizes, then uneven ones in one batch."""
    sizes = _EVEN["gpu" if profile.gpu else "cpu"]
    for batch, context in sizes[-1:] if profile.quick else sizes:
        labels: dict[str, int | str] = {"batch": batch, "context": context}
        yield _case(profile, f"{batch} x {context}", labels, [context] * batch)
    if profile.quick:
        return
    batch, typical, longest = (64, 1024, 32768) if profile.gpu else (8, 256, 2048)
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(np.log(typical), 0.7, batch)).astype(int).clip(16, 8 * typical)
    labels = {"batch": batch, "context": "lognormal", "longest": int(lengths.max())}
    yield _case(profile, f"{batch} x lognormal({typical})", labels, lengths.tolist())
    labels = {"batch": batch, "context": typical, "longest": longest}
    uneven = [typical] * (batch - 1) + [longest]
    yield _case(profile, f"{batch - 1} x {typical} + {longest}", labels, uneven)


class _Inputs:
    """One step's queries, with their contexts in pages and contiguous."""

    def __init__(
        self,
        heads: Heads,
        dtype: mx.Dtype,
        lengths: list[int],
        settings: list[DecodeSettings],
        seed: int,
    ) -> None:
        self.pages = PagedContexts(lengths, heads, dtype, seed)
        shape = (len(lengths), heads.queries, 1, heads.dim)
        self.queries = mx.random.normal(shape, dtype, key=mx.random.key(seed + 1000))
        self.tables = mx.array(self.pages.padded_tables)
        self.mask: mx.array | None = None
        padded = self.tables.shape[1] * BLOCK_SIZE
        if min(lengths) < padded:
            positions = np.arange(padded)
            visible = positions < self.pages.lengths[:, None]
            self.mask = mx.array(visible[:, None, None])
        self.keys, self.values = contiguous(self.pages.gather(self.tables))
        mx.eval(self.queries, self.tables, self.pages.written)
        group = DecodeGroup(0, self.pages.lengths, self.pages.padded_tables)
        self.batch = RaggedBatch([group], [])
        # The layers of a step share its plans: they are no part of what is timed.
        self.plans = {one: plan_on_device(self.pages.lengths, None, one) for one in settings}


def _chain(inputs: _Inputs, result: mx.array) -> _Inputs:
    """The same contexts with the result of another call, (B, heads, 1, dim), as queries."""
    chained = copy.copy(inputs)
    chained.queries = result
    return chained


def _case(profile: Profile, name: str, labels: dict[str, int | str], lengths: list[int]) -> Case:
    heads = Heads(profile.gpu)
    dtype = profile.dtype
    kv_bytes = heads.kv_bytes(sum(lengths), dtype)
    padded = heads.kv_bytes(len(lengths) * max(lengths), dtype)

    def sdpa(x: _Inputs) -> mx.array:
        return _sdpa(x.queries, x.keys, x.values, scale=heads.scale, mask=x.mask)

    def gather_sdpa(x: _Inputs) -> mx.array:
        keys, values = x.pages.gather(x.tables)
        return _sdpa(x.queries, keys, values, scale=heads.scale, mask=x.mask)

    def kernel(settings: DecodeSettings, x: _Inputs) -> mx.array:
        return paged_decode(
            x.queries,
            x.pages.keys,
            x.pages.values,
            x.tables,
            x.plans[settings],
            scale=heads.scale,
            written=x.pages.written,
        )

    def reference(x: _Inputs) -> mx.array:
        return paged_attention(x.queries, x.pages.keys, x.pages.values, x.batch, scale=heads.scale)

    variants: dict[str, Callable[[Any], object]] = {
        "sdpa, contiguous": sdpa,
        "gather + sdpa": gather_sdpa,
    }
    settings = _settings(profile, heads, lengths) if profile.gpu else {}
    for variant, chosen in settings.items():
        variants[variant] = partial(kernel, chosen)
        labels = {**labels, variant: ", ".join(f"{k} {v}" for k, v in chosen._asdict().items())}
    if not profile.gpu:
        variants["reference"] = reference
    return Case(
        operation="paged_decode",
        name=name,
        labels=labels,
        inputs=partial(_Inputs, heads, dtype, lengths, list(settings.values())),
        variants=variants,
        chain=_chain,
        baselines=("sdpa, contiguous", "gather + sdpa"),
        bytes_moved=kv_bytes + heads.row_bytes(len(lengths), dtype),
        flops=4 * sum(lengths) * heads.queries * heads.dim,
        memory=kv_bytes + 4 * padded,
    )


def _settings(profile: Profile, heads: Heads, lengths: list[int]) -> dict[str, DecodeSettings]:
    """The kernel's settings by variant: those made for any GPU, and those tuned, if they differ."""
    default = default_settings(
        np.array(lengths, np.int32), None, heads.keys, heads.queries // heads.keys
    )
    context = round(sum(lengths) / len(lengths))
    shape = DecodeShape(
        len(lengths), context, heads.queries, heads.keys, heads.dim, heads.dim, BLOCK_SIZE
    )
    choice = select("paged_decode", shape, profile.dtype, profile.device)
    # A variant without settings takes the kernel's own.
    tuned = default._replace(**choice.settings)
    return {"kernel": default} if tuned == default else {"kernel": default, "kernel, tuned": tuned}
