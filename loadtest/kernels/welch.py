"""Welch's t-test: do two sets of samples differ in their means? (Welch, 1947)"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

_EPSILON = 1e-15
_TINY = 1e-300


class Welch(NamedTuple):
    t: float
    degrees: float  # of freedom, by Welch and Satterthwaite
    p: float  # two-sided


def welch_test(a: Sequence[float], b: Sequence[float]) -> Welch:
    """Test the means of two independent samples of possibly unequal variance.

    Raises ValueError for fewer than two values on either side.
    """
    if len(a) < 2 or len(b) < 2:
        raise ValueError("a t-test needs two values on each side")
    difference = statistics.fmean(a) - statistics.fmean(b)
    part_a, part_b = statistics.variance(a) / len(a), statistics.variance(b) / len(b)
    squared_error = part_a + part_b
    if squared_error == 0:
        # Constant samples: they are equal or they are not.
        t = math.copysign(math.inf, difference) if difference else 0.0
        return Welch(t, len(a) + len(b) - 2.0, 0.0 if difference else 1.0)
    t = difference / math.sqrt(squared_error)
    shares = part_a / squared_error, part_b / squared_error
    degrees = 1 / (shares[0] ** 2 / (len(a) - 1) + shares[1] ** 2 / (len(b) - 1))
    return Welch(t, degrees, t_tails(t, degrees))


def t_tails(t: float, degrees: float) -> float:
    """The probability that Student's t is at least as far from zero as ``t``."""
    square = t * t
    if square < degrees:  # where the other form would lose t in a sum with the degrees
        return 1 - incomplete_beta(0.5, degrees / 2, square / (degrees + square))
    return incomplete_beta(degrees / 2, 0.5, degrees / (degrees + square))


def incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I_x(a, b), by its continued fraction.

    DLMF 8.17.22, summed by Lentz's method as modified by Thompson and Barnett (1986).
    """
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):
        return 1 - incomplete_beta(b, a, 1 - x)  # the fraction converges fast on the other side
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    log_front += a * math.log(x) + b * math.log1p(-x)
    value, c, d = 1.0, 1.0, 0.0
    for step in range(10_000):
        m = step // 2
        if step == 0:
            term = 1.0
        elif step % 2:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d = 1 / _nonzero(1 + term * d)
        c = _nonzero(1 + term / c)
        value *= c * d
        if step and abs(c * d - 1) < _EPSILON:
            return math.exp(log_front) * (value - 1) / a
    raise ArithmeticError(f"I_{x}({a}, {b}) did not converge")


def _nonzero(x: float) -> float:
    return x if abs(x) > _TINY else _TINY
