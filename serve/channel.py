"""The pair of sockets between the front end and one incarnation of the worker."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from typing import Final

import zmq

from quire.engine.messages import FromWorker, ToWorker, decode_from_worker, encode
from quire.serve.runtime_folder import make_worker_folder

_CONNECTING: Final = 0.001  # seconds between two looks whether a connection is there


class Channel:
    """Requests go out on PUSH, outputs come in on PULL, over ipc in a folder only we can enter.

    ``folder`` is the worker's for temporary files, too.

    A new worker gets a new channel, so it can never read a frame meant for the one before.
    """

    def __init__(self) -> None:
        self.folder = folder = make_worker_folder()
        self.request_address = f"ipc://{folder}/requests"
        self.output_address = f"ipc://{folder}/outputs"

        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._outputs = self._context.socket(zmq.PULL)
        self._requests = self._context.socket(zmq.PUSH)
        # No high-water marks: requests are bounded by admission, outputs by max_tokens, and a
        # busy front end must not stall the device.
        self._outputs.rcvhwm = 0
        self._requests.sndhwm = 0
        self._outputs.bind(self.output_address)
        self._requests.bind(self.request_address)
        self._readable = asyncio.Event()
        # zmq.asyncio does the same with several futures a frame.
        asyncio.get_running_loop().add_reader(self._outputs.FD, self._readable.set)

    def send(self, message: ToWorker) -> bool:
        """Hand ``message`` to the worker; False when no worker is connected."""
        try:
            self._requests.send(encode(message), zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    async def connected(self) -> None:
        """Return once the worker, which has sent a frame, has both connections."""
        while not self._requests.poll(0, zmq.POLLOUT):  # noqa: ASYNC110 - once for each worker
            await asyncio.sleep(_CONNECTING)

    async def receive(self) -> FromWorker:
        """The next frame; does not yield if one waits.

        Raises msgspec.DecodeError if it is not one of ours.
        """
        while True:
            self._readable.clear()
            with contextlib.suppress(zmq.Again):
                frame: FromWorker = decode_from_worker(self._outputs.recv(zmq.NOBLOCK))
                return frame
            # The descriptor tells of what has come since that attempt.
            await self._readable.wait()

    async def receive_within(self, seconds: float) -> FromWorker | None:
        """The next frame, or None if there is none for ``seconds``."""
        with contextlib.suppress(TimeoutError):
            return await asyncio.wait_for(self.receive(), seconds)
        return None

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._outputs.FD)
        self._requests.close(linger=0)
        self._outputs.close(linger=0)
        self._context.term()
        shutil.rmtree(self.folder, ignore_errors=True)
