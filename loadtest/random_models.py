"""Models in published sizes with random weights, made in the device's memory.

`python -m quire.loadtest.random_models DIR NAME[:LAYERS[:BITS]]` writes one to a folder, with the
byte-level tokenizer of `quire bench make-model`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from quire.engine.startup.boot import prepare_mlx
from quire.loadtest.model_folder import (
    CHAT_TEMPLATE,
    EOS_TOKEN_ID,
    row_scales,
    write_tokenizer,
)
from quire.loadtest.published import published

if TYPE_CHECKING:
    import mlx.nn as nn

    from quire.engine.startup.loader import LoadedModel

_GROUP_SIZE = 64
_MODES = ("mxfp4", "nvfp4", "mxfp8")


class Model(NamedTuple):
    name: str
    layers: int | None
    bits: str | None  # of a quantised weight, or the name of an MLX mode such as mxfp4

    @classmethod
    def parse(cls, text: str) -> Self:
        name, _, rest = text.partition(":")
        layers, _, bits = rest.partition(":")
        model = cls(name, int(layers) if layers else None, bits or None)
        published(model.name, model.layers)
        if bits and bits not in _MODES:
            int(bits)
        return model

    @property
    def weights(self) -> str | None:
        """What its weights are quantised to, in words."""
        return f"{self.bits} bits" if self.bits and self.bits not in _MODES else self.bits

    def __str__(self) -> str:
        layers = published(self.name, self.layers)["num_hidden_layers"]
        return f"{self.name}, {layers} layers" + (f", {self.weights}" if self.bits else "")

    def quantized(
        self, model: nn.Module, config: dict[str, Any]
    ) -> tuple[nn.Module, dict[str, Any]]:
        from mlx_lm.utils import quantize_model

        if self.bits in _MODES:
            model, config = quantize_model(model, config, None, None, self.bits)
        else:
            model, config = quantize_model(model, config, _GROUP_SIZE, int(self.bits or 0))
        return model, config


def model_of(config: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """mlx-lm's model with weights as its classes draw them, and the configuration of its folder."""
    from mlx_lm.utils import _get_classes

    if config["model_type"].startswith("qwen3_5"):  # mlx-lm knows the text model as a part
        config = {"model_type": config["model_type"].removesuffix("_text"), "text_config": config}
    model_class, args_class = _get_classes(config)
    return model_class(args_class.from_dict(config)), config


def build_model(model: Model) -> tuple[nn.Module, dict[str, Any]]:
    """Random weights in the device's memory, as mlx-lm's classes draw them, and the configuration
    of a folder that holds them; float32 on a CPU. What is likely to be said is printable."""
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_map_with_path

    made, config = model_of(published(model.name, model.layers))
    keep = getattr(made, "cast_predicate", lambda _: True)
    heads = heads_of(name for name, _ in tree_flatten(made.parameters()))

    def cast(path: str, array: mx.array) -> mx.array:
        if path in heads:
            array = array * mx.array(row_scales(array.shape[0]))[:, None]
        if mx.issubdtype(array.dtype, mx.floating) and keep(path):
            return array.astype(floats())
        return array

    made.update(tree_map_with_path(cast, made.parameters()))
    if model.bits:
        with redirect_stdout(sys.stderr):  # it says how many bits a weight has
            made, config = model.quantized(made, config)
    for _, array in tree_flatten(made.parameters()):  # one by one: those in full width are let go
        mx.eval(array)
    made.eval()
    mx.clear_cache()
    return made, config


def heads_of(names: Iterable[str]) -> set[str]:
    """The weights that logits are products with, among those of these names."""
    found = [*names]
    own = {name for name in found if "lm_head.weight" in name}
    return own or {name for name in found if "embed_tokens.weight" in name}


def make_model(model: Model) -> LoadedModel:
    """The same, as if it had been loaded."""
    from mlx.utils import tree_flatten

    from quire.engine.startup.loader import LoadedModel

    made, config = build_model(model)
    context = published(model.name, model.layers).get("max_position_embeddings", 131_072)
    total = sum(array.nbytes for _, array in tree_flatten(made.parameters()))
    dtype = model.weights or str(floats()).removeprefix("mlx.core.")
    return LoadedModel(made, config["model_type"], context, dtype, total, widened=False)


def write_files(folder: Path, config: dict[str, Any]) -> None:
    """All of a model's folder but its weights."""
    ends = {"eos_token_id": EOS_TOKEN_ID, "bos_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config | ends, indent=2))
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2))
    write_tokenizer(folder / "tokenizer.json")


def floats() -> Any:
    """The dtype that a model's values have on this device."""
    import mlx.core as mx

    return mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m quire.loadtest.random_models")
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("model", type=Model.parse, metavar="NAME[:LAYERS[:BITS]]")
    args = parser.parse_args()
    prepare_mlx()
    from mlx_lm.utils import save_model

    try:
        args.folder.mkdir(parents=True)
    except FileExistsError as error:
        parser.error(str(error))
    model, config = build_model(args.model)
    save_model(args.folder, model)
    write_files(args.folder, config)
    return 0


if __name__ == "__main__":
    sys.exit(main())
