"""What of each prompt a server could have cached: what earlier requests had computed, by tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from quire.loadtest.records import RequestRecord

BLOCK = 16  # tokens; servers cache whole blocks of about so many


class SentTokens(NamedTuple):
    """One request, and its tokens as the server told them."""

    record: RequestRecord
    prompt: Sequence[int]
    answer: Sequence[int]


def count_cacheable(sent: Iterable[SentTokens]) -> None:
    """Fill in ``cacheable_tokens`` of all records that the server told the tokens of.

    They are those of the longest prefix that the prompt, less its last token, has in common with
    what any other request had computed when this one was sent, in whole blocks. A prompt is
    computed when its first token arrives, an answer, less its last token, when it has ended.
    """
    known = [
        (each.record, *_arrays(each)) for each in sent if each.prompt and not each.record.error
    ]
    for record, prompt, _ in known:
        longest = 0
        for other, its_prompt, whole in known:
            if other is record:
                continue
            if other.start_ms + other.end_ms <= record.start_ms:
                longest = max(longest, _common(prompt[:-1], whole))
            elif other.chunk_ms and other.start_ms + other.chunk_ms[0] <= record.start_ms:
                longest = max(longest, _common(prompt[:-1], its_prompt))
        record.cacheable_tokens = longest // BLOCK * BLOCK


Int32Array = npt.NDArray[np.int32]


def _arrays(sent: SentTokens) -> tuple[Int32Array, Int32Array]:
    """The prompt, and all that the request computes."""
    prompt = np.array(sent.prompt, np.int32)
    return prompt, np.concatenate([prompt, np.array(sent.answer[:-1], np.int32)])


def _common(first: Int32Array, second: Int32Array) -> int:
    """The length of the longest common prefix."""
    length = min(len(first), len(second))
    differs = first[:length] != second[:length]
    return int(differs.argmax()) if differs.any() else length
