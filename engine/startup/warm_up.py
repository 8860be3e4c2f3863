"""Steps run before serving, so that nothing is run for the first time later."""

from __future__ import annotations

import statistics
import time

import mlx.core as mx

from quire.engine.engine import Engine
from quire.engine.memory.budget import DeviceName
from quire.engine.messages import GenerateRequest, Pooling, SamplingParams

_SHORT_PROMPTS = 64, 12  # tokens
# Products of quantised weights differ with every 8 rows up to 32, others with powers of two.
_DECODES = (4, 8, 16, 24, 32, 64, 128, 256)
# In longer steps it hardly shows that a library chooses and loads a product for their size.
_MAX_SIZED_ROWS = 512
_TIMED_STEPS = 20
_TIMED_DECODES = 32  # rows
_TIMED_PROMPTS = 3
_MIN_MIXED_TOKENS = 128
_MIXED_STEP = 64  # tokens


def measure_activations(engine: Engine, prompt_length: int, vocab_size: int) -> int:
    """Bytes that a step needs on top of weights and pages.

    Args:
        prompt_length: tokens of the longest step.

    Raises:
        MemoryError: the device has no memory for it.
    """
    mx.synchronize()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    # A shorter step that goes whole may need more than a long one in pieces.
    for length in {prompt_length, max(2, min(prompt_length, engine.model.whole_rows))}:
        run_full_steps(engine, length, vocab_size)
    if engine.stats().memory_faults:
        # The engine has gone on with shorter steps.
        raise MemoryError(f"no memory for a step of {prompt_length} tokens")
    return max(0, mx.get_peak_memory() - before)


def make_ready(
    engine: Engine, prompt_length: int, vocab_size: int, device: DeviceName
) -> int | None:
    """Run every kernel once, and compile the steps of decodes; the engine has only begun then.

    Returns:
        ``mixed_prompt_tokens`` of :class:`StepLimits`.
    """
    load = Load(engine, vocab_size)
    run_everything(load, prompt_length, device)
    return measure_mixed_tokens(load, prompt_length) if device == "cuda" else None


def run_everything(load: Load, prompt_length: int, device: DeviceName) -> None:
    """Run steps of all kinds. On CUDA a library chooses and loads a product for each number of
    rows, so all are run there."""
    engine = load.engine
    run_full_steps(engine, prompt_length, load.vocab_size)
    run_every_draw(load)
    run_pooling(load)
    run_every_kernel(load, prompt_length)
    longest = min(prompt_length, _MAX_SIZED_ROWS)
    sizes = engine.model.padded_sizes(engine.config.max_num_seqs, longest)
    run_decodes(load, sizes.decodes)
    if device == "cuda":
        for rows in sizes.mixed:
            load.submit(load.new_prompt(min(rows, longest)), 1)
            load.drain()


GREEDY = SamplingParams(temperature=0)


class Load:
    """Greedy requests for an engine that serves nobody yet."""

    def __init__(self, engine: Engine, vocab_size: int) -> None:
        self.engine = engine
        self.vocab_size = vocab_size
        self._request_id = 0

    def submit(
        self,
        prompt: list[int],
        max_tokens: int,
        sampling: SamplingParams = GREEDY,
        pooling: Pooling | None = None,
    ) -> None:
        self.engine.submit(
            GenerateRequest(self._request_id, prompt, max_tokens, sampling, pooling=pooling)
        )
        self._request_id += 1

    def drain(self) -> None:
        while self.engine.has_work:
            self.engine.step()

    def first_prompt(self, length: int) -> list[int]:
        """What :func:`run_full_steps` leaves in the cache."""
        return [i % self.vocab_size for i in range(length)]

    def new_prompt(self, length: int) -> list[int]:
        """One that is not cached: no two begin with the same two tokens."""
        size = self.vocab_size
        first, second = self._request_id % size, self._request_id // size % size
        return [first, second, *(3 * i % size for i in range(2, length))][:length]


def run_full_steps(engine: Engine, prompt_length: int, vocab_size: int) -> None:
    """Run two prompts of about ``prompt_length`` tokens and a few decodes of each."""
    for request_id, sampling in enumerate((SamplingParams(temperature=0), SamplingParams())):
        prompt = [(request_id + i) % vocab_size for i in range(prompt_length - request_id)]
        engine.submit(GenerateRequest(request_id, prompt, max_tokens=3, sampling=sampling))
    while engine.has_work:
        engine.step()


def run_every_draw(load: Load) -> None:
    """Sample in every way in which logits come to the sampler."""
    for temperature in (0.0, 1.0):
        for penalty in (0.0, 1.0):
            load.submit([1], 3, SamplingParams(temperature, presence_penalty=penalty))
            load.drain()


def run_pooling(load: Load) -> None:
    """Make vectors of prompts, if the model can."""
    if not load.engine.model.hidden_size:
        return
    for length in (1, _SHORT_PROMPTS[1]):
        load.submit(load.new_prompt(length), 0, pooling=Pooling("mean"))
        load.drain()


def run_every_kernel(load: Load, prompt_length: int) -> None:
    """Run steps of few decodes to many, with prompts that are new and that go on with others."""
    # Of an odd length, alone and beside a decode: long prompts that are not cached are put into
    # an order of their own. The contexts of short ones are not cut, and their rows may be few.
    length = max(2, prompt_length - 5)
    for each in (length, *(min(length, short) for short in _SHORT_PROMPTS)):
        load.submit(load.new_prompt(each), 1)
        load.drain()
    load.submit(load.new_prompt(1), 4)
    load.engine.step()
    load.submit(load.new_prompt(length - length // 3), 1)
    load.submit(load.new_prompt(max(2, length // 3)), 1)
    load.drain()
    most = most_decodes(load.engine)
    first = load.first_prompt(prompt_length)
    for count in [*(n for n in _DECODES if n < most), most]:
        for _ in range(count - 1):
            load.submit([1], 4)
        load.engine.step()
        load.submit(first, 2)
        load.drain()
        # Short decodes beside a long prompt.
        for _ in range(min(count, max(1, most - 1))):
            load.submit([1], 4)
        load.engine.step()
        load.submit(load.new_prompt(max(2, length // 3)), 1)
        load.drain()
        # Decodes that share all of it, and a prompt beside them.
        for _ in range(min(count, max(1, most - 1))):
            load.submit(first, 4)
        load.engine.step()
        load.submit(load.new_prompt(2), 1)
        load.drain()


def most_decodes(engine: Engine) -> int:
    """How many decodes of one prompt can run at once.

    In a model with states each takes a slot, and one more keeps the state behind the prompt that
    they share: without it each would compute the whole prompt anew.
    """
    most, slots = engine.config.max_num_seqs, engine.config.num_state_slots
    if engine.model.states is None or slots is None:
        return most
    return max(1, min(most, slots - 2))  # one slot holds what is empty


def run_decodes(load: Load, sizes: list[int]) -> None:
    """Compile and run a step of each number of decodes."""
    for rows in sizes:
        for _ in range(min(rows, load.engine.config.max_num_seqs)):
            load.submit([1], 3)
        # Their prompts are no form that will come again.
        load.engine.step()
        with load.engine.compiling_at_once():
            load.drain()


def measure_mixed_tokens(load: Load, prompt_length: int) -> int:
    """The prompt tokens that take about as long as a step of decodes.

    Beside decodes these hardly cost anything: such a step reads the weights, or waits for the host,
    while the device could compute. More of them make every stream wait.
    """
    prompts = []
    for _ in range(_TIMED_PROMPTS):
        load.submit(load.new_prompt(prompt_length), 1)
        start = time.perf_counter()
        load.drain()
        prompts.append(time.perf_counter() - start)
    for _ in range(min(load.engine.config.max_num_seqs, _TIMED_DECODES)):
        load.submit([1], 2 * _TIMED_STEPS)
    decodes = []
    while load.engine.has_work:
        start = time.perf_counter()
        load.engine.step()
        decodes.append(time.perf_counter() - start)
    # The first ones are not compiled yet, and in the last the rows run out.
    decode = statistics.median(decodes[_TIMED_STEPS // 2 : 3 * _TIMED_STEPS // 2])
    tokens = int(prompt_length * decode / statistics.median(prompts))
    return max(_MIN_MIXED_TOKENS, tokens // _MIXED_STEP * _MIXED_STEP)
