"""The reference models are fit to be compared with: they build, and greedy decoding is decisive."""

import importlib.util
import pkgutil
import random
from pathlib import Path

import mlx.core as mx
import mlx_lm.models
import pytest
from mlx.utils import tree_flatten
from model_zoo import FAMILIES, UNPAGED, UNRUNNABLE, build, reference_generate
from model_zoo_base import VOCAB
from model_zoo_unpaged import UNPAGED_FAMILIES


def random_prompt(length: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(VOCAB) for _ in range(length)]


def test_every_model_file_is_listed_once():
    files = set()
    for module in pkgutil.iter_modules(mlx_lm.models.__path__):
        spec = importlib.util.find_spec(f"mlx_lm.models.{module.name}")
        assert spec is not None
        assert spec.origin is not None
        if "\nclass Model(" in Path(spec.origin).read_text():
            files.add(module.name)
    served = {family.module for family in FAMILIES.values()}
    refused = set(UNPAGED_FAMILIES)
    assert not served & refused
    assert served | refused == files


def test_equal_seeds_give_equal_weights():
    first, second, other = build("qwen2"), build("qwen2"), build("qwen2", seed=1)
    weights = dict(tree_flatten(first.parameters()))
    for path, value in tree_flatten(second.parameters()):
        assert mx.array_equal(value, weights[path])
    assert not mx.array_equal(other.lm_head.weight, first.lm_head.weight)


@pytest.mark.models
@pytest.mark.parametrize("name", [*FAMILIES, *sorted(set(UNPAGED) - UNRUNNABLE)])
def test_family_generates(name: str):
    model = build(name)
    dtypes = {value.dtype for _, value in tree_flatten(model.parameters())}
    assert dtypes <= {mx.float32, mx.uint32}
    assert mx.isfinite(model(mx.array([random_prompt(40)]))).all()

    # The prompts end alike, so what differs reached the last position through attention.
    prompts = [[*random_prompt(59, seed), 7] for seed in range(3)]
    runs = [reference_generate(model, prompt, 16) for prompt in prompts]
    assert all(len(tokens) == len(gaps) == 16 for tokens, gaps in runs)
    assert len({tuple(tokens) for tokens, _ in runs}) == 3
    assert len({token for tokens, _ in runs for token in tokens}) >= 6
    gaps = sorted(gap for _, gaps in runs for gap in gaps)
    assert gaps[24] > 0.05, "most choices must be far from a tie"
