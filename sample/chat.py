"""Conversations with a run: its chat template around what is said, its history, and where an answer ends."""

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from bothways.data import chat
from bothways.data.chat import Message
from bothways.errors import InputError
from bothways.sample.diffusion import DiffusionModel
from bothways.sample.open import Model, open_model
from bothways.sample.text import Sample, TextModel


def chat_model(model: TextModel, block: int | None = None) -> Model:
    """The same run for prompts that its chat template wrote: control tokens in them are read as such, nothing is put
    before them, and a text ends where an answer does.

    Args:
      block: the tokens that a diffusion run will write together, if that is chosen.

    Raises:
      InputError: a run that cannot answer.
    """
    if not isinstance(model, TextModel) or model.has_source:
        raise InputError(
            f"{model.run.home} is a {model.recipe.family} run and cannot chat: only decoders go on from a conversation"
        )
    check_block(model, block)
    tokenizer = copy.copy(model.tokenizer)
    tokenizer.encode = functools.partial(chat.encode, model.tokenizer)  # type: ignore[method-assign]
    tokenizer.opening, tokenizer.eos = (), chat.end_of_turn(model.tokenizer)
    return open_model(dataclasses.replace(model.run, tokenizer=tokenizer))


def check_block(model: Model, block: int | None) -> None:
    """
    Raises:
      InputError: a diffusion run that does not write answers in blocks of this size, or in none at all.
    """
    if isinstance(model, DiffusionModel):
        sizes = sorted({*model.block_sizes} - {0})
        if not sizes or (block is not None and block not in sizes):
            raise InputError(
                f"an answer is written in blocks that the run was trained on, {', '.join(map(str, sizes)) or 'and it has none'}"
                f"{'' if block is None else f'; --block is {block}'}: a row written whole does not end where the answer does"
            )


def answer_prompts(model: TextModel, prompts: Sequence[str], system: str = "", **options: Any) -> list[Sample]:
    """One answer, or `num` of them, to each prompt as a conversation of its own.

    Args:
      system: what the conversation begins with, if anything.
      options: those of the model's `sample`.

    Raises:
      InputError: as `sample`, and where the template refuses the messages.
    """
    texts = [chat.render(model.tokenizer, [*opening(system), {"role": "user", "content": p}]) for p in prompts]
    found = chat_model(model, options.get("block")).sample(texts, **options)
    num = len(found) // len(prompts)
    return [dataclasses.replace(sample, prompt=prompts[i // num]) for i, sample in enumerate(found)]


def opening(system: str) -> list[Message]:
    return [{"role": "system", "content": system}] if system else []


class Conversation:
    """A conversation with its history: `reply` says the next user's turn and returns the answer."""

    def __init__(
        self, model: TextModel, system: str = "", log: Callable[[str], None] = lambda _: None, **options: Any
    ) -> None:
        """
        Args:
          options: those of the model's `sample`.

        Raises:
          InputError: a run that cannot answer, or whose template has no system message where one is given.
        """
        self.options = {"max_tokens": 256} | options
        self.tokenizer, self.model, self.log = model.tokenizer, chat_model(model, options.get("block")), log
        self.system: list[Message] = opening(system)
        self.turns: list[Message] = []
        chat.render(self.tokenizer, [*self.system, {"role": "user", "content": "a"}])

    def reply(self, text: str, stream: Callable[[str], None] | None = None) -> Sample:
        """The answer to a user's turn, given all turns before it. The oldest are forgotten where the context is full.

        Args:
          stream: gets the answer piece by piece.

        Raises:
          InputError: as `sample`; the conversation is then as it was before.
        """
        context = self.model.room(self.options.get("block"))
        room = context - min(self.options["max_tokens"], context // 2)
        turns = [*self.turns, {"role": "user", "content": text}]
        while True:
            prompt = chat.render(self.tokenizer, [*self.system, *turns])
            if len(turns) < 3 or len(chat.encode(self.tokenizer, prompt)) <= room:
                break
            turns = turns[2:]
        if (forgotten := len(self.turns) + 1 - len(turns)) > 0:
            self.log(f"the context of {context} tokens is full: the oldest {forgotten} messages are forgotten")
        pieces = None if stream is None else (lambda _, piece: stream(piece))
        found = self.model.sample([prompt], stream=pieces, **self.options)[0]
        self.turns = [*turns, {"role": "assistant", "content": found.text}]
        return dataclasses.replace(found, prompt=text)
