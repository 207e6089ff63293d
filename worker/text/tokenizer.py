"""Text to token ids and back, chat turns to text: `tokenizer.json`, `chat_template.jinja`.

Also what the checkpoint says about stopping and sampling (`generation_config.json`). The template
runs in jinja2's sandbox, because a checkpoint may come from anywhere. A folder without
`tokenizer.json` can still be served with token ids; its answers then have no text.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import tokenizers
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import CheckpointError, InvalidRequest

_SAMPLING_KEYS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class Tokenizer:
    """The tokenizer and the generation defaults of one checkpoint folder.

    Raises:
        CheckpointError: there is no such folder, or one of the files is there but unreadable.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is no folder; give that of a checkpoint")
        self._folder = folder
        self._tokenizer = _load(folder / "tokenizer.json")
        self._settings = _read_json(folder / "tokenizer_config.json")
        self._generation = _read_json(folder / "generation_config.json")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of tokenizer.json; empty without one."""
        path = self._folder / "tokenizer.json"
        return sha256(path.read_bytes()).hexdigest() if self._tokenizer else ""

    @property
    def vocabulary_size(self) -> int:
        """Number of token ids, added tokens included; 0 without tokenizer.json."""
        if self._tokenizer is None:
            return 0
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @cached_property
    def longest_token(self) -> int:
        """Most characters that one token can stand for; 0 without tokenizer.json."""
        if self._tokenizer is None:
            return 0
        return max(map(len, self._tokenizer.get_vocab(with_added_tokens=True)))

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer by the checkpoint's own word."""
        ids = self._generation.get("eos_token_id")
        if ids is None:
            name = _token_text(self._settings.get("eos_token"))
            ids = self._tokenizer.token_to_id(name) if name and self._tokenizer else None
        return _as_ids(ids)

    @cached_property
    def suppressed_ids(self) -> tuple[int, ...]:
        """Tokens that must never be generated."""
        return _as_ids(self._generation.get("suppress_tokens"))

    @cached_property
    def sampling_defaults(self) -> dict[str, object]:
        """Sampling fields that the checkpoint recommends."""
        if self._generation.get("do_sample") is False:
            return {"temperature": 0.0}
        found = {key: self._generation.get(key) for key in _SAMPLING_KEYS}
        return {key: value for key, value in found.items() if value is not None}

    @cached_property
    def _template(self) -> jinja2.Template | None:
        path = self._folder / "chat_template.jinja"
        source = path.read_text() if path.is_file() else self._settings.get("chat_template")
        if not isinstance(source, str):
            return None
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.globals["raise_exception"] = _refuse
        environment.filters["tojson"] = lambda value, **options: json.dumps(
            value, ensure_ascii=False, **options
        )
        try:
            return environment.from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"{path} is not a valid template: {error}") from error

    @property
    def has_chat_template(self) -> bool:
        """Whether chat prompts can be rendered."""
        return self._template is not None

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text, with the tokenizer's own special tokens (`<bos>`) unless told not.

        Raises:
            InvalidRequest: the checkpoint has no tokenizer, or the text is no valid Unicode.
        """
        if self._tokenizer is None:
            raise InvalidRequest.of(
                "prompt.text", "this checkpoint has no tokenizer.json; send prompt.token_ids"
            )
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special).ids
        except TypeError as error:  # what the library says of a lone surrogate
            raise InvalidRequest.of("prompt.text", f"is not valid Unicode: {error}") from None
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD; empty without a tokenizer."""
        if self._tokenizer is None:
            return ""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def chat(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        thinking: bool = False,
        tools: Sequence[Mapping[str, object]] = (),
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Token ids of a conversation, rendered by the checkpoint's template.

        Raises:
            InvalidRequest: the checkpoint has no template, or the template refuses the turns.
        """
        template = self._template
        if template is None:
            raise InvalidRequest.of(
                "prompt.chat", "this checkpoint has no chat template; send prompt.text instead"
            )
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        tokens = {name: _token_text(self._settings.get(name)) for name in names}
        try:
            text = template.render(
                messages=list(messages),
                tools=list(tools) or None,
                enable_thinking=thinking,
                add_generation_prompt=add_generation_prompt,
                **tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise InvalidRequest.of(
                "prompt.chat.messages", f"the chat template refuses them: {error}"
            ) from error
        return self.encode(text, special=False)


def _load(path: Path) -> tokenizers.Tokenizer | None:
    if not path.is_file():
        return None
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _refuse(message: str) -> NoReturn:
    """What templates call `raise_exception`."""
    raise jinja2.TemplateError(message)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return content


def _token_text(token: object) -> str:
    """A token named in tokenizer_config.json, either plain or as an object."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def _as_ids(ids: object) -> tuple[int, ...]:
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else tuple(ids)  # type: ignore[arg-type]
