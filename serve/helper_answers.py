"""What a client is told where a helper process refused or could not do its job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from quire.serve.errors import ApiError, invalid, unavailable
from quire.serve.helper_errors import (
    HelperBusy,
    HelperCrashed,
    HelperError,
    HelperOutOfMemory,
    HelperRefused,
    HelperTimeout,
)
from quire.serve.helpers import HelperPool
from quire.serve.prompt_length import error_of

RETRY_AFTER: Final = 1  # seconds, where too many jobs wait


@dataclass(frozen=True)
class Wording:
    """Beginnings of sentences.

    Attributes:
        param: the request's field that is to blame for a job that takes too much.
        waiting: "Too many .. wait", where no more jobs are taken.
        too_much: where a job ran out of time or memory, or killed its process twice.
        failed: where the helper's own code failed.
    """

    param: str | None
    waiting: str
    too_much: str
    failed: str


async def answer_of(
    pool: HelperPool, wording: Wording, request: Any, payload: Sequence[bytes] = ()
) -> Any:
    """The reply to a job whose handler refuses with ``prompt_length.details_of`` an error.

    Raises :class:`ApiError`: that error; 400 for what takes too much, 503 where too many jobs wait,
    500 for a fault of ours.
    """
    try:
        return await pool.call_surviving(request, payload)
    except HelperRefused as refused:
        raise error_of(refused.details) from None
    except HelperBusy:
        raise unavailable(f"{wording.waiting}; try again.", RETRY_AFTER) from None
    except (HelperTimeout, HelperOutOfMemory, HelperCrashed) as error:
        raise invalid(wording.param, f"{wording.too_much}: {error}.") from None
    except HelperError as error:
        raise ApiError(500, f"{wording.failed}: {error}.") from None
