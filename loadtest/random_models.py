"""Models in published sizes with random weights, made in the device's memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Self

from quire.loadtest.published import published

if TYPE_CHECKING:
    import mlx.nn as nn

    from quire.engine.startup.loader import LoadedModel


class Model(NamedTuple):
    name: str
    layers: int | None
    bits: int | None

    @classmethod
    def parse(cls, text: str) -> Self:
        name, _, rest = text.partition(":")
        layers, _, bits = rest.partition(":")
        model = cls(name, int(layers) if layers else None, int(bits) if bits else None)
        published(model.name, model.layers)
        return model

    def __str__(self) -> str:
        layers = published(self.name, self.layers)["num_hidden_layers"]
        return f"{self.name}, {layers} layers" + (f", {self.bits} bits" if self.bits else "")


def model_of(config: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """mlx-lm's model with weights as its classes draw them, and the configuration of its folder."""
    from mlx_lm.utils import _get_classes

    if config["model_type"].startswith("qwen3_5"):  # mlx-lm knows the text model as a part
        config = {"model_type": config["model_type"].removesuffix("_text"), "text_config": config}
    model_class, args_class = _get_classes(config)
    return model_class(args_class.from_dict(config)), config


def make_model(model: Model) -> LoadedModel:
    """Random weights in the device's memory, as mlx-lm's classes draw them; float32 on a CPU."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten, tree_map_with_path

    from quire.engine.startup.loader import LoadedModel

    config = published(model.name, model.layers)
    context = config.get("max_position_embeddings", 131_072)
    made, config = model_of(config)
    keep = getattr(made, "cast_predicate", lambda _: True)

    def cast(path: str, array: mx.array) -> mx.array:
        if mx.issubdtype(array.dtype, mx.floating) and keep(path):
            return array.astype(floats())
        return array

    made.update(tree_map_with_path(cast, made.parameters()))
    if model.bits:
        own = getattr(made, "quant_predicate", None) or (lambda path, module: True)

        def wanted(path: str, module: Any) -> Any:
            matrix = hasattr(module, "to_quantized") and module.weight.shape[-1] % 64 == 0
            return matrix and own(path, module)

        nn.quantize(made, 64, model.bits, class_predicate=wanted)
    made.eval()
    arrays = [array for _, array in tree_flatten(made.parameters())]
    for array in arrays:
        mx.eval(array)
    mx.clear_cache()
    total = sum(array.nbytes for array in arrays)
    dtype = f"{model.bits}-bit" if model.bits else str(floats()).removeprefix("mlx.core.")
    return LoadedModel(made, config["model_type"], context, dtype, total, widened=False)


def floats() -> Any:
    """The dtype that a model's values have on this device."""
    import mlx.core as mx

    return mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16
