"""``quire estimate``: whether a model fits this machine, or another, before anything is loaded."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from quire.engine.memory.budget import DEFAULT_FRACTION, SMALLEST_STEP, STEP_TOKENS, working_set
from quire.engine.memory.budget import DeviceName as Device
from quire.engine.memory.host import total_memory
from quire.serve.memory_plan import DEFAULT_CONTEXT, Memory, Verdict, judge, memory
from quire.serve.model_facts import Bits, ModelFacts, facts_from_hub, read_facts
from quire.serve.model_files import check_folder, is_hub_name, local_folder, resolve_model
from quire.serve.served_model import ModelFilesError
from quire.serve.setting_values import parse_size
from quire.serve.settings import SettingsError

_DOES_NOT_FIT = 3  # the exit code
_BITS: tuple[Bits, ...] = (16, 8, 4)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="folder or Hugging Face name; default: the demo"
    )
    parser.add_argument(
        "--ram", metavar="SIZE", help="memory of the Mac or GPU, e.g. 32GiB; default: this machine"
    )
    parser.add_argument("--context", type=int, metavar="N", help="tokens of one request")
    parser.add_argument(
        "--concurrency", type=int, default=1, metavar="N", help="requests of that length at a time"
    )
    parser.add_argument(
        "--device", choices=("metal", "cuda", "cpu"), help="default: metal on a Mac, else cpu"
    )
    parser.add_argument("--json", action="store_true", help="for programs")


def run(args: argparse.Namespace) -> int:
    """0 if it fits, 3 if it does not, 1 if the model's files cannot be read."""
    device: Device = args.device or ("metal" if sys.platform == "darwin" else "cpu")
    ram = _ram(args.ram, device)
    if args.concurrency < 1 or (args.context is not None and args.context < 1):
        raise SettingsError("--context and --concurrency must be at least 1")
    try:
        facts = _facts(args.model)
    except ModelFilesError as error:
        print(f"quire: error: {error}", file=sys.stderr)
        return 1
    context = args.context or min(facts.context or DEFAULT_CONTEXT, 4 * DEFAULT_CONTEXT)
    if facts.context is not None and context > facts.context:
        raise SettingsError(f"--context {context} is more than the model's {facts.context}")
    name = args.model or "the demo model"
    estimate = Estimate(name, facts, device, ram, context, args.concurrency)
    print(json.dumps(estimate.as_dict(), indent=1) if args.json else estimate.page())
    return _DOES_NOT_FIT if estimate.verdict.kind == "does not fit" else 0


def _ram(text: str | None, device: Device) -> int:
    if text is not None:
        try:
            return parse_size(text)
        except ValueError as error:
            raise SettingsError(f"--ram {error}, not {text!r}") from error
    if device == "cuda":
        raise SettingsError("--device cuda needs --ram with the memory of the GPU")
    return total_memory()


def _facts(model: str | None) -> ModelFacts:
    """Without downloading weights."""
    if model is None or not is_hub_name(model):
        return read_facts(resolve_model(model).path)
    folder = local_folder(model)
    try:
        check_folder(folder)
    except ModelFilesError:  # not here, or not all of it
        return facts_from_hub(model)
    return read_facts(folder)


@dataclass(frozen=True)
class Estimate:
    """One model on one machine. ``ram`` is in bytes, ``context`` in tokens of one request."""

    name: str
    facts: ModelFacts
    device: Device
    ram: int
    context: int
    concurrency: int

    @property
    def tokens(self) -> int:
        return self.context * self.concurrency

    @property
    def verdict(self) -> Verdict:
        return self._judge(None)

    @property
    def needs(self) -> Memory:
        """As the verdict says, or as asked if nothing fits."""
        verdict = self.verdict
        tokens = min(self.tokens, verdict.tokens or self.tokens)
        step = verdict.step_tokens or STEP_TOKENS[self.device]
        return memory(self.facts, self.device, tokens, step, None, self.concurrency)

    def choices(self) -> list[tuple[Bits, Verdict]]:
        """The verdict for each quantisation that mlx_lm.convert could make of the model."""
        return [(bits, self._judge(bits)) for bits in _BITS]

    def _judge(self, bits: Bits | None) -> Verdict:
        return judge(self.facts, self.device, self.ram, self.tokens, bits)

    def as_dict(self) -> dict[str, object]:
        return {
            "model": self.name,
            "device": self.device,
            "ram": self.ram,
            "working_set": working_set(self.ram, self.device),
            "context": self.context,
            "concurrency": self.concurrency,
            "parameters": self.facts.parameters,
            "bits": self.facts.bits,
            "needs": {**asdict(self.needs), "total": self.needs.total},
            "verdict": asdict(self.verdict),
            "quantisations": {str(bits): asdict(verdict) for bits, verdict in self.choices()},
        }

    def page(self) -> str:
        facts, needs, verdict = self.facts, self.needs, self.verdict
        usable = working_set(self.ram, self.device)
        kv_tokens = needs.kv_cache // max(1, needs.kv_per_token)
        step = verdict.step_tokens or STEP_TOKENS[self.device]
        rows = [
            (
                "model",
                f"{self.name}: {_count(facts.parameters)} weights of "
                f"{facts.bits} bits, {facts.layers} layers",
            ),
            ("weights", _size(needs.weights)),
            (
                "KV cache",
                f"{_size(needs.kv_cache)} for {kv_tokens:,} tokens "
                f"({_size(needs.kv_per_token)} each)",
            ),
            *self._other_layers(needs),
            ("activations", f"{_size(needs.activations)} for steps of {step} tokens"),
            (
                "together",
                f"{_size(needs.total)}; {self.device} may use {_size(usable)} of {_size(self.ram)}",
            ),
            ("verdict", self._advice()),
        ]
        lines = [f"{name:<12} {text}" for name, text in rows]
        lines.append("\nas           weights      tokens of context in all: by default, at most")
        for bits, other in self.choices():
            weights = memory(facts, self.device, 0, SMALLEST_STEP, bits).weights
            room = f"{other.by_default:,}, {other.most:,}" if other.most else "does not fit"
            note = " (tight)" if other.kind == "tight" else ""
            lines.append(f"{bits:>2} bits      {_size(weights):<12} {room}{note}")
        return "\n".join(lines)

    def _other_layers(self, needs: Memory) -> Iterator[tuple[str, str]]:
        """What does not grow with the context."""
        requests = "one request" if self.concurrency == 1 else f"{self.concurrency} requests"
        if needs.windows:
            window = self.facts.kept.window
            yield "windows", f"{_size(needs.windows)} for the last {window:,} tokens of {requests}"
        if needs.states:
            yield "states", f"{_size(needs.states)} for the recurrent layers of {requests}"

    def _advice(self) -> str:
        verdict = self.verdict
        if verdict.kind == "does not fit":
            smaller = [bits for bits, other in self.choices() if other.kind != "does not fit"]
            return "does not fit" + (f"; with {max(smaller)} bits it would" if smaller else "")
        by_default = (
            f"by default a server has room for {verdict.by_default:,} tokens of all requests "
            "together"
            if verdict.by_default
            else "by default a server does not start"
        )
        if verdict.kind == "tight":
            return (
                f"tight: {' '.join(self._settings())}, {verdict.tokens:,} tokens of context in "
                f"all; {by_default}"
            )
        if verdict.kv_cache_memory is not None:
            return f"fits with {' '.join(self._settings())}; {by_default}"
        if verdict.most > verdict.by_default:
            by_default += f", with --kv-cache-memory for up to {verdict.most:,}"
        return f"fits; {by_default}"

    def _settings(self) -> Iterator[str]:
        """Flags with which the verdict holds."""
        verdict = self.verdict
        share = self.needs.weights / working_set(self.ram, self.device)
        if share > DEFAULT_FRACTION:  # beyond which no weights are loaded
            yield f"--memory-fraction {math.ceil(100 * share) / 100}"
        if verdict.kind == "tight":
            yield f"--max-num-batched-tokens {verdict.step_tokens}"
        yield f"--kv-cache-memory {(verdict.kv_cache_memory or 0) >> 20}MiB"


def _size(size: int) -> str:
    if size < 2**20:
        return f"{size / 2**10:.1f} KiB"
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"


def _count(number: int) -> str:
    return f"{number / 1e6:,.0f} million" if number >= 10**7 else f"{number:,}"
