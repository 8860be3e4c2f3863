"""Why a job of a helper process came to nothing."""

from __future__ import annotations

from typing import Any


class HelperError(Exception):
    """A job came to nothing. The message is one line."""


class HelperRefused(HelperError):
    """The job ended with an answer, and the answer is no; ``details`` says why."""

    def __init__(self, details: Any) -> None:
        super().__init__(str(details))
        self.details = details


class HelperTimeout(HelperError):
    """The job was stopped when its time was over."""


class HelperOutOfMemory(HelperError):
    """The job wanted more memory than it may take."""


class HelperCrashed(HelperError):
    """The process died over the job, or before."""


class HelperFailed(HelperError):
    """The process could not be started, or its code failed."""


class HelperBusy(HelperError):
    """Too many jobs wait already."""
