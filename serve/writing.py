"""From a request to the texts that it wants written, and from the engine's tokens back to pieces of text."""

import asyncio
import dataclasses
import functools
import secrets
import weakref
import zlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import jax
import numpy as np

from bothways.data.chat import end_of_turn
from bothways.data.tokenizer import MASK
from bothways.errors import InputError
from bothways.sample.chat import chat_model, check_block
from bothways.sample.sampling_params import SamplingParams
from bothways.sample.text import cut_at_stop, draw_keys, shown_so_far, utf8_so_far
from bothways.serve.engine import Call, Engine, Writing
from bothways.serve.runs import IN_SLOTS, Served
from bothways.serve.shapes import Drawing
from bothways.serve.slots import Generation

SETTLED = 16
"""Tokens after which the text before them is not decoded again."""


@dataclasses.dataclass
class Piece:
    """What has come of one choice since the last piece; `finish` is empty while it goes on, then stop or length."""

    choice: int
    text: str
    tokens: list[int]
    logprobs: list[float]
    tops: list[list[tuple[int, float]]]
    finish: str = ""
    cached: int = 0
    """Tokens of the prompt that were in the prefix cache."""
    count: int = 0
    """Tokens written for the choice in all."""


class Text:
    """The text of one choice while it grows: pieces without half characters, ended by a stop string."""

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str], eos: int):
        self.decode, self.stop, self.eos = decode, stop, eos
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.tops: list[list[tuple[int, float]]] = []
        self.shown, self.given = "", 0
        self._known, self._overlap = "", ""
        """The text of all tokens up to `_until`, and that of those from `_since` to there, as they read by themselves."""
        self._since = self._until = 0

    def _text(self) -> str:
        """Of all tokens so far. Only the last ones are decoded, so that a token of a long text takes no longer: a few known ones
        before the new ones, since the first token of what is decoded may lose its space."""
        text = self._known + self.decode(self.ids[self._since :])[len(self._overlap) :]
        if len(self.ids) - self._until >= SETTLED and utf8_so_far(text) == text:
            self._known, self._since, self._until = text, self._until, len(self.ids)
            self._overlap = self.decode(self.ids[self._since :])
        return text

    def add(
        self, ids: list[int], logprobs: list[float], tops: list[list[tuple[int, float]]], ended: str
    ) -> tuple[str, list[int], list[float], list[list[tuple[int, float]]], str]:
        """What can be shown after these tokens: text, tokens, their log-probabilities and alternatives, why it ended."""
        if ids and ids[-1] == self.eos:
            ids, logprobs, tops = ids[:-1], logprobs[:-1], tops[:-1]
        self.ids += ids
        self.logprobs += logprobs
        self.tops += tops
        text, stopped = cut_at_stop(self.decode(self.ids) if ended else self._text(), self.stop)
        if stopped:
            n = next(n for n in range(len(self.ids) + 1) if self.decode(self.ids[:n]).startswith(text))
            del self.ids[n:], self.logprobs[n:], self.tops[n:]
        finish = "stop" if stopped or ended == "eos" else "length" if ended else ""
        ready = text if finish else shown_so_far(text, self.stop)
        new = ready[len(self.shown) :]
        if not finish and not new:
            return "", [], [], [], ""
        self.shown = max(ready, self.shown, key=len)
        since, self.given = self.given, len(self.ids)
        return new, self.ids[since:], self.logprobs[since:], self.tops[since:], finish


def method_of(request: Drawing) -> SamplingParams:
    temperature = 1.0 if request.temperature is None else request.temperature
    top_p = 1.0 if request.top_p is None else request.top_p
    method = SamplingParams.make(temperature, request.top_k, top_p, request.min_p)
    # On the host: the engine's thread gathers the methods of all slots for every step.
    return jax.tree.map(np.asarray, method)


@dataclasses.dataclass
class Wanted:
    """One prompt, and how many texts are wanted of it."""

    prompt: str
    ids: list[int]
    source: list[int]
    max_tokens: int
    chat: bool = False
    """Whether a chat template wrote it."""


def wanted(
    run: Served, context: int, prompt: str, max_tokens: int | None, usual: int | None, chat: list[int] | None = None
) -> Wanted:
    """A prompt as tokens, with room for what is to be written.

    Args:
      context: tokens that there is room for (serve/runs.py: Runs.context_of).
      usual: max_tokens where the request does not say; None: as many as fit.
      chat: the tokens of a prompt that a chat template wrote, with its special tokens.

    Raises:
      InputError: it does not fit into the context.
    """
    tokenizer = run.tokenizer
    ids = tokenizer.encode(prompt) if chat is None else chat
    opening = list(tokenizer.opening) if chat is None else []
    before, behind = tokenizer.around_source() if chat is None else ((), (tokenizer.eos,))
    source = [*before, *ids, *behind] if run.kind == "seq2seq" else []
    if run.kind == "seq2seq" and not prompt:
        raise InputError("a source is empty; an encoder-decoder needs something to read")
    ids = list(tokenizer.target_start) if source else [*opening, *ids] or [tokenizer.bos]
    most = usual if max_tokens is None else max_tokens
    room = context - len(ids)
    most = max(room, 1) if most is None else most
    if len(source) > context or len(ids) + most > context:
        raise InputError(
            f"this run's context is {context} tokens here, and the prompt has {len(source or ids)}, with max_tokens {most}; "
            "shorten one of them"
            + (f", or serve it with --context {run.context_length} at most" if context < run.context_length else "")
        )
    return Wanted(prompt, ids, source, most, chat is not None)


def seed_of(request: Drawing) -> int:
    """32 bits, which is what JAX takes: of a seed that has more, or is negative, a checksum."""
    seed = secrets.randbits(31) if request.seed is None else request.seed
    return seed if 0 <= seed < 2**32 else zlib.crc32(str(seed).encode())


@dataclasses.dataclass(eq=False)
class InBlocks:
    """A prompt that is continued block by block, `num` times."""

    prompt: str
    max_tokens: int
    seed: int
    put: Callable[[Piece], None]
    first: int
    """Its first choice's number."""
    shown: list[str]
    """What each choice has shown: where a call is computed again, without those it was computed with, not twice."""


CHATTING: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
"""For loaded runs, what answers conversations with their parameters, so that it is compiled once."""


def chatting(model: Any, block: int | None) -> Any:
    """As `chat_model`."""
    check_block(model, block)
    if model not in CHATTING:
        CHATTING[model] = chat_model(model)
    return CHATTING[model]


def write_blocks(
    options: dict[str, Any], chat: bool, model: Any, items: list[InBlocks], between: Callable[[], None]
) -> list[None]:
    """What `model.sample` writes for prompts of several requests together, each with its own seed and length.

    Args:
      chat: whether a chat template wrote the prompts.
    """
    model = chatting(model, options.get("block")) if chat else model
    num, texts = options["num"], {}

    def stream(i: int, piece: str) -> None:
        item, n = items[i // num], i % num
        texts[i] = texts.get(i, "") + piece
        if new := texts[i][len(item.shown[n]) :]:
            item.shown[n] = texts[i]
            item.put(Piece(item.first + n, new, [], [], []))
        between()

    own = {"max_tokens": [item.max_tokens for item in items], "seed": [item.seed for item in items]}
    for i, sample in enumerate(model.sample([item.prompt for item in items], stream=stream, **own, **options)):
        item, n = items[i // num], i % num
        finish = "length" if sample.stop == "max_tokens" else "stop"
        rest = sample.text[len(item.shown[n]) :]
        item.put(Piece(item.first + n, rest, [], [], [], finish, 0, sample.tokens))
    return [None] * len(items)


class Written:
    """Texts being written for one request: an asynchronous iterator of pieces. Leaving it frees what it holds."""

    def __init__(self, engine: Engine, run: Served, request: Drawing, prompts: Sequence[Wanted], tops: int):
        self.engine, self.run, self.request, self.prompts, self.tops = engine, run, request, prompts, tops
        self.count = request.n or 1
        self.gone = False
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Any] = asyncio.Queue()
        self._open = len(prompts) * self.count

    def start(self) -> None:
        """Raises QueueFull; InputError for what this kind of run has nothing for."""
        request, seed = self.request, seed_of(self.request)
        if self.run.kind in IN_SLOTS:
            for name, value in (("block", request.block), ("steps", request.steps), ("threshold", request.threshold)):
                if value:
                    raise InputError(f"{name} is for runs that write blocks of masked tokens; {self.run.name} does not")
            self.engine.submit(*self._writings(seed))
        else:
            self.engine.submit(*self._calls(seed))

    def _put(self, event: Any) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def _writings(self, seed: int) -> list[Writing]:
        request, tokenizer, method = self.request, self.run.tokenizer, method_of(self.request)
        jobs = []
        for p, prompt in enumerate(self.prompts):
            keys = draw_keys([prompt.prompt], self.count, seed)
            eos = end_of_turn(tokenizer) if prompt.chat else tokenizer.eos
            for n, key in enumerate(keys):
                text = Text(tokenizer.decode, request.stops, eos)
                generation = Generation(
                    prompt.ids,
                    np.asarray(jax.random.key_data(key)),
                    method,
                    prompt.max_tokens,
                    emit=lambda *_: True,
                    eos=eos,
                    source=prompt.source,
                    tops=self.tops,
                    gone=lambda: self.gone,
                )
                generation.emit = self._emit(p * self.count + n, text, generation)
                jobs.append(Writing(self.run.name, generation, self._put))
        return jobs

    def _emit(self, choice: int, text: Text, generation: Generation) -> Callable[..., bool]:
        def emit(ids: list[int], logprobs: list[float], tops: list[list[tuple[int, float]]], ended: str) -> bool:
            new, *tokens, finish = text.add(ids, logprobs, tops, ended)
            if new or finish:
                self._put(Piece(choice, new, *tokens, finish, generation.cached, len(text.ids)))
            return bool(finish) or self.gone

        return emit

    def _calls(self, seed: int) -> list[Call]:
        """A call for each prompt: masked and diffusion runs write block by block, those that want the same together."""
        request = self.request
        options: dict[str, Any] = {
            "temperature": 1.0 if request.temperature is None else request.temperature,
            "top_k": request.top_k,
            "top_p": 1.0 if request.top_p is None else request.top_p,
            "min_p": request.min_p,
            "num": self.count,
            "stop": tuple(request.stops),
            "threshold": request.threshold,
            "remask": bool(request.remask),
        }
        options |= {k: v for k, v in (("block", request.block), ("steps", request.steps)) if v is not None}
        chat = self.prompts[0].chat
        compute, alike = functools.partial(write_blocks, options, chat), ("write", chat, *sorted(options.items()))
        jobs = []
        for p, prompt in enumerate(self.prompts):
            item = InBlocks(prompt.prompt, prompt.max_tokens, seed, self._put, p * self.count, [""] * self.count)
            job = Call(self.run.name, compute, [item], alike, short=False, gone=lambda: self.gone)
            job.future.add_done_callback(self._failed)
            jobs.append(job)
        return jobs

    def _failed(self, future: Any) -> None:
        if not future.cancelled() and (error := future.exception()) is not None:
            self._put(error)

    async def __aiter__(self) -> AsyncIterator[Piece]:
        try:
            while self._open:
                event = await self._events.get()
                if isinstance(event, Exception):
                    raise event
                self._open -= bool(event.finish)
                yield event
        finally:
            self.gone = True


def infilling(run: Served, prompt: str, suffix: str, count: int) -> str:
    """A text with a gap of `count` masks.

    Raises:
      InputError: it holds masks already, or has no gap.
    """
    if MASK in prompt + suffix:
        raise InputError(f"a text with a gap in the middle holds no {MASK}; ask /fill, which fills those that a text has")
    if count < 1:
        raise InputError("max_tokens is the size of the gap before the suffix; it must be at least 1")
    if count > run.context_length:
        raise InputError(f"max_tokens is {count}, and the run's context {run.context_length}; ask for a smaller gap")
    return prompt + MASK * count + suffix
