"""Tokens are told with the text they belong to, however that text is cut on its way."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from quire.serve.token_log import ShownToken, TokenLog

# Characters that each token adds; none for the first part of a character.
SIZES = st.lists(st.integers(0, 4), max_size=12)


@settings(deadline=None)
@given(SIZES, st.data())
def test_all_tokens_are_told_in_order_and_never_before_their_text(
    sizes: list[int], data: st.DataObject
) -> None:
    log, told, shown, hidden = TokenLog(), [], 0, 0
    for token_id, size in enumerate(sizes):
        log.add(token_id, None, size)
        hidden += size
        step = data.draw(st.integers(0, hidden))
        shown, hidden = shown + step, hidden - step
        told += log.show(step)
        assert all(token.offset + sizes[token.token_id] <= shown for token in told)
    told += log.show(hidden) + log.finish(cut=False)
    assert told == [ShownToken(i, sum(sizes[:i]), None) for i in range(len(sizes))]


@settings(deadline=None)
@given(SIZES, st.data())
def test_what_a_stop_string_takes_away_is_not_told_in_any_way_of_cutting(
    sizes: list[int], data: st.DataObject
) -> None:
    end = data.draw(st.integers(0, sum(sizes)))

    def tell(cuts: list[int]) -> list[ShownToken]:
        log, told, shown = TokenLog(), [], 0
        for token_id, (size, cut) in enumerate(zip(sizes, cuts, strict=True)):
            log.add(token_id, None, size)
            step = min(cut, end - shown, sum(sizes[: token_id + 1]) - shown)
            shown += step
            told += log.show(step)
        return told + log.show(end - shown) + log.finish(cut=True)

    cuts = data.draw(st.lists(st.integers(0, 5), min_size=len(sizes), max_size=len(sizes)))
    assert tell(cuts) == tell([0] * len(sizes))
    assert all(token.offset < end for token in tell(cuts))
