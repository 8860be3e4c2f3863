"""Mixtures of experts around their products: which experts a row has, and the sum of what they
gave. Of MLX's operations each takes a launch; here all of either are one kernel."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from quire.kernels.gpu_kernel import GpuKernel, float_bits

MAX_EXPERTS, MAX_CHOSEN = 1024, 32  # a simdgroup holds a row, and each lane one that is chosen

_THREADS = 256

_top_experts = GpuKernel(
    "top_experts",
    inputs=("logits", "bias", "factors"),
    outputs=("experts", "weights"),
    headers=("sampling",),
)
_weigh_experts = GpuKernel(
    "weigh_experts", inputs=("pairs", "places", "weights", "common", "gates"), outputs=("output",)
)


class Routing(NamedTuple):
    """How the experts of a row are chosen.

    Attributes:
        chosen: experts of a row.
        normalised: whether the weights of a row are divided by their sum. Of a softmax over all
            experts these are those of a softmax over the chosen ones.
        sigmoid: scores are sigmoids, in float32, of which ``bias`` is added for the choice (Wang et
            al., Auxiliary-Loss-Free Load Balancing Strategy, 2024); else a softmax.
        scale: of all weights, where experts have no factors of their own.
        epsilon: added to the sum that weights are divided by.
    """

    chosen: int
    normalised: bool
    sigmoid: bool = False
    scale: float = 1.0
    epsilon: float = 0.0


class Shared(NamedTuple):
    """An expert that all rows have: (T, dim) of what it gave, and (T, 1) gates, whose sigmoids
    weigh it; None: it is added as it is."""

    rows: mx.array
    gates: mx.array | None = None


def top_experts(
    logits: mx.array,
    routing: Routing,
    bias: mx.array | None = None,
    factors: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """The experts of the highest scores, from the highest down.

    Args:
        logits: (T, experts)
        bias: (experts,), added to scores for the choice
        factors: (experts,), of weights, if each expert has its own

    Returns:
        Experts, (T, chosen) uint32, and weights of their results, likewise: float32 of sigmoids,
        else in the dtype of ``logits``.
    """
    rows, experts = logits.shape
    dtype = mx.float32 if routing.sigmoid else logits.dtype
    indices, weights = _top_experts(
        [logits, bias, factors],
        template={
            "W": dtype,
            "EXPERTS": experts,
            "CHOSEN": routing.chosen,
            "SIGMOID": routing.sigmoid,
            "BIASED": bias is not None,
            "NORMALISED": routing.normalised,
            "FACTORED": factors is not None,
            "SCALE": float_bits(routing.scale),
            "EPSILON": float_bits(routing.epsilon),
        },
        groups=(rows, 1, 1),
        threads=32,
        output_shapes=[(rows, routing.chosen)] * 2,
        output_dtypes=[mx.uint32, dtype],
    )
    return indices, weights


def top_experts_by_steps(
    logits: mx.array,
    routing: Routing,
    bias: mx.array | None = None,
    factors: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """The same in MLX's operations; in any order."""
    if routing.sigmoid:
        scores = mx.sigmoid(logits.astype(mx.float32))
    else:
        scores = mx.softmax(logits, axis=-1, precise=True)
    order = scores if bias is None else scores + bias
    experts = mx.argpartition(order, kth=-routing.chosen, axis=-1)[:, -routing.chosen :]
    weights = mx.take_along_axis(scores, experts, axis=-1)
    if routing.normalised:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + routing.epsilon)
    if factors is not None:
        return experts, weights * factors[experts].astype(weights.dtype)
    return experts, weights if routing.scale == 1 else weights * routing.scale


def weigh_experts(
    pairs: mx.array,
    weights: mx.array,
    shared: Shared | None = None,
    places: mx.array | None = None,
) -> mx.array:
    """sum(weights * pairs), and on top what a shared expert gave.

    Args:
        pairs: (T * chosen, dim), what each expert of a row gave
        weights: (T, chosen)
        places: (T * chosen,) uint32, where each pair is among ``pairs``; None: they lie in order

    Returns:
        (T, dim), rounded once.
    """
    (rows, chosen), dim = weights.shape, pairs.shape[1]
    common, gates = shared or (None, None)
    threads = rows * dim * pairs.dtype.size // 16
    (output,) = _weigh_experts(
        [pairs, places, weights, common, gates],
        template={
            "T": pairs.dtype,
            "DIM": dim,
            "CHOSEN": chosen,
            "SORTED": places is not None,
            "SHARED_EXPERT": shared is not None,
            "GATED": gates is not None,
            "THREADS": _THREADS,
        },
        groups=(-(-threads // _THREADS), 1, 1),
        threads=_THREADS,
        output_shapes=[(rows, dim)],
        output_dtypes=[pairs.dtype],
    )
    return output


def weigh_experts_by_steps(
    pairs: mx.array,
    weights: mx.array,
    shared: Shared | None = None,
    places: mx.array | None = None,
) -> mx.array:
    """The same in MLX's operations."""
    given = (pairs if places is None else pairs[places]).reshape(*weights.shape, -1)
    total = (given * weights[:, :, None]).sum(axis=1).astype(pairs.dtype)
    if shared is None:
        return total
    gated = shared.rows if shared.gates is None else mx.sigmoid(shared.gates) * shared.rows
    return total + gated
