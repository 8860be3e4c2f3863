"""Which tokens belong to the text that a client has been shown."""

from __future__ import annotations

from collections import deque

from msgspec import Struct

from quire.engine.messages import TokenLogprobs


class ShownToken(Struct, frozen=True):
    token_id: int
    offset: int  # of its first character in the choice's text
    logprobs: TokenLogprobs | None  # None: the first of a prompt, which follows on nothing


class TokenLog:
    """Holds tokens back as long as their text is, and drops those whose text is never shown.

    Characters are counted, so that the text may be cut in any way on its path to the client. What a
    stop string cuts in two is shown; an unfinished character belongs to the token that ends it.
    """

    def __init__(self, offset: int = 0) -> None:
        """``offset`` is the number of characters in front of the first token's."""
        self._waiting: deque[tuple[ShownToken, int]] = deque()  # with the end of each
        self._end = offset
        self._shown = offset

    def add(self, token_id: int, logprobs: TokenLogprobs | None, num_chars: int) -> None:
        """A token has come that adds so many characters to the text."""
        token = ShownToken(token_id, self._end, logprobs)
        self._end += num_chars
        self._waiting.append((token, self._end))

    def show(self, num_chars: int) -> list[ShownToken]:
        """The tokens that are complete once so many more characters are shown."""
        self._shown += num_chars
        tokens = []
        while self._waiting:
            token, end = self._waiting[0]
            # Without characters of its own it goes with those that follow.
            if end > self._shown or token.offset >= self._shown:
                break
            tokens.append(token)
            self._waiting.popleft()
        return tokens

    def finish(self, *, cut: bool) -> list[ShownToken]:
        """The rest; ``cut``: the text ends where it does, whatever was generated."""
        rest = [token for token, _ in self._waiting if not cut or token.offset < self._shown]
        self._waiting.clear()
        return rest

    def drop(self) -> None:
        """The tokens that wait are no part of the text."""
        self._waiting.clear()
        self._end = self._shown
