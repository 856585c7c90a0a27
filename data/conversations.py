"""Conversations as documents of a corpus: read from files, or made from the plays."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from bothways.data import files, plays
from bothways.data.chat import ROLES, Message
from bothways.errors import InputError

MOST_WORDS = 60
"""Of a speech in the conversations that are made from the plays: longer ones are left out."""


# ---- from files ----------------------------------------------------------------------------------------------------


def document(messages: Sequence[Message], after: int = 0) -> str:
    """A conversation as it is kept in a corpus. Answers before message `after` are context only."""
    return json.dumps({"messages": list(messages), "after": after}, ensure_ascii=False)


def read(paths: Sequence[files.AnyPath], field: str) -> Iterator[tuple[str, str]]:
    """(name, document) of the conversations in JSONL or parquet files.

    Raises:
      InputError: other files, or a record that is no conversation.
    """
    for path in paths:
        if files.kind(path) not in (".jsonl", ".parquet"):
            raise InputError(f"{path}: conversations come from .jsonl and .parquet files")
        for number, record in files.records(path):
            yield f"{path.name}:{number}", of_record(record, field, f"{path}, line {number}")


def of_record(record: dict[str, Any], field: str, where: str) -> str:
    """The document of a record: messages under `field`, or a prompt and its completion, each a text or messages.

    Raises:
      InputError: neither is there, an unknown role, a message without text, or no answer.
    """
    if field in record:
        messages, after = messages_of(record[field], where), 0
    elif {"prompt", "completion"} <= record.keys():
        prompt = side_of(record["prompt"], "user", f"{where}, prompt")
        messages, after = [*prompt, *side_of(record["completion"], "assistant", f"{where}, completion")], len(prompt)
    else:
        raise InputError(
            f"{where}: no messages under {field!r}, and no prompt and completion; the fields are "
            f"{', '.join(map(str, record))}; choose one with --data.messages-field"
        )
    if not any(m["role"] == "assistant" for m in messages[after:]):
        raise InputError(f"{where}: a conversation without an answer: no message of the role assistant to train on")
    return document(messages, after)


def side_of(given: Any, role: str, where: str) -> list[Message]:
    return [{"role": role, "content": given}] if isinstance(given, str) else messages_of(given, where)


def messages_of(given: Any, where: str) -> list[Message]:
    """Messages with a role and a text each. Raises InputError for anything else."""
    if not isinstance(given, list) or not all(isinstance(m, dict) for m in given):
        raise InputError(f"{where}: wanted a list of messages, each with role and content; got {str(given)[:60]!r}")
    found = []
    for i, message in enumerate(given, 1):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise InputError(f"{where}, message {i}: unknown role {role!r}; there are {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise InputError(f"{where}, message {i}: content must be a text; got {str(content)[:60]!r}")
        if role == "assistant" and not content.strip():
            raise InputError(f"{where}, message {i}: an empty answer; leave the conversation out")
        found.append({"role": role, "content": content})
    return found


# ---- from the plays ------------------------------------------------------------------------------------------------

SPEECH = re.compile(r"^(?P<name>[A-Z][A-Z .'\u2019-]+):\n(?P<text>(?:.+\n)+)", re.MULTILINE)


def from_play(text: str) -> Iterator[str]:
    """Conversations about speeches of a play that follow each other, of three kinds in turn: what is answered, who speaks to
    whom, and two turns in which the assistant is one of the two."""
    found = [(m["name"].title(), re.sub(r"\[.*?\]\s*", "", m["text"]).strip()) for m in SPEECH.finditer(text)]
    made = 0
    for i in range(0, len(found) - 3, 2):
        four = found[i : i + 4]
        if any(not said or len(said.split()) > MOST_WORDS for _, said in four) or four[0][0] == four[1][0]:
            continue
        (first, one), (second, two), (_, three), (_, fourth) = four
        match made % 3:
            case 0:
                turns = [(f"{first} says:\n{one}\nWhat does {second} answer?", two)]
            case 1:
                turns = [(f"Who says this, and to whom?\n{one}", f"{first}, to {second}.")]
            case _:
                turns = [(f"You are {second}. {first} says:\n{one}", two), (three, fourth)]
        made += 1
        sides = [(role, said) for turn in turns for role, said in zip(("user", "assistant"), turn, strict=True)]
        yield document([{"role": role, "content": said} for role, said in sides])


def of_plays() -> Iterator[tuple[str, str, str]]:
    """(split, name, document) of conversations made from the plays, those of held-out plays held out."""
    for play, _, text in plays.plays():
        for number, made in enumerate(from_play(text)):
            yield plays.split_of(play), f"{play}:{number}", made
