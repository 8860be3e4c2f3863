"""A worker process without a model: it speaks the frames and follows a script.

Run as ``python fake_worker.py [MODE]``; the configuration comes on standard input, as for the real
worker. Generated tokens count up from the last prompt token, one per step. The modes:

    ok          serve requests
    load-error  send LoadFailed and exit
    crash       exit with code 3 before Ready
    hang-load   never become ready
    killed-load kill -9 before Ready
    deaf        serve requests but ignore Shutdown
    talk        print a line on each of the two outputs, without an end on the second
    garbage     send a frame that is not one of ours after Ready
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence

import msgspec
import zmq

from quire.engine.life_line import LifeLine
from quire.engine.messages import (
    BLOCK_SECONDS_BOUNDS,
    STEP_SECONDS_BOUNDS,
    STEP_TOKENS_BOUNDS,
    Abort,
    CacheStats,
    GenerateRequest,
    Histogram,
    LoadFailed,
    LoadProgress,
    Lookups,
    Ready,
    Shutdown,
    StepOutput,
    StepStats,
    TokenOutput,
    WorkerConfig,
    WorkerStats,
    decode_to_worker,
    encode,
)

# A request whose prompt starts with one of these does what its name says.
DIE = 251  # kill -9 after the first token
HANG = 249  # one token, then a step that never ends
CHATTER = 250  # print more lines than any log takes
STALL = 252  # one token, then nothing until aborted
ERROR = 253  # one token, then finish_reason "error"
STEP_SECONDS = 0.001


def no_histogram(bounds: Sequence[float]) -> Histogram:
    return Histogram([0] * (len(bounds) + 1), 0.0)


class FakeWorker:
    def __init__(self, config: WorkerConfig, mode: str, life_line: LifeLine) -> None:
        self.life_line = life_line
        self.context = zmq.Context()
        self.requests = self.context.socket(zmq.PULL)
        self.requests.connect(config.request_address)
        self.outputs = self.context.socket(zmq.PUSH)
        self.outputs.connect(config.output_address)
        self.config = config
        self.mode = mode
        self.running: dict[int, tuple[GenerateRequest, int]] = {}
        self.steps = 0

    def send(self, message: LoadProgress | LoadFailed | Ready | StepOutput) -> None:
        self.outputs.send(encode(message))

    def run(self) -> int:
        self.send(LoadProgress("loading weights", 1, 2))
        if self.mode == "hang-load":
            time.sleep(3600)
        if self.mode == "killed-load":
            self.die()
        if self.mode == "load-error":
            self.send(LoadFailed("The architecture frobnicator is not supported."))
        if self.mode in ("load-error", "crash"):
            self.outputs.close(linger=1000)
            return 3 if self.mode == "crash" else 1
        if self.mode == "talk":
            print("words on standard output", flush=True)
            print("words on standard error", end="", file=sys.stderr, flush=True)
        self.send(self.ready())
        if self.mode == "garbage":
            self.outputs.send(b"\xc1 not msgpack")
        while True:
            if self.requests.poll(0 if self.running else 1000):
                message = decode_to_worker(self.requests.recv())
                if isinstance(message, GenerateRequest):
                    self.running[message.request_id] = (message, 0)
                elif isinstance(message, Abort):
                    self.running.pop(message.request_id, None)
                elif isinstance(message, Shutdown) and self.mode != "deaf":
                    return 0
                self.send(StepOutput([], self.stats()))
            elif self.running:
                time.sleep(STEP_SECONDS)
                self.step()

    def step(self) -> None:
        self.life_line.begin_step()
        self.steps += 1
        outputs = []
        for request_id, (request, done) in list(self.running.items()):
            first = request.prompt_token_ids[0]
            if done and first == STALL:
                continue
            if done and first == CHATTER:
                print("\n".join("chatter" for _ in range(20_000)), file=sys.stderr, flush=True)
            if done and first == DIE:
                self.die()
            if done and first == HANG:
                time.sleep(3600)
            reason = "length" if done + 1 == request.max_tokens else None
            error = None
            if done and first == ERROR:
                reason, error = "error", "The scripted failure."
            token = request.prompt_token_ids[-1] + 1 + done
            cached = len(request.prompt_token_ids) // 2
            outputs.append(TokenOutput(request_id, [token], reason, cached, error))
            self.running[request_id] = (request, done + 1)
            if reason is not None:
                del self.running[request_id]
        self.life_line.end_step()
        if outputs:
            self.send(StepOutput(outputs, self.stats()))

    def die(self) -> None:
        # Only after what has been sent is on its way, or the first token may be lost.
        self.requests.close(linger=0)
        self.outputs.close(linger=-1)
        self.context.term()
        os.kill(os.getpid(), signal.SIGKILL)

    def ready(self) -> Ready:
        return Ready(
            architecture="fake",
            device="cpu",
            dtype="float32",
            vocab_size=1000,
            max_model_len=self.config.max_model_len or 128,
            max_num_seqs=self.config.max_num_seqs,
            block_size=self.config.block_size,
            num_blocks=100,
            weight_bytes=4000,
            kv_cache_bytes=self.config.kv_cache_memory or 8000,
        )

    def stats(self) -> WorkerStats:
        return WorkerStats(
            requests_running=len(self.running),
            requests_waiting=0,
            blocks_used=len(self.running),
            blocks_cached=0,
            blocks_free=100 - len(self.running),
            memory_active=5000,
            memory_cache=600,
            memory_peak=7000,
            steps=self.steps,
            preemptions=self.steps,
            memory_faults=0,
            cache=CacheStats(Lookups(), 0, *[no_histogram(BLOCK_SECONDS_BOUNDS)] * 2),
            step=StepStats(
                *[0.0] * 4,
                seconds=no_histogram(STEP_SECONDS_BOUNDS),
                tokens=no_histogram(STEP_TOKENS_BOUNDS),
            ),
        )


def main() -> int:
    line = b""
    while not line.endswith(b"\n"):  # unbuffered, so that the life line sees every later byte
        line += os.read(0, 1)
    config = msgspec.json.decode(line, type=WorkerConfig)
    life_line = LifeLine(config.answers)
    life_line.start()
    mode = sys.argv[1] if len(sys.argv) > 1 else "ok"
    if mode.startswith("once:"):
        # "once:FILE:LATER" is "ok" until FILE exists, and makes it: LATER is for the restarts.
        _, marker, later = mode.split(":")
        mode = later if os.path.exists(marker) else "ok"
        open(marker, "w").close()
    if mode.startswith("first:"):
        # "first:FILE:MODE" is MODE, and "ok" once FILE exists.
        _, marker, first = mode.split(":")
        mode = "ok" if os.path.exists(marker) else first
        open(marker, "w").close()
    return FakeWorker(config, mode, life_line).run()


if __name__ == "__main__":
    sys.exit(main())
