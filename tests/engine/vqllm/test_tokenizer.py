"""Text to tokens and chat templates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from vqllm.errors import CorruptCheckpoint, InvalidPrompt, UnknownModel, UnsupportedModel
from vqllm.runtime.tokenizer import ChatTokenizer

MakeFolder = Callable[..., Path]

TEXT = "Grüße, 北京! 🙂\n\tx=1"


@pytest.fixture
def tokenizer(tiny_folder: Path) -> ChatTokenizer:
    return ChatTokenizer.from_folder(tiny_folder)


def test_decoding_restores_the_text(tokenizer: ChatTokenizer) -> None:
    token_ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(token_ids) == TEXT
    assert b"".join(map(tokenizer.token_bytes, token_ids)) == TEXT.encode()


def test_control_tokens_have_no_text(tokenizer: ChatTokenizer) -> None:
    assert tokenizer.decode([256, ord("a"), 257]) == "a"
    assert tokenizer.eos_token_ids == {257}
    assert tokenizer.vocab_size == 258


def test_a_token_outside_the_vocabulary_is_refused(tokenizer: ChatTokenizer) -> None:
    with pytest.raises(InvalidPrompt, match="token id 258"):
        tokenizer.decode([258])


def test_a_conversation_becomes_a_prompt(tokenizer: ChatTokenizer) -> None:
    token_ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert token_ids[0] == 256
    assert tokenizer.decode(token_ids) == "user: Hiassistant: "


@pytest.mark.parametrize(
    "messages", [[], [{"role": "user"}], [{"content": "x"}], [{"role": "user", "content": 3}]]
)
def test_malformed_messages_are_refused(
    tokenizer: ChatTokenizer, messages: list[dict[str, str]]
) -> None:
    with pytest.raises(InvalidPrompt, match="message"):
        tokenizer.apply_chat_template(messages)


def with_template(folder: Path, template: str | None) -> ChatTokenizer:
    settings = {} if template is None else {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return ChatTokenizer.from_folder(folder)


def test_a_template_cannot_reach_python(tiny_folder: Path) -> None:
    attack = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(InvalidPrompt, match="refuses the conversation"):
        with_template(tiny_folder, attack).apply_chat_template([{"role": "user", "content": "x"}])


def test_a_template_may_refuse_a_conversation(tiny_folder: Path) -> None:
    tokenizer = with_template(tiny_folder, "{{ raise_exception('no system role') }}")
    with pytest.raises(InvalidPrompt, match="no system role"):
        tokenizer.apply_chat_template([{"role": "system", "content": "x"}])


def test_a_model_without_a_template_says_so(tiny_folder: Path) -> None:
    tokenizer = with_template(tiny_folder, None)
    assert not tokenizer.has_chat_template
    with pytest.raises(UnsupportedModel, match="no chat template"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])


def test_broken_files_are_named(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match=r"no tokenizer\.json"):
        ChatTokenizer.from_folder(tmp_path)
    with pytest.raises(CorruptCheckpoint, match="template cannot be parsed"):
        with_template(tiny_folder, "{% if %}")
    (tiny_folder / "tokenizer_config.json").write_text("[")
    with pytest.raises(CorruptCheckpoint, match=r"tokenizer_config\.json"):
        ChatTokenizer.from_folder(tiny_folder)
    (tiny_folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CorruptCheckpoint, match=r"tokenizer\.json"):
        ChatTokenizer.from_folder(tiny_folder)
