"""The pair of sockets between the front end and one incarnation of the worker."""

from __future__ import annotations

import shutil

import zmq
import zmq.asyncio

from quire.engine.messages import FromWorker, ToWorker, decode_from_worker, encode
from quire.serve.runtime_folder import make_worker_folder


class Channel:
    """Requests go out on PUSH, outputs come in on PULL, over ipc in a folder only we can enter.

    ``folder`` is the worker's for temporary files, too.

    A new worker gets a new channel, so it can never read a frame meant for the one before.
    """

    def __init__(self) -> None:
        self.folder = folder = make_worker_folder()
        self.request_address = f"ipc://{folder}/requests"
        self.output_address = f"ipc://{folder}/outputs"

        self._context = zmq.asyncio.Context()
        self._outputs = self._context.socket(zmq.PULL)
        self._requests = self._context.socket(zmq.PUSH)
        # Sends never wait, so they take the plain view of the socket: no future per request.
        self._plain_requests: zmq.Socket[bytes] = zmq.Socket.shadow(self._requests)
        # No high-water marks: requests are bounded by admission, outputs by max_tokens, and a
        # busy front end must not stall the device.
        self._outputs.rcvhwm = 0
        self._requests.sndhwm = 0
        self._outputs.bind(self.output_address)
        self._requests.bind(self.request_address)

    def send(self, message: ToWorker) -> bool:
        """Hand ``message`` to the worker; False when no worker is connected."""
        try:
            self._plain_requests.send(encode(message), zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    async def connected(self) -> None:
        """Return once the worker, which has sent a frame, has both connections."""
        await self._requests.poll(None, zmq.POLLOUT)  # type: ignore[call-arg]  # pyzmq omits flags

    async def receive(self) -> FromWorker:
        """The next frame. Raises msgspec.DecodeError if it is not one of ours."""
        frame: FromWorker = decode_from_worker(await self._outputs.recv())
        return frame

    async def receive_within(self, seconds: float) -> FromWorker | None:
        """The next frame, or None if there is none for ``seconds``."""
        if await self._outputs.poll(round(seconds * 1000)):
            return await self.receive()
        return None

    def close(self) -> None:
        self._requests.close(linger=0)
        self._outputs.close(linger=0)
        self._context.term()
        shutil.rmtree(self.folder, ignore_errors=True)
