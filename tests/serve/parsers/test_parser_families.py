"""Which family a model belongs to, and what its generation prompt says of the first words."""

from __future__ import annotations

import pytest
from serve.parsers.support import added_tokens
from tokenizers import Tokenizer, models

from quire.serve.parsers.families import (
    HARMONY,
    REASONING_TAGS,
    TOOL_SYNTAXES,
    Family,
    ParserFactory,
    infer_family,
)
from quire.serve.parsers.names import REASONING_PARSERS, TOOL_PARSERS

PLAIN = Tokenizer(models.BPE())


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("<tool_call>\\n<function=' + name + '> <think>", Family("qwen_xml", "think")),
        ('<tool_call>\\n{"name": "', Family("hermes", "none")),
        ("'<|tool_call>call:' ~ name <tool_call|> <|channel>thought", Family("gemma4", "gemma4")),
        ("<|start|>assistant<|channel|>final<|message|>", Family("harmony", "harmony")),
        ("<tool_call>{{ name }}<arg_key></think>", Family("glm", "think")),
        ("<minimax:tool_call><think>", Family("minimax", "think")),
        ("<|tool_calls_section_begin|></think>", Family("kimi_k2", "think")),
        ("<|open|>think<|sep|>", Family("kimi_k3", "kimi_k3")),
        ("<｜tool▁calls▁begin｜></think>", Family("deepseek", "think")),
        ("<｜DSML｜function_calls></think>", Family("deepseek_dsml", "think")),
        ("[TOOL_CALLS][THINK]", Family("mistral", "mistral")),
        ("<|start_header_id|>ipython \"parameters\": ", Family("llama3", "none")),
        ("<|tool_call_start|>", Family("pythonic", "none")),
        ("<|tool_call|>", Family("granite3", "none")),
        ("{{ message.content }}", Family("none", "none")),
        (None, Family("none", "none")),
    ],
)  # fmt: skip
def test_the_template_names_the_family(template: str | None, expected: Family) -> None:
    assert infer_family(template, PLAIN) == expected


def test_the_vocabulary_names_it_where_the_template_does_not() -> None:
    tokenizer = added_tokens(["<|tool_call_start|>", "<|tool_call_end|>"], special=True)
    assert infer_family("{{ message.content }}", tokenizer).tools == "pythonic"


def test_settings_override_the_template() -> None:
    found = infer_family("<tool_call><think>", PLAIN, tools="mistral", reasoning="none")
    assert found == Family("mistral", "none")


@pytest.mark.parametrize(
    ("reasoning", "prompt", "expected"),
    [
        ("think", "<|im_start|>assistant\n<think>\n", True),
        ("think", "<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("think", "<|im_start|>assistant\n", False),
        ("think", "<｜Assistant｜></think>", False),
        ("gemma4", "<start_of_turn>model\n<|channel>thought\n<channel|>", False),
        ("kimi_k3", "<|open|>think<|sep|>", True),
        ("none", "<think>\n", False),
    ],
)
def test_the_generation_prompt_opens_reasoning_or_not(
    reasoning: str, prompt: str, expected: bool
) -> None:
    made = ParserFactory(Family("none", reasoning), None)
    assert made.starts_in_reasoning(prompt) is expected


def test_settings_know_every_family() -> None:
    assert set(TOOL_PARSERS) == {"auto", "none", HARMONY, *TOOL_SYNTAXES}
    assert set(REASONING_PARSERS) == {"auto", "none", HARMONY, *REASONING_TAGS}
