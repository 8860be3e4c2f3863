"""Answers of every family and what they mean: (name, family, text, expectation)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Vector:
    name: str
    family: str
    text: str
    calls: tuple[tuple[str, str], ...] = ()
    content: str = ""
    reasoning: str = ""
    cut: bool = False  # by the token limit
    in_reasoning: bool = False  # the prompt opened it
    ids: tuple[str, ...] = ()
    ended: int | None = None  # calls; None: all of them, or all but the last if ``cut``
    # Whether the family's markers are tokens of the tokenizer, text, or either.
    markers: Literal["both", "tokens", "special", "text"] = "both"


def qwen(*functions: str) -> str:
    return "\n".join(f"<tool_call>\n{function}\n</tool_call>" for function in functions)


def function(name: str, **parameters: str) -> str:
    body = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in parameters.items())
    return f"<function={name}>\n{body}</function>"


def k3(*calls: str) -> str:
    return f"<|open|>tools<|sep|>{''.join(calls)}<|close|>tools<|sep|>"


def k3_call(name: str, body: str) -> str:
    return f'<|open|>call tool="{name}" index="1"<|sep|>{body}<|close|>call<|sep|>'


def k3_argument(key: str, kind: str, value: str) -> str:
    return f'<|open|>argument key="{key}" type="{kind}"<|sep|>{value}<|close|>argument<|sep|>'


def k2(*calls: str) -> str:
    inner = "".join(f"<|tool_call_begin|>{call}<|tool_call_end|>" for call in calls)
    return f"<|tool_calls_section_begin|>{inner}<|tool_calls_section_end|>"


K2_ARGUMENTS = "<|tool_call_argument_begin|>"


def deepseek(*calls: str) -> str:
    inner = "".join(f"<｜tool▁call▁begin｜>{call}<｜tool▁call▁end｜>" for call in calls)
    return f"<｜tool▁calls▁begin｜>{inner}<｜tool▁calls▁end｜>"


def dsml(body: str) -> str:
    return f"<｜DSML｜function_calls>\n{body}\n</｜DSML｜function_calls>"


THINK = "Weigh it up."

QWEN = [
    Vector(
        "1", "qwen_xml", "See.\n\n" + qwen(function("f", s="5", n="5")),
        (("f", '{"s":"5","n":5}'),), "See.",
    ),
    Vector(
        "2", "qwen_xml",
        "<tool_call>\n<function=f>\n<parameter=s>\nif (a</parameter>b) <x>\n</parameter>\n"
        "</function>\n\n</tool_call>",
        (("f", '{"s":"if (a</parameter>b) <x>"}'),),
    ),
    Vector(
        "3", "qwen_xml", qwen(function("f", s="null", u="null"), function("g")),
        (("f", '{"s":"null","u":null}'), ("g", "{}")),
    ),
    Vector(
        "4", "qwen_xml", "Do it.\n" + qwen(function("g")), (("g", "{}"),),
        reasoning="Do it.", in_reasoning=True,
    ),
    Vector(
        "5", "qwen_xml", "<tool_call>\n<function=f>\n<parameter=s>\nabc", (("f", '{"s":"abc'),),
        cut=True,
    ),
    Vector(
        "6", "qwen_xml", "Use <tool_call> tags like <function=",
        content="Use <tool_call> tags like <function=",
    ),
    Vector(
        "two functions in a block", "qwen_xml",
        f"<tool_call>\n{function('f', n='1')}\n{function('g')}\n</tool_call>",
        (("f", '{"n":1}'), ("g", "{}")),
    ),
    Vector(
        "no outer tag", "qwen_xml", "Now: " + function("f", n="1"), (("f", '{"n":1}'),), "Now:"
    ),
    Vector(
        "unknown function", "qwen_xml", qwen(function("nope", n="1")),
        content="\n" + function("nope", n="1") + "\n", markers="tokens",
    ),
    Vector(
        "values on the tag's line", "qwen_xml",
        "<tool_call><function=f><parameter=s>a\nb</parameter><parameter=n>5</parameter></function>"
        "</tool_call>",
        (("f", '{"s":"a\\nb","n":5}'),),
    ),
    Vector(
        "types", "qwen_xml",
        qwen(function("f", n="9007199254740993", x="1e400", b="True", o='{"k": [1]}', u="nul")),
        (("f", '{"n":9007199254740993,"x":"1e400","b":true,"o":{"k": [1]},"u":"nul"}'),),
    ),
    Vector(
        "what fits nothing is a string", "qwen_xml", qwen(function("f", n="5.7", b="1", x="NaN")),
        (("f", '{"n":"5.7","b":"1","x":"NaN"}'),),
    ),
    Vector(
        "empty and quoted text", "qwen_xml", qwen(function("f", s="", u='"\\\t\n\u00e9\U0001f600')),
        (("f", '{"s":"","u":"\\"\\\\\\t\\n\u00e9\U0001f600"}'),),
    ),
    Vector(
        "text behind a call", "qwen_xml", "A\n" + qwen(function("g")) + "\n\nB",
        (("g", "{}"),), "A\n\nB",
    ),
    Vector(
        "reasoned, then called", "qwen_xml", f"{THINK}\n</think>\n\n" + qwen(function("g")),
        (("g", "{}"),), reasoning=THINK, in_reasoning=True,
    ),
    Vector(
        "a call that is only thought of", "qwen_xml",
        "A <tool_call> tag?\n</think>\n\nNo.",
        reasoning="A <tool_call> tag?", content="No.", in_reasoning=True,
    ),
    Vector(
        "reasoning again", "qwen_xml", "<think>\nA\n</think>\n\nB<think>C</think>\n\nD",
        content="BD", reasoning="AC", markers="tokens",
    ),
    Vector("tags in prose", "qwen_xml", "A <think> tag", content="A <think> tag", markers="text"),
    Vector("stray closer", "qwen_xml", "\n</think>\n\nHi", content="Hi", markers="text"),
    Vector("cut reasoning", "qwen_xml", "A\n", reasoning="A\n", in_reasoning=True, cut=True),
    Vector("space is kept", "qwen_xml", " a \n\n", content=" a \n\n"),
]  # fmt: skip

HERMES = [
    Vector(
        "7", "hermes",
        '<tool_call>\n{"name": "f", "arguments": {"s": "x</tool_call>y"}}\n</tool_call>',
        (("f", '{"s": "x</tool_call>y"}'),),
    ),
    Vector(
        "8", "hermes", '<tool_call>\n{"arguments": {"n": 1}, "name": "f"}\n</tool_call>',
        (("f", '{"n": 1}'),),
    ),
    Vector(
        "9", "hermes",
        '<tool_call>\n{"name": "f", "arguments": "{\\"n\\": 1}"}\n</tool_call>',
        (("f", '{"n": 1}'),),
    ),
    Vector(
        "9b", "hermes",
        '<tool_call>\n{"name": "f", "arguments": {"n": 1}}\n{"name": "g"}\n</tool_call>',
        (("f", '{"n": 1}'), ("g", "{}")),
    ),
    Vector(
        "parameters, an id, a bracket too many", "hermes",
        '<tool_call>{"id": "1", "name": "f", "parameters": {"n": 1}}}</tool_call>',
        (("f", '{"n": 1}'),),
    ),
    Vector(
        "a raw line end", "hermes",
        '<tool_call>\n{"name": "f", "arguments": {"s": "a\nb"}}\n</tool_call>',
        (("f", '{"s": "a\\nb"}'),),
    ),
    Vector(
        "escapes in a string of arguments", "hermes",
        '<tool_call>{"name": "f", "arguments": "{\\"s\\": \\"\\u00e9\\ud83d\\ude00\\ud83d\\"}"}',
        (("f", '{"s": "\u00e9\U0001f600\ufffd"}'),),
    ),
    Vector("null", "hermes", '<tool_call>{"name": "g", "arguments": null}', (("g", "{}"),)),
    Vector(
        "cut", "hermes", '<tool_call>\n{"name": "f", "arguments": {"s": "a\\', (("f", '{"s": "a'),),
        cut=True,
    ),
    Vector(
        "cut before the name", "hermes", 'A <tool_call>\n{"arguments": {"s"', content="A",
        cut=True, markers="tokens",
    ),
    Vector(
        "unknown", "hermes", '<tool_call>{"name": "nope", "arguments": {}}</tool_call>',
        content='{"name": "nope", "arguments": {}}', markers="tokens",
    ),
    Vector(
        "granite 3", "granite3",
        '<|tool_call|>[{"name": "f", "arguments": {"n": 1}}, {"name": "g", "arguments": {}}]',
        (("f", '{"n": 1}'), ("g", "{}")),
    ),
]  # fmt: skip

GEMMA = [
    Vector(
        "10", "gemma4", '<|tool_call>call:f{n:1,s:<|"|>a "q" {x}<|"|>}<tool_call|>',
        (("f", '{"n":1,"s":"a \\"q\\" {x}"}'),),
    ),
    Vector(
        "11", "gemma4",
        '<|tool_call>call:f{o:{k:[1,true,null,<|"|>z<|"|>],x-y:2},s:<|"|><|"|>}<tool_call|>',
        (("f", '{"o":{"k":[1,true,null,"z"],"x-y":2},"s":""}'),),
    ),
    Vector(
        "12", "gemma4",
        "<|tool_call>call:g{}<tool_call|><|tool_call>call:ns.g{n:2}<tool_call|>",
        (("g", "{}"), ("ns.g", '{"n":2}')),
    ),
    Vector("12b", "gemma4", '<|tool_call>call:f{s:<|"|>ab', (("f", '{"s":"ab'),), cut=True),
    Vector(
        "reasoning", "gemma4",
        "<|channel>thought\nLook.\n<channel|>See.<|tool_call>call:g{}<tool_call|>",
        (("g", "{}"),), "See.", "Look.",
    ),
]  # fmt: skip

HARMONY = [
    Vector(
        "13", "harmony",
        "<|channel|>analysis<|message|>Need.<|end|><|start|>assistant<|channel|>commentary "
        'to=functions.f <|constrain|>json<|message|>{"n": 1}<|call|>',
        (("f", '{"n": 1}'),), reasoning="Need.",
    ),
    Vector(
        "14", "harmony",
        ' to=functions.f<|channel|>commentary <|constrain|>json<|message|>{"n": 1}<|call|>',
        (("f", '{"n": 1}'),),
    ),
    Vector(
        "14b", "harmony",
        ' to=functions.f<|channel|>commentary to=functions.f json<|message|>{"n": 1}',
        (("f", '{"n": 1}'),),
    ),
    Vector(
        "15", "harmony",
        "<|channel|>commentary<|message|>Plan.<|end|><|start|>assistant<|channel|>final<|message|>"
        "Hi<|return|>",
        content="Plan.\nHi",
    ),
    Vector("no header", "harmony", "Hello there", content="Hello there"),
    Vector(
        "no arguments", "harmony", "<|channel|>commentary to=functions.g<|message|><|call|>",
        (("g", "{}"),),
    ),
    Vector(
        "unknown", "harmony", '<|channel|>commentary to=functions.nope<|message|>{"a": 1}<|call|>',
        content='{"a": 1}',
    ),
    Vector(
        "cut", "harmony", '<|channel|>commentary to=functions.f<|message|>{"s": "a',
        (("f", '{"s": "a'),), cut=True,
    ),
    Vector("cut", "harmony", "<|channel|>analysis<|message|>Hm", reasoning="Hm", cut=True),
]  # fmt: skip

GLM = [
    Vector(
        "16", "glm",
        "\n<tool_call>f\n<arg_key>s</arg_key>\n<arg_value>5</arg_value>\n<arg_key>n</arg_key>\n"
        "<arg_value>5</arg_value>\n</tool_call>",
        (("f", '{"s":"5","n":5}'),),
    ),
    Vector(
        "17", "glm",
        "<tool_call>f<arg_key>s</arg_key><arg_value>  x </arg_value></tool_call>"
        "<tool_call>g</tool_call>",
        (("f", '{"s":"  x "}'), ("g", "{}")),
    ),
    Vector(
        "18", "glm", "<tool_call>f<arg_key>s</arg_key><arg_value>abc", (("f", '{"s":"abc'),),
        cut=True,
    ),
    Vector(
        "18b", "glm", "<tool_call>I will call it</tool_call>", content="I will call it",
        markers="tokens",
    ),
    Vector(
        "quoted tags", "glm",
        "<tool_call>f<arg_key>s</arg_key><arg_value>a</arg_value>b</arg_value></tool_call>",
        (("f", '{"s":"a</arg_value>b"}'),),
    ),
]  # fmt: skip


def minimax(*invokes: str) -> str:
    return "<minimax:tool_call>\n" + "\n".join(invokes) + "\n</minimax:tool_call>"


def invoke(name: str, **parameters: str) -> str:
    body = "".join(f'<parameter name="{k}">{v}</parameter>\n' for k, v in parameters.items())
    return f'<invoke name="{name}">\n{body}</invoke>'


MINIMAX = [
    Vector("19", "minimax", minimax(invoke("f", s="5", n="5")), (("f", '{"s":"5","n":5}'),)),
    Vector(
        "20", "minimax", minimax(invoke("g"), invoke("f", o='{"k": [1]}')),
        (("g", "{}"), ("f", '{"o":{"k": [1]}}')),
    ),
    Vector(
        "21", "minimax", minimax(invoke("f", s="null", x="inf")),
        (("f", '{"s":"null","x":"inf"}'),),
    ),
]  # fmt: skip

KIMI = [
    Vector(
        "22", "kimi_k2", k2(f'functions.f:3{K2_ARGUMENTS}{{"n": 1}}'), (("f", '{"n": 1}'),),
        ids=("functions.f:3",),
    ),
    Vector(
        "23", "kimi_k2",
        f"<|tool_calls_section_begin|><|tool_call_begin|>functions.g:0{K2_ARGUMENTS}{{}}"
        f'<|tool_call_end|><|tool_call_begin|>functions.f:1{K2_ARGUMENTS}{{"n": 1',
        (("g", "{}"), ("f", '{"n": 1')), cut=True,
    ),
    Vector(
        "24", "kimi_k2", k2(f'functions.f{K2_ARGUMENTS}{{"n": 1}}'), (("f", '{"n": 1}'),),
        ids=("functions.f:0",),
    ),
    Vector(
        "called while thinking", "kimi_k2", "A " + k2(f"functions.g:0{K2_ARGUMENTS}{{}}"),
        (("g", "{}"),), reasoning="A", in_reasoning=True,
    ),
    Vector(
        "25", "kimi_k3",
        k3(k3_call("f", k3_argument("s", "string", "5") + k3_argument("n", "number", "5"))),
        (("f", '{"s":"5","n":5}'),),
    ),
    Vector(
        "26", "kimi_k3",
        k3(k3_call("f", '<|open|>json type="object"<|sep|>{"n": 1}<|close|>json<|sep|>')),
        (("f", '{"n": 1}'),),
    ),
    Vector(
        "27", "kimi_k3", k3(k3_call("a&quot;b", "")),
        content='call tool="a&quot;b" index="1"call', markers="special",
    ),
    Vector(
        "answer tags", "kimi_k3",
        "Hm<|close|>think<|sep|><|open|>response<|sep|>Hi<|close|>response<|sep|>",
        content="Hi", reasoning="Hm", in_reasoning=True,
    ),
]  # fmt: skip

DEEPSEEK = [
    Vector(
        "28", "deepseek",
        deepseek('f<｜tool▁sep｜>{"n": 1}', "g<｜tool▁sep｜>{}"),
        (("f", '{"n": 1}'), ("g", "{}")),
    ),
    Vector(
        "29", "deepseek",
        deepseek('function<｜tool▁sep｜>f\n```json\n{"n": 1}\n```'), (("f", '{"n": 1}'),),
    ),
    Vector(
        "30", "deepseek_dsml",
        dsml(
            '<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="s" string="true">5'
            '</｜DSML｜parameter>\n<｜DSML｜parameter name="n" string="false">5'
            "</｜DSML｜parameter>\n</｜DSML｜invoke>"
        ),
        (("f", '{"s":"5","n":5}'),),
    ),
    Vector(
        "30b", "deepseek_dsml",
        '<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n'
        '<｜DSML｜parameter name="s" string="true">5</｜',
        (("f", '{"s":"5'),), cut=True, markers="text",
    ),
    Vector(
        "30c", "deepseek_dsml",
        '<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n'
        '<｜DSML｜parameter name="s" string="true">5</｜DSML｜para',
        (("f", '{"s":"5'),), cut=True,
    ),
]  # fmt: skip

MISTRAL = [
    Vector(
        "31", "mistral", '[TOOL_CALLS]f[ARGS]{"n": 1}[TOOL_CALLS]g[ARGS]{}',
        (("f", '{"n": 1}'), ("g", "{}")),
    ),
    Vector(
        "32", "mistral", '[TOOL_CALLS]f[CALL_ID]abc123456[ARGS]{"n": 1}', (("f", '{"n": 1}'),),
        ids=("abc123456",),
    ),
    Vector(
        "33", "mistral",
        '[TOOL_CALLS][{"name": "f", "arguments": {"n": 1}}, {"name": "g", "arguments": {}}]',
        (("f", '{"n": 1}'), ("g", "{}")),
    ),
    Vector("no marker between", "mistral", '[TOOL_CALLS]f{"n": 1}', (("f", '{"n": 1}'),)),
    Vector("reasoning", "mistral", "[THINK]A[/THINK]B", content="B", reasoning="A"),
]  # fmt: skip

LLAMA = [
    Vector("34", "llama3", '{"name": "f", "parameters": {"n": 1}}', (("f", '{"n": 1}'),)),
    Vector("35", "llama3", '{"city": "Rome"}', content='{"city": "Rome"}'),
    Vector(
        "36", "llama3", ' {"name": "nope", "parameters": {}}',
        content=' {"name": "nope", "parameters": {}}',
    ),
    Vector(
        "two calls", "llama3",
        '<|python_tag|>{"name": "f", "parameters": {"n": 1}}; {"name": "g", "parameters": {}}',
        (("f", '{"n": 1}'), ("g", "{}")),
    ),
]  # fmt: skip

LFM2 = [
    Vector(
        "37", "pythonic", '<|tool_call_start|>[f(s="a, b)", n=-1), g()]<|tool_call_end|>',
        (("f", '{"s":"a, b)","n":-1}'), ("g", "{}")),
    ),
    Vector(
        "38", "pythonic", '<|tool_call_start|>[f(o={"a": true, "b": null})]<|tool_call_end|>',
        (("f", '{"o":{"a":true,"b":null}}'),),
    ),
    Vector("39", "pythonic", "<|tool_call_start|>[f(1)]<|tool_call_end|>", content="[f(1)]",
           markers="special"),
    Vector(
        "quotes inside quotes", "pythonic",
        "<|tool_call_start|>[f(s='it's', u='say \\'x\\', y')]<|tool_call_end|>",
        (("f", '{"s":"it\'s","u":"say \'x\', y"}'),),
    ),
    Vector(
        "nested", "pythonic",
        "<|tool_call_start|>[f(o={'a': [1, (2, 'b, )')], 'c': None}, b=True)]<|tool_call_end|>",
        (("f", '{"o":{"a":[1,[2,"b, )"]],"c":null},"b":true}'),),
    ),
]  # fmt: skip

VECTORS = [
    *QWEN, *HERMES, *GEMMA, *HARMONY, *GLM, *MINIMAX, *KIMI, *DEEPSEEK, *MISTRAL, *LLAMA, *LFM2,
]  # fmt: skip
