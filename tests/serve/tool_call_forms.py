"""One tool call in the form of each family, and a grammar that texts can be walked through."""

from __future__ import annotations

from typing import Any

import msgspec
from grammar_walk import EOS, may_end, small_tokenizer
from tokenizers import AddedToken, Tokenizer

from quire.engine.errors import GrammarError
from quire.engine.grammar import GrammarCompiler
from quire.engine.grammar_tokens import make_tokenizer
from quire.serve.grammar_check import Checker, CheckRequest, Tool, Tools
from quire.serve.lark import markers_of
from quire.serve.tool_grammar import CallRules

MARKERS = {
    "qwen_xml": ["<tool_call>", "</tool_call>"],
    "hermes": ["<tool_call>", "</tool_call>"],
    "granite3": ["<|tool_call|>"],
    "gemma4": ["<|tool_call>", "<tool_call|>", '<|"|>'],
    "glm": [
        "<tool_call>",
        "</tool_call>",
        "<arg_key>",
        "</arg_key>",
        "<arg_value>",
        "</arg_value>",
    ],
    "minimax": ["<minimax:tool_call>", "</minimax:tool_call>"],
    "kimi_k2": [
        *("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>"),
        *("<|tool_call_argument_begin|>", "<|tool_call_end|>"),
    ],
    "kimi_k3": ["<|open|>", "<|close|>", "<|sep|>"],
    "deepseek": [
        *("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>"),
        *("<｜tool▁call▁end｜>", "<｜tool▁sep｜>"),
    ],
    "deepseek_dsml": ["｜DSML｜"],
    "mistral": ["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"],
    "llama3": ["<|python_tag|>"],
    "pythonic": ["<|tool_call_start|>", "<|tool_call_end|>"],
    "harmony": ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>"],
}

# One call f(s="a <b>", n=1), and one g() where a second may follow: what opens, what it is, what
# stands between two, what closes.
F_ARGUMENTS = '{"s": "a <b>", "n": 1}'
FORMS: dict[str, tuple[str, str, str, str, str]] = {
    "qwen_xml": (
        "<tool_call>\n",
        "<function=f>\n<parameter=s>\na <b>\n</parameter>\n"
        "<parameter=n>\n1\n</parameter>\n</function>\n",
        "</tool_call>\n<tool_call>\n",
        "<function=g>\n</function>\n",
        "</tool_call>",
    ),
    "hermes": (
        "<tool_call>\n",
        '{"name": "f", "arguments": ' + F_ARGUMENTS + "}",
        "\n</tool_call>\n<tool_call>\n",
        '{"name": "g", "arguments": {}}',
        "\n</tool_call>",
    ),
    "granite3": (
        "<|tool_call|>[",
        '{"name": "f", "arguments": ' + F_ARGUMENTS + "}",
        ", ",
        '{"name": "g", "arguments": {}}',
        "]",
    ),
    "gemma4": (
        "<|tool_call>call:",
        'f{n:1,s:<|"|>a <b><|"|>}',
        "<tool_call|><|tool_call>call:",
        "g{}",
        "<tool_call|>",
    ),
    "glm": (
        "<tool_call>",
        "f\n<arg_key>s</arg_key>\n<arg_value>a <b></arg_value>\n"
        "<arg_key>n</arg_key><arg_value>1</arg_value>",
        "</tool_call><tool_call>",
        "g",
        "</tool_call>",
    ),
    "minimax": (
        "<minimax:tool_call>\n",
        '<invoke name="f">\n<parameter name="s">a <b></parameter>\n'
        '<parameter name="n">1</parameter>\n</invoke>\n',
        "",
        '<invoke name="g">\n</invoke>\n',
        "</minimax:tool_call>",
    ),
    "kimi_k2": (
        "<|tool_calls_section_begin|>",
        f"<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{F_ARGUMENTS}<|tool_call_end|>",
        "",
        "<|tool_call_begin|>functions.g:12<|tool_call_argument_begin|>{}<|tool_call_end|>",
        "<|tool_calls_section_end|>",
    ),
    "kimi_k3": (
        "<|open|>tools<|sep|>",
        '<|open|>call tool="f" index="1"<|sep|>'
        '<|open|>argument key="s" type="string"<|sep|>a <b><|close|>argument<|sep|>'
        '<|open|>argument key="n" type="number"<|sep|>1<|close|>argument<|sep|>'
        "<|close|>call<|sep|>",
        "",
        '<|open|>call tool="g" index="2"<|sep|><|close|>call<|sep|>',
        "<|close|>tools<|sep|>",
    ),
    "deepseek": (
        "<｜tool▁calls▁begin｜>",
        f"<｜tool▁call▁begin｜>f<｜tool▁sep｜>{F_ARGUMENTS}<｜tool▁call▁end｜>",
        "",
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>g\n```json\n{}\n```<｜tool▁call▁end｜>",
        "<｜tool▁calls▁end｜>",
    ),
    "deepseek_dsml": (
        "<｜DSML｜function_calls>\n",
        '<｜DSML｜invoke name="f">\n'
        '<｜DSML｜parameter name="s" string="true">a <b></｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="n" string="false">1</｜DSML｜parameter>\n</｜DSML｜invoke>\n',
        "",
        '<｜DSML｜invoke name="g">\n</｜DSML｜invoke>\n',
        "</｜DSML｜function_calls>",
    ),
    "mistral": (
        "[TOOL_CALLS]",
        f"f[ARGS]{F_ARGUMENTS}",
        "[TOOL_CALLS]",
        "g[CALL_ID]abc123456[ARGS]{}",
        "",
    ),
    "pythonic": ("<|tool_call_start|>[", 'f(s="a <b>", n=1)', ", ", "g()", "]<|tool_call_end|>"),
}
# Families that write one call at most.
SINGLE = {
    "llama3": '{"name": "f", "parameters": ' + F_ARGUMENTS + "}",
    "harmony": "<|channel|>commentary to=functions.f <|constrain|>json<|message|>" + F_ARGUMENTS,
}

PARAMETERS: dict[str, dict[str, Any]] = {
    "f": {
        "type": "object",
        "properties": {"s": {"type": "string"}, "n": {"type": "integer"}},
        "required": ["s", "n"],
        "additionalProperties": False,
    },
    "g": {"type": "object", "properties": {}, "additionalProperties": False},
}


class Model:
    """A tokenizer with a family's markers, or with all of them as text."""

    def __init__(self, family: str, markers: list[str] | None = None) -> None:
        self.tokenizer = Tokenizer.from_str(small_tokenizer().to_str())
        texts = MARKERS[family] if markers is None else markers
        self.tokenizer.add_tokens([AddedToken(text, special=True) for text in texts])
        table = make_tokenizer(self.tokenizer.to_str(), [self.tokenizer.token_to_id(EOS)])
        self.checker = Checker(table, markers_of(self.tokenizer))
        self.compiler = GrammarCompiler(table, threads=1)

    def grammar(
        self, rules: CallRules, tools: list[Tool], instead: CheckRequest | None = None
    ) -> str:
        text = msgspec.json.encode(Tools(rules, tools)).decode()
        return self.checker.build(CheckRequest("tools", text, instead=instead))

    def takes(self, grammar: str, text: str) -> bool:
        """Whether a text may be the whole output."""
        state = self.compiler.new_state(self.compiler.compile(grammar).result())
        try:
            for token in self.tokenizer.encode(text).ids:
                state.accept(token)
        except GrammarError:
            return False
        return may_end(state, self.compiler)


def tools(*names: str, strict: bool = True) -> list[Tool]:
    return [Tool(name, PARAMETERS[name], strict) for name in names]


def one_call(family: str) -> str:
    if family in SINGLE:
        return SINGLE[family]
    opener, first, _, _, closer = FORMS[family]
    return opener + first + closer


def with_string_for_integer(text: str) -> str:
    """The same call with n=x."""
    for found, wrong in (
        ('"n": 1', '"n": "x"'),
        ("n=1", 'n="x"'),
        ("n:1", 'n:<|"|>x<|"|>'),
        ("\n1\n", "\nx\n"),
        (">1<", ">x<"),
    ):
        if found in text:
            return text.replace(found, wrong)
    raise AssertionError(text)
