"""The frames that cross the process boundary between the front end and one worker.

Each frame is one msgpack-encoded struct, tagged with its class name. Requests flow to the worker
and outputs flow back; nothing here knows about HTTP, text or arrays.
"""

from __future__ import annotations

from functools import cached_property
from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "abort", "error"]


class SamplingParams(msgspec.Struct, frozen=True, dict=True):
    """How the next token is drawn from the logits of one row.

    In this order: the bias is added, penalties are taken off, what is not allowed is taken out; the
    temperature, and the filters top-k, top-p and min-p.
    """

    temperature: float = 1.0  # 0 selects the most likely token
    top_k: int = 0  # 0 keeps the whole vocabulary
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None  # None draws a fresh seed for the request
    logit_bias: dict[int, float] = {}  # by token
    presence_penalty: float = 0.0  # taken off the logit of every token drawn before
    frequency_penalty: float = 0.0  # taken off as often as the token was drawn before
    # Divides the logits of tokens in the prompt or drawn before that are above 0, and multiplies
    # those below (Keskar et al., CTRL, 2019).
    repetition_penalty: float = 1.0
    allowed_token_ids: list[int] = []  # none: all are
    # None of these token sequences is drawn; a grammar may want them all the same.
    bad_words: list[list[int]] = []

    @property
    def penalizes(self) -> bool:
        """Whether tokens that have come up have other logits."""
        return (
            self.presence_penalty != 0
            or self.frequency_penalty != 0
            or self.repetition_penalty != 1
        )

    @cached_property  # asked of every row of every step
    def changes_logits(self) -> bool:
        """Whether logits are changed before a token is drawn."""
        return bool(self.logit_bias or self.penalizes or self.allowed_token_ids or self.bad_words)


# ---- front end -> worker


class WorkerConfig(msgspec.Struct, frozen=True):
    """Everything a worker needs to load one model; written to its standard input as JSON."""

    model_path: str
    request_address: str  # ZeroMQ endpoint the worker pulls requests from
    output_address: str  # ZeroMQ endpoint the worker pushes outputs to
    device: Literal["auto", "metal", "cuda", "cpu"] = "auto"
    block_size: int = 16  # tokens per KV block
    kv_cache_memory: int | None = None  # bytes for all KV pages; None derives it from the device
    max_model_len: int | None = None  # tokens; None takes the model's own context length
    max_num_seqs: int = 64
    max_num_batched_tokens: int | None = None  # None: by device
    eviction_policy: Literal["lru", "fifo", "cost"] = "lru"
    memory_fraction: float | None = None  # of what the device can give; None: by device
    log_level: str = "info"
    eos_token_ids: list[int] = []  # what ends a text; grammars allow them where a text may end
    answers: int = -1  # descriptor of the pipe that the life line answers on


class ThinkingBudget(msgspec.Struct, frozen=True):
    """How much may be thought, all blocks of thoughts together."""

    max_tokens: int
    close_token_ids: list[int]  # end a block; at least one
    then_token_ids: list[int] = []  # what the answer begins with after a block that was cut off
    open_token_ids: list[int] = []  # begin a block
    starts_open: bool = False  # the prompt has begun one


class Pooling(msgspec.Struct, frozen=True):
    """What a prompt's hidden states, behind the final norm, become: one vector of length 1."""

    kind: Literal["last", "mean"]  # the last token's, or the mean of all
    dimensions: int | None = None  # only so many of the first ones; None: all


class GenerateRequest(msgspec.Struct, tag=True, frozen=True):
    """One sequence to generate. The front end has checked that it fits ``max_model_len``."""

    request_id: int
    prompt_token_ids: list[int]
    max_tokens: int
    sampling: SamplingParams
    min_tokens: int = 0  # stop tokens cannot be drawn before this many output tokens
    stop_token_ids: list[int] = []  # the model's EOS ids are added by the front end
    cache_salt: str = ""  # prefix blocks are shared only between equal salts
    # llguidance's text of a grammar that the output must fit, or "". The output ends with it even
    # before min_tokens.
    grammar: str = ""
    # Report each output token's log-probability, and those of so many of the likeliest tokens.
    logprobs: int | None = None
    prompt_logprobs: int | None = None  # the same of the prompt's tokens
    priority: int = 0  # smaller ones are admitted first and give up their blocks last
    thinking: ThinkingBudget | None = None
    pooling: Pooling | None = None  # the prompt becomes a vector, and no token is drawn


class Abort(msgspec.Struct, tag=True, frozen=True):
    request_id: int


class Shutdown(msgspec.Struct, tag=True, frozen=True):
    """Leave after the current step; the exit code is 0."""


ToWorker = GenerateRequest | Abort | Shutdown

# ---- worker -> front end


class LoadProgress(msgspec.Struct, tag=True, frozen=True):
    stage: str  # "loading weights", "warming up", ...
    done: int
    total: int


class LoadFailed(msgspec.Struct, tag=True, frozen=True):
    """The model cannot be served; the worker exits with code 1 after sending this."""

    message: str  # one line, fit to show to a user


class MemoryLimits(msgspec.Struct, frozen=True):
    """Bytes that a worker keeps to."""

    usable: int  # what the device could give
    limit: int  # weights, pages, activations and buffers kept for reuse together
    activations: int  # measured: what a step needs beside weights and pages
    cache: int  # freed buffers that MLX keeps for reuse
    wired: int  # that macOS keeps resident; 0 elsewhere


class Abilities(msgspec.Struct, frozen=True):
    """What requests may ask of a model beside tokens, and what it does without."""

    grammars: bool = False
    hidden_size: int = 0  # of the vectors that prompts can become; 0: they cannot
    num_dropped_kernels: int = 0  # that compute something wrong here; notes say which


class StateSlots(msgspec.Struct, frozen=True):
    """The slots for states, of models with recurrent layers."""

    num_slots: int = 0
    nbytes: int = 0  # of all of them


class Ready(msgspec.Struct, tag=True, frozen=True):
    """The worker has warmed up and takes requests."""

    architecture: str  # config.json's model_type
    device: str  # "metal", "cuda" or "cpu"
    dtype: str  # of the weights, e.g. "float32"
    vocab_size: int
    max_model_len: int  # prompt + output tokens one request may use
    max_num_seqs: int
    block_size: int
    num_blocks: int
    weight_bytes: int
    kv_cache_bytes: int
    states: StateSlots = StateSlots()
    num_window_blocks: int = 0  # of layers with sliding windows, if the model has some
    notes: list[str] = []  # facts worth logging, e.g. which BLAS is in use
    abilities: Abilities = Abilities()
    limits: MemoryLimits | None = None


class TokenLogprobs(msgspec.Struct, array_like=True, frozen=True):
    """Natural logarithms of probabilities, from the model's own logits: nothing that a request
    sets is in them, not even its temperature."""

    logprob: float  # of the token itself
    top_ids: list[int] = []  # the likeliest tokens, best first
    top_logprobs: list[float] = []


class TokenOutput(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """New tokens of one request. The last one carries a finish reason.

    A stop token that ends the sequence is included, so ``len(token_ids)`` sums to the usage count.
    """

    request_id: int
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0  # prompt tokens served from the prefix cache
    error: str | None = None  # set with finish_reason "error"
    # With finish_reason "stop": the last token is no stop token but completes what a grammar wants.
    ends_with_text: bool = False
    logprobs: list[TokenLogprobs] = []  # of each of token_ids, where the request asks for them
    # With the first token: of each prompt token but the first, where the request asks for them.
    prompt_logprobs: list[TokenLogprobs] = []
    queue_seconds: float = 0.0  # from the request's arrival to its first step
    # With finish_reason "stop" and no token, where the request asks for it: float32, little-endian.
    vector: bytes = b""


class PoolStats(msgspec.Struct, frozen=True):
    """Counts of a pool other than that of KV blocks."""

    used: int
    cached: int  # what nobody uses and others may begin with
    free: int


class Histogram(msgspec.Struct, array_like=True, frozen=True):
    """Values since the worker began: ``counts`` between bounds, one more above the last one."""

    counts: list[int]
    total: float  # the sum of the values


STEP_SECONDS_BOUNDS = (
    *(0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075),
    *(0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0),
)
STEP_TOKENS_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
BLOCK_SECONDS_BOUNDS = (
    *(0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0, 4 * 3600.0),
    24 * 3600.0,
)


class StepStats(msgspec.Struct, frozen=True):
    """Seconds of the serving thread by what it did, and each step's duration and tokens."""

    schedule_seconds: float
    build_seconds: float
    wait_seconds: float  # for the device
    emit_seconds: float
    seconds: Histogram  # by STEP_SECONDS_BOUNDS
    tokens: Histogram  # by STEP_TOKENS_BOUNDS


class Lookups(msgspec.Struct):
    """What the prefix cache was asked for and gave, in prompt tokens, each counted once for a
    request.

    Attributes:
        queries: looked up.
        hits: of those, found.
        missed_evicted: in blocks that had been evicted.
        missed_new: in blocks that had never been cached.
        missed_tail: behind the last full block, or the last token.
        missed_state, missed_window: whose pages were found, but no state of recurrent layers
            behind them, or no whole window.
    """

    queries: int = 0
    hits: int = 0
    missed_evicted: int = 0
    missed_new: int = 0
    missed_tail: int = 0
    missed_state: int = 0
    missed_window: int = 0


class CacheStats(msgspec.Struct, frozen=True):
    """What the prefix cache has done, and how long blocks stay in it."""

    lookups: Lookups
    evictions: int  # blocks
    lifetimes: Histogram  # seconds from a block's completion to its eviction
    idle_times: Histogram  # seconds from its last use to its eviction


class WorkerStats(msgspec.Struct, frozen=True):
    """One consistent snapshot of the worker, taken between two steps."""

    requests_running: int
    requests_waiting: int
    blocks_used: int
    blocks_cached: int
    blocks_free: int
    memory_active: int  # bytes, as MLX counts them
    memory_cache: int
    memory_peak: int
    steps: int
    preemptions: int
    memory_faults: int  # steps that the device had no memory for
    cache: CacheStats
    step: StepStats
    states: PoolStats | None = None  # slots, of models with recurrent layers
    windows: PoolStats | None = None  # blocks, of layers with sliding windows


class StepOutput(msgspec.Struct, tag=True, frozen=True):
    """Every new token of one step, in one frame."""

    outputs: list[TokenOutput]
    stats: WorkerStats | None = None  # sent at most every few steps, and when the worker goes idle


FromWorker = LoadProgress | LoadFailed | Ready | StepOutput

encode = msgspec.msgpack.Encoder().encode
decode_to_worker = msgspec.msgpack.Decoder(ToWorker).decode
decode_from_worker = msgspec.msgpack.Decoder(FromWorker).decode
