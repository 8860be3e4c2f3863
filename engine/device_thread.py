"""Work for the one thread that builds graphs: MLX's streams belong to the thread that made them.

The other thread of a worker only waits for results and reads memory counters.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
Result = TypeVar("Result")


class Submit(Protocol):
    """Has a job done, now or later. What the job raises is raised at once or by the future."""

    def __call__(self, job: Callable[[], T], /) -> Future[T]: ...


def do_now(job: Callable[[], T], /) -> Future[T]:
    """On the calling thread."""
    future: Future[T] = Future()
    future.set_result(job())
    return future


class _Later(Future[T]):
    """Runs its job in the first call of :meth:`result`."""

    def __init__(self, job: Callable[[], T]) -> None:
        super().__init__()
        self._job: Callable[[], T] | None = job

    def result(self, timeout: float | None = None) -> T:
        job, self._job = self._job, None
        if job is not None:
            try:
                self.set_result(job())
            except BaseException as error:
                self.set_exception(error)
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What the job raised, if it has run. None if not, because nobody has asked for its result:
        whoever calls this gives the job up, and must not ask for the result later."""
        return None if self._job is not None else super().exception(timeout)


def do_later(job: Callable[[], T], /) -> Future[T]:
    """On the thread that first asks for the result, and then."""
    return _Later(job)


class DeviceThread:
    """Takes jobs from another thread and runs them on the thread that made this object."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = SimpleQueue()

    def submit(self, job: Callable[[], T], /) -> Future[T]:
        """Have ``job`` done after those submitted before."""
        future: Future[T] = Future()
        self._jobs.put((job, future))
        return future

    def run_beside(self, work: Callable[[], Result]) -> Result:
        """Run ``work`` on a thread of its own, and here the jobs that it submits, until it ends.

        Returns what it returns, and raises what it raises.
        """
        with ThreadPoolExecutor(1, "beside") as threads:
            working = threads.submit(work)
            working.add_done_callback(lambda _: self._jobs.put(None))
            self._do_jobs()
        return working.result()

    def _do_jobs(self) -> None:
        while (item := self._jobs.get()) is not None:
            job, future = item
            try:
                result = job()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
                del result
            # They hold arrays, whose memory a later job may take.
            del item, job, future
