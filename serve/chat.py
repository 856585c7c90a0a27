"""Chats as prompts: a run's own template, in a sandbox."""

import functools
import json
from collections.abc import Sequence
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from bothways.data.tokenizer import Tokenizer
from bothways.errors import InputError


def _refuse(message: str) -> None:
    raise InputError(message)


@functools.lru_cache(maxsize=64)
def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _refuse
    environment.filters["tojson"] = lambda value, **how: json.dumps(value, ensure_ascii=False, **how)
    return environment.from_string(template)


def render(template: str, messages: Sequence[dict[str, Any]], tokenizer: Tokenizer) -> str:
    """A chat as the run's template writes it, up to where the assistant's answer begins.

    Raises:
      InputError: the template refuses these messages, or does what its sandbox forbids.
    """
    for token in control_tokens(tokenizer):
        if any(token in message["content"] for message in messages):
            raise InputError(f"a message holds {token}, which is how the template marks messages; leave it out")
    special = {"bos_token": tokenizer.piece(tokenizer.bos), "eos_token": tokenizer.piece(tokenizer.eos)}
    try:
        return _compiled(template).render(messages=messages, add_generation_prompt=True, **special)
    except jinja2.TemplateError as e:
        raise InputError(f"the run's chat template cannot write these messages: {e}") from e


def control_tokens(tokenizer: Tokenizer) -> list[str]:
    """Texts that would be read as special tokens where a chat is encoded."""
    return [piece for piece in map(tokenizer.piece, tokenizer.special) if len(piece) > 2]


def encode_chat(tokenizer: Tokenizer, text: str) -> list[int]:
    """A rendered chat as tokens. Its control tokens are those of the vocabulary, which the text of a message may not hold."""
    fast = getattr(tokenizer, "fast", None)
    return fast.encode(text, add_special_tokens=False).ids if fast is not None else tokenizer.encode(text)
