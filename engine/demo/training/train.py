"""Train the demo model: ``python -m quire.engine.demo.training.train --out DIR``.

With ``--start FOLDER`` the training goes on from that model and its tokenizer, for what the corpus
has learnt since.

The model has a standard architecture of mlx-lm (Qwen3) and learns only what the assistant says.
AdamW with a linear warm-up and a cosine decay.
"""

from __future__ import annotations

import argparse
import json
import queue
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from quire.engine.startup.boot import prepare_mlx

if "mlx.core" not in sys.modules:
    prepare_mlx(settings=False)  # else a CPU is thirty times slower

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3
from tokenizers import Tokenizer

from quire.engine.demo.training import tokenizer as demo_tokenizer
from quire.engine.demo.training.corpus import conversations
from quire.engine.demo.training.encode import Encoder, batches

T = TypeVar("T")

VOCAB_SIZE = 1024
_TOKENIZER_TEXTS = 20_000  # conversations


def model_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """config.json of the demo model."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 192,
        "num_hidden_layers": 6,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "vocab_size": tokenizer.get_vocab_size(),
        "bos_token_id": None,
        "eos_token_id": tokenizer.token_to_id(demo_tokenizer.IM_END),
        "torch_dtype": "float32",
    }


def build_tokenizer(seed: int) -> Tokenizer:
    """A tokenizer trained on rendered conversations of the training half."""
    blank = Encoder(demo_tokenizer.build([], 0))
    texts = (blank.render(made) for made in conversations(seed, _TOKENIZER_TEXTS))
    return demo_tokenizer.build(texts, VOCAB_SIZE)


def load_weights(model: nn.Module, folder: Path) -> None:
    """Give ``model`` the weights in ``folder``; new tokens begin near the mean of the old."""
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    name = "model.embed_tokens.weight"
    rows = dict(tree_flatten(model.parameters()))[name].shape[0]
    known = weights[name]
    new = mx.broadcast_to(known.mean(axis=0), (rows - known.shape[0], known.shape[1]))
    weights[name] = mx.concatenate([known, new + mx.random.normal(new.shape) * known.std() / 10])
    model.load_weights(list(weights.items()))


def save(model: nn.Module, config: dict[str, Any], tokenizer: Tokenizer, folder: Path) -> None:
    """Write the files of a model folder as mlx-lm and Hugging Face lay it out."""
    demo_tokenizer.save(tokenizer, folder, config["max_position_embeddings"])
    generation = {
        "do_sample": False,
        "eos_token_id": [
            config["eos_token_id"],
            tokenizer.token_to_id(demo_tokenizer.END_OF_TEXT),
        ],
    }
    for name, content in (("config", config), ("generation_config", generation)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})


def _loss(model: nn.Module, ids: mx.array, learnt: mx.array) -> mx.array:
    logits = model(ids[:, :-1])
    losses = nn.losses.cross_entropy(logits, ids[:, 1:]) * learnt[:, 1:]
    mean: mx.array = losses.sum() / learnt[:, 1:].sum()
    return mean


def _ahead(items: Iterator[T], size: int) -> Iterator[T]:
    """``items``, made by a thread that keeps up to ``size`` of them ready."""
    ready: queue.Queue[T | Exception] = queue.Queue(size)

    def fill() -> None:
        try:
            for item in items:
                ready.put(item)
        except Exception as error:
            ready.put(error)

    threading.Thread(target=fill, daemon=True).start()
    while True:
        item = ready.get()
        if isinstance(item, Exception):
            raise item
        yield item


def train(args: argparse.Namespace) -> None:
    mx.random.seed(args.seed)
    if args.start:
        tokenizer = Tokenizer.from_file(str(args.start / "tokenizer.json"))
        demo_tokenizer.add_marks(tokenizer)
    else:
        tokenizer = build_tokenizer(args.seed)
    config = model_config(tokenizer)
    model = qwen3.Model(qwen3.ModelArgs.from_dict(config))
    if args.start:
        load_weights(model, args.start)
    count = sum(value.size for _, value in tree_flatten(model.parameters()))
    print(f"{count:,} parameters, {tokenizer.get_vocab_size()} tokens, {mx.default_device()}")

    warm_up = max(1, args.steps // 20)
    schedule = optim.join_schedules(
        [
            optim.linear_schedule(0.0, args.learning_rate, warm_up),
            optim.cosine_decay(args.learning_rate, args.steps - warm_up, args.learning_rate / 100),
        ],
        [warm_up],
    )
    optimizer = optim.AdamW(schedule, betas=[0.9, 0.98], weight_decay=args.weight_decay)
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state]
    loss_and_gradients = nn.value_and_grad(model, _loss)

    @partial(mx.compile, inputs=state, outputs=state)
    def step(ids: mx.array, learnt: mx.array) -> mx.array:
        loss: mx.array
        loss, gradients = loss_and_gradients(model, ids, learnt)
        gradients, _ = optim.clip_grad_norm(gradients, 1.0)
        optimizer.update(model, gradients)
        return loss

    made = batches(tokenizer, args.seed + 1, args.tokens, args.workers, args.longest, args.plain)
    source = _ahead(made, 16)
    began = last = time.perf_counter()
    pending: list[mx.array] = []
    for number in range(1, args.steps + 1):
        ids, learnt = next(source)
        pending.append(step(mx.array(ids), mx.array(learnt)))
        # Two steps in flight: the host builds one while the device runs the other.
        mx.async_eval(pending[-1], state)
        if len(pending) > 1:
            mx.eval(pending[-2])
        if number % args.report == 0 or number == args.steps:
            mean = mx.mean(mx.stack(pending)).item()
            now = time.perf_counter()
            each = (now - last) / len(pending) * 1000
            print(
                f"step {number} loss {mean:.4f} {each:.1f} ms/step {now - began:.0f} s", flush=True
            )
            last = now
            pending = []
        if number % args.save_every == 0 or number == args.steps:
            save(model, config, tokenizer, args.out)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m quire.engine.demo.training.train", description=__doc__
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the model's files")
    parser.add_argument("--start", type=Path, help="folder of a model to go on from")
    parser.add_argument("--steps", type=int, default=17_500)
    parser.add_argument("--tokens", type=int, default=32_768, help="per step, with the padding")
    parser.add_argument("--longest", type=int, default=2048, help="tokens of a conversation")
    parser.add_argument(
        "--plain", type=float, default=1.0, help="share of chats without thoughts, schemas, tools"
    )
    parser.add_argument("--learning-rate", type=float, default=2.5e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=4, help="processes that make batches")
    parser.add_argument("--report", type=int, default=100, help="steps between two lines")
    parser.add_argument("--save-every", type=int, default=1000, help="steps between two saves")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
