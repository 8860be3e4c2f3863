"""A small model of a published kind: `python -m quire.loadtest.small_model DIR --like NAME`.

The layers of a model in :mod:`quire.loadtest.published` in their order, a few of them and narrow,
with random float32 weights and the byte-level tokenizer of `quire bench make-model`: what a CPU can
serve of an architecture that only a GPU runs at its size.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from quire.engine.startup.boot import prepare_mlx
from quire.loadtest.model_folder import row_scales
from quire.loadtest.published import PUBLISHED, published
from quire.loadtest.random_models import heads_of, model_of, write_files

_SMALL: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "vocab_size": 320,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 1,
    "head_dim": 64,
    "global_head_dim": 128,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "num_experts": 16,
    "n_routed_experts": 16,
    "num_local_experts": 16,
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 64,
    "mamba_num_heads": 8,
    "mamba_head_dim": 32,
    "ssm_state_size": 32,
    "n_groups": 2,
    "sliding_window": 128,
    "kv_lora_rank": 64,
}


def shrunk(name: str, layers: int) -> dict[str, Any]:
    """The configuration of the first ``layers`` layers, narrow.

    Raises:
        ValueError: there is no such model, or it has fewer layers.
    """
    config = published(name, layers)
    return config | {key: value for key, value in _SMALL.items() if key in config}


def write_model(folder: Path, config: dict[str, Any], seed: int = 0) -> None:
    """A model folder of this configuration. Raises FileExistsError if the folder is there."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    folder.mkdir(parents=True)
    mx.random.seed(seed)
    model, config = model_of(config)
    weights = {name: array.astype(mx.float32) for name, array in tree_flatten(model.parameters())}
    for name in heads_of(weights):
        weights[name] = weights[name] * mx.array(row_scales(weights[name].shape[0]))[:, None]
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    write_files(folder, config)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m quire.loadtest.small_model")
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--like", required=True, choices=tuple(PUBLISHED))
    parser.add_argument("--layers", type=int, default=8, help="the first so many (8)")
    args = parser.parse_args()
    prepare_mlx("cpu")
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    try:
        write_model(args.folder, shrunk(args.like, args.layers))
    except (ValueError, FileExistsError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
