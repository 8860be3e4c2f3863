"""How each row draws its next token.

A token's weight is its probability relative to the likeliest one: 2**-y, where y is
(highest logit - logit) * log2(e) / temperature. In descending order of weight each filter keeps a
prefix, so it is a limit on y. All decisions are made on integers: y in steps of 2**-24 is the *key*
that limits are set on, and weights are multiples of 2**-40, so that sums do not depend on the order
of their terms. A row draws the same token alone and in any batch, and never one a filter excludes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quire.kernels.exponential import LOG2_E

# Below this, dividing by the temperature overflows float32 and only the best token has any weight.
MIN_TEMPERATURE = 1e-5
# Then 2**20 weights of up to 2**40 add up, and can be multiplied by a fraction, in 64 bits.
MAX_VOCAB = 1 << 20
# From y = 64 on a token has no weight.
MAX_Y = 64.0


@dataclass(frozen=True, slots=True)
class Draws:
    """How each of R rows draws: arrays of length R, on the host.

    The filters apply after the temperature, in the order top-k, top-p, min-p. Tokens as likely as
    the last one that a filter keeps stay too (that is, of the same y to 2**-24), and the likeliest
    token always stays. Weights below 2**-40 count as none.
    """

    temperature: npt.NDArray[np.float64]  # 0 takes the likeliest token, the first of equals
    top_k: npt.NDArray[np.int64]  # 0 keeps all; 1 takes the likeliest token, the first of equals
    top_p: npt.NDArray[np.float64]  # of the probability that top-k has left; 1 keeps all
    min_p: npt.NDArray[np.float64]  # of the likeliest token's probability; 0 keeps all
    uniform: npt.NDArray[np.float32]  # in [0, 1), multiples of 2**-24: the random numbers

    @property
    def greedy(self) -> npt.NDArray[np.bool_]:
        greedy: npt.NDArray[np.bool_] = (self.temperature < MIN_TEMPERATURE) | (self.top_k == 1)
        return greedy

    def table(self) -> npt.NDArray[np.float32]:
        """(R, 5): log2(e) / temperature (0: greedy), top_k, top_p, -log2(min_p), uniform."""
        table = np.empty((len(self.uniform), 5), np.float32)
        table[:, 0] = ~self.greedy * LOG2_E / np.maximum(self.temperature, MIN_TEMPERATURE)
        table[:, 1] = np.minimum(self.top_k, MAX_VOCAB)
        table[:, 2] = self.top_p
        table[:, 3] = -np.log2(np.maximum(self.min_p, 2.0**-MAX_Y))
        table[:, 4] = self.uniform
        return table
