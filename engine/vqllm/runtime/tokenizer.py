"""Text to token ids and back, and chat messages to a prompt, from a Hugging Face folder.

Reads `tokenizer.json` and `tokenizer_config.json` only; runs no code from the folder except the
chat template, and that in a Jinja sandbox.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from vqllm.errors import CorruptCheckpoint, InvalidPrompt, UnknownModel, UnsupportedModel

Message = dict[str, str]


class ChatTokenizer:
    """A `tokenizers` tokenizer with the model's special tokens and chat template."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        eos_token_ids: frozenset[int],
        chat_template: str | None = None,
        special_tokens: dict[str, str] | None = None,
    ) -> None:
        """`special_tokens` maps `bos_token`, `eos_token`, ... to their text, for the template."""
        self._tokenizer = tokenizer
        self._special_tokens = special_tokens or {}
        self._template = None if chat_template is None else _compile(chat_template)
        self._added = tokenizer.get_added_tokens_decoder()
        self._piece_bytes = _byte_level_bytes if _is_byte_level(tokenizer) else _piece_bytes
        self.eos_token_ids = eos_token_ids
        self.vocab_size: int = tokenizer.get_vocab_size()
        # Filled as tokens come: all of a vocabulary would be a third of the time to load a model.
        self._bytes: list[bytes | None] = [None] * self.vocab_size

    @classmethod
    def from_folder(cls, folder: Path) -> ChatTokenizer:
        """Read a model folder.

        Raises:
            UnknownModel: the folder has no tokenizer.json.
            CorruptCheckpoint: one of the files cannot be parsed.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise UnknownModel(f"{folder} holds no tokenizer.json")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust library raises bare Exception, nothing narrower
            raise CorruptCheckpoint(f"{path}: {error}") from error
        settings = _read_json(folder / "tokenizer_config.json")
        template_path = folder / "chat_template.jinja"
        template = settings.get("chat_template")
        if template_path.is_file():
            template = template_path.read_text(encoding="utf-8")
        special = {
            name: text
            for name in ("bos_token", "eos_token", "unk_token", "pad_token")
            if (text := _special_text(settings.get(name)))
        }
        return cls(tokenizer, _eos_token_ids(folder, tokenizer, special), template, special)

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; no tokens are added before or after it.

        Raises:
            InvalidPrompt: the text holds half of a surrogate pair, which UTF-8 cannot express.
        """
        if not text.isascii():
            _check_characters(text)
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, control tokens left out; broken UTF-8 becomes U+FFFD."""
        return b"".join(map(self.token_bytes, token_ids)).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes a token stands for; empty for control tokens.

        Raises:
            InvalidPrompt: the id is outside the vocabulary.
        """
        if not 0 <= token_id < self.vocab_size:
            raise InvalidPrompt(f"token id {token_id} is outside [0, {self.vocab_size})")
        known = self._bytes[token_id]
        if known is None:
            known = self._bytes[token_id] = self._make_bytes(token_id)
        return known

    def _make_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            token = self._added[token_id]
            return b"" if token.special else token.content.encode()
        return self._piece_bytes(self._tokenizer.id_to_token(token_id) or "")

    def apply_chat_template(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, ending where the assistant is to answer.

        Raises:
            InvalidPrompt: no messages, a message without role or content, or a conversation that
                the template refuses.
            UnsupportedModel: the model has no chat template.
        """
        if self._template is None:
            raise UnsupportedModel("the model has no chat template; send a plain prompt")
        _check_messages(messages)
        try:
            prompt = self._template.render(
                messages=list(messages), add_generation_prompt=True, **self._special_tokens
            )
        except TemplateError as error:
            raise InvalidPrompt(f"the chat template refuses the conversation: {error}") from error
        return self.encode(prompt)


def _compile(template: str) -> Any:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _raise_template_error
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(template)
    except TemplateError as error:
        raise CorruptCheckpoint(f"the chat template cannot be parsed: {error}") from error


def _raise_template_error(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now(UTC).strftime(pattern)


def _check_messages(messages: Sequence[Message]) -> None:
    if not messages:
        raise InvalidPrompt("the conversation has no messages; send at least one")
    for index, message in enumerate(messages):
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise InvalidPrompt(f"message {index} has no text under {key!r}")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptCheckpoint(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise CorruptCheckpoint(f"{path}: expected an object, found {type(content).__name__}")
    return content


def _special_text(entry: object) -> str | None:
    """Text of a special token, stored either plainly or as an object with its text inside."""
    if isinstance(entry, dict):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else None


def _eos_token_ids(folder: Path, tokenizer: Tokenizer, special: dict[str, str]) -> frozenset[int]:
    """Union of what generation_config.json, config.json and the tokenizer call the end."""
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        entry = _read_json(folder / name).get("eos_token_id")
        ids.update([entry] if isinstance(entry, int) else entry or [])
    token_id = tokenizer.token_to_id(special["eos_token"]) if "eos_token" in special else None
    if token_id is not None:
        ids.add(token_id)
    return frozenset(ids)


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    decoder: Any = tokenizer.decoder
    return decoder is not None and b"ByteLevel" in decoder.__getstate__()


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's map of printable characters to bytes: printable bytes are themselves, the other
    68 follow from U+0100 on in byte order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_ALPHABET = _byte_level_alphabet()


def _byte_level_bytes(piece: str) -> bytes:
    return b"".join(
        bytes([_ALPHABET[char]]) if char in _ALPHABET else char.encode() for char in piece
    )


def _piece_bytes(piece: str) -> bytes:
    """SentencePiece pieces: `<0xNN>` is a byte, U+2581 a space."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("\u2581", " ").encode()


def _check_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidPrompt(
            f"character {error.start} of the text is half of a surrogate pair; send valid UTF-8"
        ) from error
