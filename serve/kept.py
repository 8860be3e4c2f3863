"""How much layers keep of a sequence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Text = Mapping[str, Any]  # config.json, with what it says of text on top


@dataclass(frozen=True)
class Kept:
    """Numbers that all layers together keep.

    Attributes:
        token: of each token.
        window_token: of each token that sliding windows, or chunks, still see.
        window: tokens that these see; 0: there are none.
        state: of a sequence, in the model's own type.
        float_state: of a sequence, in float32.
    """

    token: int = 0
    window_token: int = 0
    window: int = 0
    state: int = 0
    float_state: int = 0

    def plus(self, other: Kept) -> Kept:
        return Kept(
            self.token + other.token,
            self.window_token + other.window_token,
            max(self.window, other.window),
            self.state + other.state,
            self.float_state + other.float_state,
        )
