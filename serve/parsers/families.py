"""The families of models, by how they write reasoning and tool calls, and which one a model is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from msgspec import Struct
from tokenizers import Tokenizer

from quire.serve.parsers import harmony
from quire.serve.parsers.call_objects import Granite3, Hermes, Llama3
from quire.serve.parsers.deepseek import DeepSeek
from quire.serve.parsers.events import EventLog, new_call_id
from quire.serve.parsers.gemma import Gemma4
from quire.serve.parsers.glm import Glm
from quire.serve.parsers.invoke_xml import DeepSeekDsml, MiniMax
from quire.serve.parsers.kimi import KimiK2, KimiK3
from quire.serve.parsers.markers import Markers
from quire.serve.parsers.mistral import Mistral, new_mistral_id
from quire.serve.parsers.output import OutputParser, TaggedParser, ThinkTags
from quire.serve.parsers.pythonic import Pythonic
from quire.serve.parsers.qwen_xml import QwenXml
from quire.serve.parsers.schemas import Tools
from quire.serve.parsers.syntax import CallSyntax

HARMONY: Final = "harmony"

TOOL_SYNTAXES: Final[Mapping[str, type[CallSyntax]]] = {
    "qwen_xml": QwenXml,
    "hermes": Hermes,
    "gemma4": Gemma4,
    "glm": Glm,
    "minimax": MiniMax,
    "kimi_k2": KimiK2,
    "kimi_k3": KimiK3,
    "deepseek": DeepSeek,
    "deepseek_dsml": DeepSeekDsml,
    "mistral": Mistral,
    "llama3": Llama3,
    "pythonic": Pythonic,
    "granite3": Granite3,
}

REASONING_TAGS: Final[Mapping[str, ThinkTags]] = {
    "think": ThinkTags("<think>", "</think>"),
    "gemma4": ThinkTags("<|channel>thought\n", "<channel|>"),
    "mistral": ThinkTags("[THINK]", "[/THINK]"),
    "seed": ThinkTags("<seed:think>", "</seed:think>"),
    "kimi_k3": ThinkTags(
        "<|open|>think<|sep|>",
        "<|close|>think<|sep|>",
        ("<|open|>response<|sep|>", "<|close|>response<|sep|>", "<|close|>message<|sep|>"),
    ),
}

# Texts of which all stand in a family's chat template. The first row that fits decides.
_TOOL_SIGNS: Final[tuple[tuple[str, tuple[str, ...]], ...]] = (
    (HARMONY, ("<|channel|>", "<|start|>", "<|message|>")),
    ("gemma4", ("<|tool_call>", "<tool_call|>")),
    ("minimax", ("<minimax:tool_call>",)),
    ("none", ("]<]minimax[>[",)),  # MiniMax M3 shares Hermes' tag and nothing else
    ("kimi_k2", ("<|tool_calls_section_begin|>",)),
    ("kimi_k3", ("<|open|>", "<|sep|>")),
    ("deepseek_dsml", ("｜DSML｜",)),
    ("deepseek", ("<｜tool▁calls▁begin｜>",)),
    ("glm", ("<arg_key>",)),
    ("pythonic", ("<|tool_call_start|>",)),
    ("pythonic", ("<|tool_list_start|>",)),
    ("mistral", ("[TOOL_CALLS]",)),
    ("qwen_xml", ("<tool_call>", "<function=")),
    ("granite3", ("<|tool_call|>",)),
    ("hermes", ("<tool_call>",)),
    ("llama3", ("<|python_tag|>",)),
    ("llama3", ("ipython", '"parameters"')),
)
_REASONING_SIGNS: Final[tuple[tuple[str, tuple[str, ...]], ...]] = (
    (HARMONY, ("<|channel|>", "<|start|>", "<|message|>")),
    ("gemma4", ("<|channel>",)),
    ("kimi_k3", ("<|open|>", "<|sep|>")),
    ("mistral", ("[THINK]",)),
    ("seed", ("seed:think",)),
    ("think", ("<think>",)),
    ("think", ("</think>",)),
)
# Templates may leave a family's calls to the tokenizer's vocabulary.
_VOCABULARY_SIGNS: Final = (
    ("kimi_k3", ("<|open|>", "<|close|>", "<|sep|>")),
    ("pythonic", ("<|tool_call_start|>", "<|tool_call_end|>")),
)


class Family(Struct, frozen=True):
    """Names out of the tables above, or "none"."""

    tools: str = "none"
    reasoning: str = "none"


def infer_family(
    template: str | None, tokenizer: Tokenizer, *, tools: str = "auto", reasoning: str = "auto"
) -> Family:
    """From the chat template's source; ``tools`` and ``reasoning`` override what it says."""
    source = template or ""
    if tools == "auto":
        tools = _first_sign(_TOOL_SIGNS, lambda text: text in source) or (
            _first_sign(_VOCABULARY_SIGNS, lambda text: tokenizer.token_to_id(text) is not None)
            or "none"
        )
    if reasoning == "auto":
        reasoning = _first_sign(_REASONING_SIGNS, lambda text: text in source) or "none"
    return Family(tools, reasoning)


def _first_sign(
    signs: tuple[tuple[str, tuple[str, ...]], ...], present: Callable[[str], bool]
) -> str | None:
    return next((name for name, texts in signs if all(map(present, texts))), None)


class ParserFactory:
    """Makes the parsers of one model's answers."""

    def __init__(self, family: Family, tokenizer: Tokenizer | None) -> None:
        self.family = family
        self._syntax = TOOL_SYNTAXES.get(family.tools)
        self._think = REASONING_TAGS.get(family.reasoning)
        self._harmony = HARMONY in (family.tools, family.reasoning)
        self.markers = Markers(self.marker_texts(), tokenizer)

    def marker_texts(self) -> set[str]:
        """What may be marker tokens, if the tokenizer has them."""
        texts: set[str] = set(harmony.MARKS) if self._harmony else set()
        if (syntax := self._syntax) is not None:
            texts.update(syntax.openers, syntax.closers, syntax.marks)
        if (think := self._think) is not None:
            tags = (think.opener, think.closer, *think.silent)
            # A tag may begin with its token: Gemma 4 writes a word behind it.
            texts.update(tags, ("<|channel>", "<|open|>", "<|close|>", "<|sep|>"))
        return texts

    @property
    def call_openers(self) -> list[int]:
        """Tokens that begin calls and nothing else; empty where text does."""
        openers = {self.markers.fold(text) for text in self._syntax.openers} if self._syntax else ()
        return [token_id for token_id, char in self.markers.char_of.items() if char in openers]

    @property
    def reads_reasoning(self) -> bool:
        """Whether the model's reasoning is told apart from its answers."""
        return self._harmony or self._think is not None

    def starts_in_reasoning(self, generation_prompt: str) -> bool:
        """Whether what the template adds for the assistant to speak opens its reasoning."""
        if self._think is None:
            return False
        opened = generation_prompt.rfind(self._think.opener.strip())
        return opened > generation_prompt.rfind(self._think.closer)

    def parser(
        self,
        tools: Tools | None,
        *,
        starts_in_reasoning: bool = False,
        new_id: Callable[[], str] | None = None,
    ) -> OutputParser:
        """For one answer. Without ``tools`` nothing is a call."""
        if new_id is None:
            new_id = new_mistral_id if self._syntax is Mistral else new_call_id
        events = EventLog(new_id)
        offered = tools or Tools()
        if self._harmony:
            return harmony.HarmonyParser(events, self.markers, offered)
        return TaggedParser(
            events,
            self.markers,
            offered,
            self._think,
            self._syntax if offered.names else None,
            starts_in_reasoning=starts_in_reasoning,
        )
