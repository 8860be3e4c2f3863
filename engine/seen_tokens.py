"""How often a sequence has drawn each token, for penalties."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


class SeenTokens:
    """Counts of the tokens behind a prompt; each of them is looked at once."""

    def __init__(self, num_prompt_tokens: int) -> None:
        self._places: dict[int, int] = {}
        self._tokens = array("i")
        self._counts = array("i")
        self._num_read = num_prompt_tokens

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
        """(n, 2) int32: each token once, and how often it was drawn."""
        return np.column_stack([np.array(self._tokens), np.array(self._counts)]).astype(np.int32)
