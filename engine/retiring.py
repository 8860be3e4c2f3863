"""What sequences give up is released once no step in flight reads or writes it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from quire.cache.pools import Holdings, Needs, Pools


class Retiring:
    """Blocks and slots that sequences have given up, held until the steps that use them retire.

    Attributes:
        retired: the newest step that has, steps being numbered from 0.
    """

    def __init__(self, pools: Pools) -> None:
        self.retired = -1
        self._pools = pools
        self._held: deque[tuple[int, Holdings]] = deque()  # with the step to wait for

    def hold(self, last_step: int, holdings: Holdings) -> None:
        """Release ``holdings`` when ``last_step`` has retired."""
        if not any(holdings):
            return
        if last_step > self.retired:
            self._held.append((last_step, holdings))
        else:
            self._pools.release(holdings)

    def release(self) -> None:
        """All that waited for steps that have retired by now."""
        while self._held and self._held[0][0] <= self.retired:
            self._pools.release(self._held.popleft()[1])

    @property
    def coming(self) -> Needs:
        """Blocks that are on their way back."""
        return Needs(sum(len(each.blocks) for each in self), sum(len(each.window) for each in self))

    def __iter__(self) -> Iterator[Holdings]:
        return (holdings for _, holdings in self._held)
