"""A model folder's tokenizer, template and EOS ids."""

import asyncio
import json
from pathlib import Path

import pytest
from fake_backend import EOS, byte_level_tokenizer

from quire.engine.messages import SamplingParams
from quire.serve.openai_protocol import UserMessage
from quire.serve.served_model import ModelFilesError, load_served_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    byte_level_tokenizer(["</s>"]).save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write(folder: Path, name: str, content: object) -> None:
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def rendered(folder: Path) -> str | None:
    template = load_served_model(folder, "m").chat_template

    async def render() -> str:
        async with template:
            return (await template.render([UserMessage(content="hi")])).text

    return template and asyncio.run(render())


def test_a_bare_tokenizer_is_enough(folder):
    model = load_served_model(folder, "owner/name")
    assert model.id == "owner/name"
    assert model.chat_template is None
    assert model.eos_token_ids == ()
    assert model.encoder.tokenizer.encode("hi").ids


def test_truncation_and_padding_of_the_file_are_dropped(folder):
    tokenizer = byte_level_tokenizer()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert len(load_served_model(folder, "m").encoder.tokenizer.encode("abcd").ids) == 4


@pytest.mark.parametrize(
    ("files", "ids"),
    [
        ({"generation_config.json": {"eos_token_id": [1, 2]}, "config.json": {}}, (1, 2)),
        ({"config.json": {"eos_token_id": 3}}, (3,)),
        ({"generation_config.json": {}, "config.json": {"text_config": {"eos_token_id": 4}}}, (4,)),
        ({"tokenizer_config.json": {"eos_token": "</s>"}}, (257,)),
        ({"tokenizer_config.json": {"eos_token": {"content": EOS}}}, (256,)),
        ({"tokenizer_config.json": {"eos_token": "unheard of"}}, ()),
    ],
)
def test_eos_ids_come_from_the_first_file_that_names_any(folder, files, ids):
    for name, content in files.items():
        write(folder, name, content)
    assert load_served_model(folder, "m").eos_token_ids == ids


def test_the_template_file_wins_over_the_config(folder):
    write(folder, "tokenizer_config.json", {"chat_template": "config", "bos_token": "<s>"})
    assert rendered(folder) == "config"
    write(folder, "chat_template.jinja", "{{ bos_token }}file")
    assert rendered(folder) == "<s>file"


def test_the_default_of_several_templates_is_used(folder):
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    write(folder, "tokenizer_config.json", {"chat_template": named})
    assert rendered(folder) == "d"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "{}"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", {"chat_template": 3}),
        ("tokenizer_config.json", {"chat_template": ["x"]}),
        ("generation_config.json", "nonsense"),
        ("config.json", {"eos_token_id": ["x"]}),
        ("chat_template.jinja", "{% if %}"),
    ],
)
def test_a_broken_file_is_named(folder, name, content):
    write(folder, name, content)
    with pytest.raises(ModelFilesError, match=name) as caught:
        load_served_model(folder, "m")
    assert "\n" not in str(caught.value)


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(ModelFilesError, match=r"tokenizer\.json is missing"):
        load_served_model(tmp_path, "m")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, SamplingParams()),
        ({}, SamplingParams()),
        ({"do_sample": False}, SamplingParams(temperature=0.0)),
        (
            {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95},
            SamplingParams(temperature=0.6, top_k=20, top_p=0.95),
        ),
        ({"temperature": None, "min_p": 0.1}, SamplingParams(min_p=0.1)),
    ],
)
def test_sampling_defaults_come_from_the_model(folder, config, expected):
    if config is not None:
        (folder / "generation_config.json").write_text(json.dumps(config))
    assert load_served_model(folder, "m").default_sampling == expected


@pytest.mark.parametrize("config", [{"temperature": "hot"}, {"top_p": 3}, {"temperature": -1}])
def test_impossible_sampling_defaults_name_the_file(folder, config):
    (folder / "generation_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelFilesError, match="generation_config"):
        load_served_model(folder, "m")
