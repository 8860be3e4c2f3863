"""The demo model's tokenizer: byte-level BPE in which a digit and a space are tokens of their own.

A space never joins a word, so a word has the same tokens at the start of a reply, between quotes
and in the middle of a sentence. That makes exact copying learnable for a small model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
TOOL_CALL = "<tool_call>"
TOOL_CALL_END = "</tool_call>"
THINK = "<think>"
THINK_END = "</think>"

CHAT_TEMPLATE = """\
{%- macro text(content) -%}
{%- if content is string -%}{{ content | trim }}
{%- elif content -%}{%- for part in content -%}{{ part.text | trim }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- if enable_thinking is not defined -%}
{%- set enable_thinking = reasoning_effort is defined -%}
{%- endif -%}
{%- set ns = namespace(first=0, system="", asked=-1) -%}
{%- for message in messages -%}
{%- if message.role == "user" -%}{%- set ns.asked = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- if messages and messages[0].role in ["system", "developer"] -%}
{%- set ns.first = 1 -%}{%- set ns.system = text(messages[0].content) -%}
{%- endif -%}
{%- if tools or ns.system -%}
{{ "<|im_start|>system\\n" + ns.system }}
{%- if tools -%}
{{ ("\\n\\n" if ns.system else "") + "Tools:" }}
{%- for tool in tools -%}
{%- set function = tool.function if tool.function is defined else tool -%}
{%- set parameters = function.parameters or {} -%}
{%- set required = parameters.required or [] -%}
{{ "\\n" + function.name + "(" }}
{%- for name, schema in (parameters.properties or {}).items() -%}
{{ ("" if loop.first else ", ") + name + ("" if name in required else "?") + ": " }}
{{- schema.type if schema.type is string else "any" }}
{%- endfor -%}
{{ "): " + text(function.description) }}
{%- endfor -%}
{%- endif -%}
{{ "<|im_end|>\\n" }}
{%- endif -%}
{%- for message in messages[ns.first:] -%}
{%- set role = "system" if message.role == "developer" else message.role -%}
{{ "<|im_start|>" + role + "\\n" }}
{%- if message.reasoning_content and loop.index0 + ns.first > ns.asked -%}
{{ "<think>\\n" + text(message.reasoning_content) + "\\n</think>\\n\\n" }}
{%- endif -%}
{{ text(message.content) }}
{%- for call in message.tool_calls or [] -%}
{%- set tool_call = call.function if call.function is defined else call -%}
{{ ("\\n" if message.content or not loop.first else "") + "<tool_call>\\n" }}
{{- '{"name": "' + tool_call.name + '", "arguments": ' }}
{%- if tool_call.arguments is string -%}{{ tool_call.arguments }}
{%- else -%}{{ tool_call.arguments | tojson }}
{%- endif -%}
{{ "}\\n</tool_call>" }}
{%- endfor -%}
{{ "<|im_end|>\\n" }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ "<|im_start|>assistant\\n" + ("<think>\\n" if enable_thinking else "") }}
{%- endif -%}
"""

_WORDS = Regex(r"\p{L}+|\P{L}")


def build(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train the tokenizer on ``texts``; special tokens take the first ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_WORDS, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[
            AddedToken(END_OF_TEXT, special=True, normalized=False),
            AddedToken(IM_START, special=True, normalized=False),
            AddedToken(IM_END, special=True, normalized=False),
        ],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    add_marks(tokenizer)
    return tokenizer


def add_marks(tokenizer: Tokenizer) -> None:
    """Give ``tokenizer`` those marks of calls and thoughts that it lacks, with the next ids."""
    # Not special: text that parsers read, so decoding has to keep it.
    marks = (TOOL_CALL, TOOL_CALL_END, THINK, THINK_END)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in marks])


def save(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": IM_END,
        "pad_token": END_OF_TEXT,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
