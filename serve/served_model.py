"""A model's text side, read from its folder: tokenizer, chat template, special and EOS tokens."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

import jinja2
import msgspec
from tokenizers import Tokenizer

from quire.engine.messages import SamplingParams
from quire.serve.detokenizer import TokenBytes
from quire.serve.fill_in_middle import FillTokens, find_fill_tokens
from quire.serve.grammar import GrammarChecker
from quire.serve.lark import markers_of
from quire.serve.parsers.families import ParserFactory, infer_family
from quire.serve.prompt import Renderer, check_syntax, switches_read
from quire.serve.template_helpers import TemplateHelpers
from quire.serve.text_encoder import TextEncoder

_SPECIAL_TOKENS: Final = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class ModelFilesError(Exception):
    """A file of the model is missing or unusable; the message names it and fits on a line."""


@dataclass(frozen=True)
class ServedModel:
    """What the HTTP layer knows of the model. ``created`` is in seconds since the epoch."""

    id: str
    encoder: TextEncoder
    chat_template: Renderer | None
    eos_token_ids: tuple[int, ...]
    created: int
    token_bytes: TokenBytes
    parsers: ParserFactory  # of what the model writes
    default_sampling: SamplingParams = field(
        default_factory=SamplingParams
    )  # for fields a request leaves out
    default_switches: Mapping[str, Any] = field(default_factory=dict)  # of the chat template
    grammars: GrammarChecker | None = None  # None: no request may ask for a form of its output
    pooling: Literal["last", "mean"] = "last"  # how texts become vectors

    @cached_property
    def all_token_bytes(self) -> TokenBytes:
        """Like ``token_bytes``, but special tokens add their names."""
        return TokenBytes(self.encoder.tokenizer, with_special=True)

    @cached_property
    def switches(self) -> tuple[str, ...]:
        """What a request's ``chat_template_kwargs`` can change."""
        return () if self.chat_template is None else switches_read(self.chat_template.source)

    @cached_property
    def fill_tokens(self) -> FillTokens | None:
        return find_fill_tokens(self.encoder.tokenizer)

    @asynccontextmanager
    async def helpers(self) -> AsyncIterator[None]:
        """Keeps the processes that requests for this model need."""
        async with AsyncExitStack() as running:
            if self.chat_template is not None:
                await running.enter_async_context(self.chat_template)
            if self.grammars is not None:
                await running.enter_async_context(self.grammars)
            yield


def load_served_model(
    path: Path,
    served_model_name: str,
    *,
    tool_parser: str = "auto",
    reasoning_parser: str = "auto",
    default_switches: Mapping[str, Any] | None = None,
    pooling: Literal["last", "mean"] = "last",
) -> ServedModel:
    """Read a model folder in the Hugging Face layout. Raises :class:`ModelFilesError`.

    The parsers and the chat template's switches are named in :mod:`quire.serve.parsers.names`.
    """
    tokenizer = _load_tokenizer(path / "tokenizer.json")
    config = _read_json(path / "tokenizer_config.json")
    template = _load_chat_template(path, config)
    family = infer_family(
        template.source if template else None,
        tokenizer,
        tools=tool_parser,
        reasoning=reasoning_parser,
    )
    eos_token_ids = _eos_token_ids(path, config, tokenizer)
    return ServedModel(
        id=served_model_name,
        encoder=TextEncoder(tokenizer),
        chat_template=template,
        eos_token_ids=eos_token_ids,
        created=int(time.time()),
        token_bytes=TokenBytes(tokenizer),
        parsers=ParserFactory(family, tokenizer),
        default_sampling=_default_sampling(path / "generation_config.json"),
        default_switches=default_switches or {},
        grammars=GrammarChecker(
            str(path / "tokenizer.json"), list(eos_token_ids), markers_of(tokenizer)
        ),
        pooling=pooling,
    )


def _load_tokenizer(file: Path) -> Tokenizer:
    if not file.is_file():
        raise ModelFilesError(f"{file} is missing; convert the model's tokenizer to this format.")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise ModelFilesError(f"{file} cannot be read as a tokenizer: {error}") from error
    # Both may be left over from training; a server wants every token and no padding.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read_json(file: Path) -> dict[str, Any]:
    """A JSON object, empty if the file does not exist."""
    if not file.is_file():
        return {}
    try:
        return msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ModelFilesError(f"{file} cannot be read as a JSON object: {error}") from error


def _content(token: object) -> str | None:
    """A special token is written as text or as an object with its text under "content"."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _load_chat_template(path: Path, config: Mapping[str, Any]) -> TemplateHelpers | None:
    file = path / "chat_template.jinja"
    if file.is_file():
        try:
            source = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelFilesError(f"{file} cannot be read: {error}") from error
    else:
        file = path / "tokenizer_config.json"
        named = config.get("chat_template")
        if isinstance(named, list):
            try:
                named = {entry["name"]: entry["template"] for entry in named}.get("default")
            except (TypeError, KeyError):
                raise ModelFilesError(f"{file}: chat_template's entries need names.") from None
        if named is None:
            return None
        if not isinstance(named, str):
            raise ModelFilesError(f"{file}: chat_template must be text.")
        source = named
    special = {name: text for name in _SPECIAL_TOKENS if (text := _content(config.get(name)))}
    try:
        check_syntax(source)
    except jinja2.TemplateSyntaxError as error:
        raise ModelFilesError(
            f"{file}: the chat template has a syntax error on line {error.lineno}: {error.message}"
        ) from error
    return TemplateHelpers(source, special)


def _default_sampling(file: Path) -> SamplingParams:
    """What the model's authors recommend, in place of OpenAI's temperature 1."""
    config = _read_json(file)
    if config.get("do_sample") is False:
        return SamplingParams(temperature=0.0)
    names = ("temperature", "top_k", "top_p", "min_p")
    given = {name: config[name] for name in names if config.get(name) is not None}
    try:
        params = msgspec.convert(given, SamplingParams)
    except msgspec.ValidationError as error:
        raise ModelFilesError(f"{file}: {error}") from error
    if params.temperature < 0 or params.top_k < 0 or not (0 < params.top_p <= 1):
        raise ModelFilesError(f"{file}: temperature, top_k or top_p is out of range.")
    return params


def _eos_token_ids(
    path: Path, tokenizer_config: Mapping[str, Any], tokenizer: Tokenizer
) -> tuple[int, ...]:
    """From the first file that names any: generation_config, config, tokenizer_config."""
    for name in ("generation_config.json", "config.json"):
        config = _read_json(path / name)
        text_config = config.get("text_config")
        for source in (config, text_config if isinstance(text_config, dict) else {}):
            ids = source.get("eos_token_id")
            if ids is None or ids == []:
                continue
            ids = ids if isinstance(ids, list) else [ids]
            if not all(isinstance(token_id, int) for token_id in ids):
                raise ModelFilesError(f"{path / name}: eos_token_id must be one or more integers.")
            return tuple(ids)
    text = _content(tokenizer_config.get("eos_token"))
    token_id = None if text is None else tokenizer.token_to_id(text)
    return () if token_id is None else (token_id,)
