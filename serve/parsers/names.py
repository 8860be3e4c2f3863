"""Families and switches by name, for settings: this module imports nothing that takes time."""

from __future__ import annotations

from typing import Final

# "auto" infers the family from the chat template; "none" leaves the text alone.
TOOL_PARSERS: Final = (
    "auto",
    "none",
    "deepseek",
    "deepseek_dsml",
    "gemma4",
    "glm",
    "granite3",
    "harmony",
    "hermes",
    "kimi_k2",
    "kimi_k3",
    "llama3",
    "minimax",
    "mistral",
    "pythonic",
    "qwen_xml",
)
REASONING_PARSERS: Final = (
    "auto",
    "none",
    "gemma4",
    "harmony",
    "kimi_k3",
    "mistral",
    "seed",
    "think",
)

# Variables of chat templates that change how the model reasons, nothing else.
SWITCHES: Final = (
    "enable_thinking",
    "thinking",
    "preserve_thinking",
    "clear_thinking",
    "truncate_history_thinking",
    "reasoning_effort",
    "thinking_effort",
    "thinking_budget",
)
