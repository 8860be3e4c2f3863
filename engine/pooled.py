"""The vector that a prompt's hidden states become, step by step; on the host."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from quire.engine.errors import EngineError
from quire.engine.messages import Pooling

Float32Array = npt.NDArray[np.float32]


class Pooled:
    """The vector of one prompt, as far as its steps have retired."""

    def __init__(self, pooling: Pooling, num_tokens: int) -> None:
        """``num_tokens`` are those of the prompt."""
        self._pooling = pooling
        self._num_tokens = num_tokens
        self._total: npt.NDArray[np.float64] | None = None

    @property
    def needs_all(self) -> bool:
        """Whether every token's state counts: then none may come from the prefix cache."""
        return self._pooling.kind == "mean"

    def num_wanted(self, start: int, end: int) -> int:
        """How many states of the tokens ``start`` to ``end`` count: so many of the last ones."""
        if self.needs_all:
            return end - start
        return 1 if end == self._num_tokens else 0

    def add(self, start: int, end: int, total: Float32Array) -> bool:
        """Take the sum of the states that :meth:`num_wanted` has asked for.

        Chunks retire in order, and a sequence that was preempted begins anew with its first token.

        Args:
            total: (hidden_size,)

        Returns:
            Whether that was all.
        """
        if self._total is None or start == 0 or not self.needs_all:
            self._total = np.zeros(len(total))
        self._total += total
        return end == self._num_tokens

    def vector(self) -> bytes:
        """(dimensions,) float32 of length 1, in little-endian order: the sum's direction, which is
        the mean's too.

        Raises:
            EngineError: a state is not finite.
        """
        assert self._total is not None, "a vector of nothing"
        vector = self._total[: self._pooling.dimensions]
        length = float(np.linalg.norm(vector))
        if not np.isfinite(length):
            raise EngineError("the model's hidden states of this text are not finite")
        return (vector / (length or 1.0)).astype("<f4").tobytes()
