"""Which tokens a sequence holds, and how often it has drawn each, for penalties."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


class SeenTokens:
    """Counts of the tokens behind a prompt; each of them is looked at once."""

    def __init__(self, prompt: Sequence[int], *, with_prompt: bool) -> None:
        """``with_prompt`` lists the prompt's tokens too, as drawn so often as they really are."""
        self._tokens = array("i", dict.fromkeys(prompt) if with_prompt else ())
        self._num_in_prompt = len(self._tokens)
        self._places = {token: place for place, token in enumerate(self._tokens)}
        self._counts = array("i", bytes(4 * len(self._tokens)))
        self._num_read = len(prompt)

    def read(self, token_ids: Sequence[int]) -> None:
        """Count the tokens by which ``token_ids``, prompt included, has grown."""
        for token in token_ids[self._num_read :]:
            place = self._places.setdefault(token, len(self._tokens))
            if place == len(self._tokens):
                self._tokens.append(token)
                self._counts.append(0)
            self._counts[place] += 1
        self._num_read = len(token_ids)

    def table(self) -> npt.NDArray[np.int32]:
        """(n, 3) int32: each token once, how often it was drawn, whether the prompt lists it."""
        table = np.zeros((len(self._tokens), 3), np.int32)
        table[:, 0] = self._tokens
        table[:, 1] = self._counts
        table[: self._num_in_prompt, 2] = 1
        return table
