"""From text and chat messages to token ids, with a model's own tokeniser and template.

Both come from the workers and are treated as data: the template runs in a sandbox, and its output is bounded.
Special tokens written out in a prompt or in a chat message's content (`<|im_end|>`) are read as such, as `transformers`
does: the ids are those that its tokeniser gives for the same text. A client that passes on others' text filters it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Literal

import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer, decoders

from baton.errors import InvalidArgument, NotFound
from router.text.detokenisation import Detokeniser, OutputText, StopMatcher, WholeTokens

RENDERED_LIMIT = 8 * 1024 * 1024
"""Characters that a template may produce."""
InputField = Literal["prompt", "token_ids", "chat"]


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Input:
    """The text, ids or chat to be completed; `field` says which of the other three is set."""

    field: InputField
    prompt: str = ""
    token_ids: tuple[int, ...] = ()
    messages: tuple[Message, ...] = ()


@dataclass(frozen=True, slots=True)
class LanguageParts:
    """What a `Language` is made of, in any process. `bos_token_id` goes before plain prompts; `bos_token` and
    `eos_token` are variables of the template."""

    model: str
    tokenizer_json: bytes
    template: str | None
    bos_token_id: int | None = None
    bos_token: str = ""
    eos_token: str = ""


class Language:
    """A model's tokeniser and chat template. Encoding holds the interpreter's lock, whichever thread it runs in."""

    def __init__(self, parts: LanguageParts) -> None:
        """Raises NotFound when tokeniser or template can't be read."""
        model, template = parts.model, parts.template
        self.parts = parts
        self.model = model
        self._bos = parts.bos_token_id
        try:
            self._tokenizer = Tokenizer.from_buffer(parts.tokenizer_json)
        except Exception as error:  # tokenizers raises bare Exception
            raise NotFound(f"the tokeniser of {model} can't be read: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        byte_level = isinstance(self._tokenizer.decoder, decoders.ByteLevel)
        self._whole = WholeTokens(self._tokenizer, self._tokenizer.get_vocab_size()) if byte_level else None
        self._special = frozenset(
            token for token, added in self._tokenizer.get_added_tokens_decoder().items() if added.special
        )
        try:
            self._template = _environment().from_string(template) if template is not None else None
        except jinja2.TemplateError as error:
            raise NotFound(f"the chat template of {model} can't be read: {error}") from error
        self._variables = {"bos_token": parts.bos_token, "eos_token": parts.eos_token}

    def render(self, messages: tuple[Message, ...]) -> str:
        """The chat as the model was trained to read it, up to the start of its answer. Raises InvalidArgument."""
        if self._template is None:
            raise InvalidArgument("chat", f"{self.model} has no chat template; use prompt or token_ids")
        plain = [asdict(message) for message in messages]
        pieces, length = [], 0
        try:
            for piece in self._template.generate(messages=plain, add_generation_prompt=True, **self._variables):
                pieces.append(piece)
                length += len(piece)
                if length > RENDERED_LIMIT:
                    raise InvalidArgument("chat", f"renders to more than {RENDERED_LIMIT} characters")
        except jinja2.TemplateError as error:
            raise InvalidArgument("chat", f"the template of {self.model} refuses it: {error.message}") from error
        except (TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
            raise InvalidArgument("chat", f"the template of {self.model} fails on it: {error}") from error
        return "".join(pieces)

    def tokenise(self, given: Input) -> tuple[tuple[int, ...], str]:
        """Ids and the text that they were made from; the text of `token_ids` is empty."""
        if given.field == "token_ids":
            return given.token_ids, ""
        text = self.render(given.messages) if given.field == "chat" else given.prompt
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if given.field == "prompt" and self._bos is not None:
            ids = [self._bos, *ids]
        return tuple(ids), text

    def output_text(self, stop: tuple[str, ...], silent: frozenset[int]) -> OutputText:
        """A fresh decoder of one request's output; special tokens and `silent` ids have no text."""
        detokeniser = Detokeniser(self._tokenizer, self._special | silent, self._whole)
        return OutputText(detokeniser, StopMatcher(stop))


def _environment() -> ImmutableSandboxedEnvironment:
    """As `transformers` sets it up, since templates are written for that."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationTag]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here only its content counts."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without jinja's HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
