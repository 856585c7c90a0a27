"""/v1/completions and /v1/chat/completions, whole or as a stream of events."""

import asyncio
import functools
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import jax
import msgspec
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from bothways.data import chat
from bothways.errors import InputError
from bothways.log import log
from bothways.sample.sampling_params import SamplingParams
from bothways.sample.text import draw_keys
from bothways.serve import shapes
from bothways.serve.http import Server, answer, error_of, read, server_of, status_of, while_connected
from bothways.serve.runs import IN_SLOTS, Served
from bothways.serve.writing import Piece, Wanted, Written, infilling, method_of, seed_of, wanted

USUAL_TOKENS = 16
"""Of /v1/completions where a request does not say, as OpenAI has it."""


class Answer:
    """The shapes of one request's answers."""

    def __init__(self, run: Served, request: shapes.Drawing, written: Written, tops: int | None):
        self.run, self.request, self.written, self.tops = run, request, written, tops
        self.chat = isinstance(request, shapes.ChatRequest)
        self.id = ("chatcmpl-" if self.chat else "cmpl-") + secrets.token_hex(12)
        self.created = int(time.time())
        self.offsets: dict[int, int] = {}

    def logprobs(self, piece: Piece) -> Any:
        if self.tops is None:
            return None
        name = self.run.tokenizer.piece

        def top(token: int, logprob: float) -> dict[str, Any]:
            return {"token": name(token), "logprob": logprob, "bytes": list(name(token).encode())}

        pairs = list(zip(piece.tokens, piece.logprobs, strict=True))
        if self.chat:
            tops = piece.tops or [[] for _ in pairs]
            return shapes.ChatLogprobs(
                [
                    shapes.ChatToken(**top(*pair), top_logprobs=[shapes.ChatTop(**top(*other)) for other in others])
                    for pair, others in zip(pairs, tops, strict=True)
                ]
            )
        names, offset = [name(t) for t in piece.tokens], self.offsets.get(piece.choice, 0)
        offsets = [offset + sum(map(len, names[:i])) for i in range(len(names))]
        self.offsets[piece.choice] = offset + sum(map(len, names))
        tops = [{name(t): lp for t, lp in others} for others in piece.tops] if self.tops else None
        return shapes.TokenLogprobs(names, list(piece.logprobs), tops, offsets)

    def whole(self, choices: list[Any], usage: shapes.Usage | msgspec.UnsetType, stream: bool = False) -> Any:
        name = self.run.name
        if self.chat:
            kind = "chat.completion.chunk" if stream else "chat.completion"
            return shapes.ChatCompletion(self.id, kind, self.created, name, choices, usage)
        return shapes.Completion(self.id, "text_completion", self.created, name, choices, usage)

    def choice(self, piece: Piece, stream: bool, first: bool = True) -> Any:
        finish: Any = piece.finish or None
        if not self.chat:
            return shapes.CompletionChoice(piece.choice, piece.text, self.logprobs(piece), finish)
        message = shapes.ChatMessage(content=piece.text)
        if first:
            message.role = "assistant"
        part = {"delta" if stream else "message": message}
        return shapes.ChatChoice(index=piece.choice, logprobs=self.logprobs(piece), finish_reason=finish, **part)

    def usage(self, counts: dict[int, int], cached: dict[int, int]) -> shapes.Usage:
        prompt = sum(len(p.source or p.ids) for p in self.written.prompts)
        written, kept = sum(counts.values()), shapes.PromptDetails(sum(cached.values()))
        return shapes.Usage(prompt, prompt + written, written, kept)


async def respond(request: Request, given: shapes.Drawing, found: Answer, echo: list[str] | None = None) -> Response:
    """The answer to a request whose texts are being written.

    Args:
      echo: what every choice begins with.
    """
    server, written = server_of(request), found.written
    counts: dict[int, int] = {}
    cached: dict[int, int] = {}
    began = time.monotonic()
    server.metrics.prompt_tokens.labels(found.run.name).inc(sum(len(p.ids) for p in written.prompts))

    async def pieces() -> AsyncIterator[Piece]:
        since: dict[int, float] = {}
        async for piece in written:
            now = time.monotonic()
            if not since:
                server.metrics.first.observe(now - began)
            if piece.choice in since:
                server.metrics.gap.observe((now - since[piece.choice]) / max(1, len(piece.tokens)))
            since[piece.choice] = now
            if piece.finish:
                counts[piece.choice] = piece.count
                server.metrics.written.labels(found.run.name).inc(piece.count)
            if piece.choice % written.count == 0:
                cached[piece.choice] = piece.cached
            yield piece

    stream = pieces()
    if given.stream:
        return await _streamed(request, given, found, stream, counts, cached, echo)

    async def all_of_them() -> dict[int, Piece]:
        whole: dict[int, Piece] = {}
        async for piece in stream:
            before = whole.setdefault(piece.choice, piece)
            if before is not piece:
                before.text += piece.text
                before.tokens, before.logprobs = before.tokens + piece.tokens, before.logprobs + piece.logprobs
                before.tops, before.finish = before.tops + piece.tops, piece.finish
        return whole

    try:
        whole = await while_connected(request, all_of_them(), server.settings.seconds)
    finally:
        written.gone = True
    for choice, piece in whole.items():
        piece.text = (echo[choice // written.count] if echo else "") + piece.text
    choices = [found.choice(whole[i], stream=False) for i in sorted(whole)]
    return answer(found.whole(choices, found.usage(counts, cached)))


async def _streamed(
    request: Request,
    given: shapes.Drawing,
    found: Answer,
    stream: AsyncIterator[Piece],
    counts: dict[int, int],
    cached: dict[int, int],
    echo: list[str] | None,
) -> Response:
    server, written = server_of(request), found.written
    seconds, ends = server.settings.seconds, time.monotonic() + server.settings.seconds
    options = given.stream_options
    try:
        # A run that cannot be loaded is an answer of its own, so headers wait for the first piece.
        first = await while_connected(request, anext(stream), seconds)
    except BaseException:
        written.gone = True
        raise

    def event(value: Any) -> bytes:
        return b"data: " + msgspec.json.encode(value) + b"\n\n"

    async def events() -> AsyncIterator[bytes]:
        piece, started = first, set()
        try:
            async with asyncio.timeout(max(0.0, ends - time.monotonic())):
                while piece is not None:
                    new = piece.choice not in started
                    started.add(piece.choice)
                    if new and echo:
                        piece.text = echo[piece.choice // written.count] + piece.text
                    choice = found.choice(piece, stream=True, first=new)
                    yield event(found.whole([choice], msgspec.UNSET, stream=True))
                    piece = await anext(stream, None)
            if options is not None and options.include_usage:
                yield event(found.whole([], found.usage(counts, cached), stream=True))
            yield b"data: [DONE]\n\n"
        except Exception as e:  # the headers are out: the error is the last event
            status, message = status_of(e)
            log(f"{found.run.name}: a stream ended by {type(e).__name__}: {e}")
            yield event(error_of(status, message))
        finally:
            written.gone = True

    return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


def check_total(server: Server, run: Served, given: shapes.Drawing, prompts: list[Wanted]) -> None:
    """Raises InputError for more tokens than a request may ask for."""
    total = sum(p.max_tokens for p in prompts) * (given.n or 1)
    if total > server.settings.max_tokens:
        raise InputError(
            f"the request asks for {total:,} tokens in all; at most {server.settings.max_tokens:,} are given"
        )


def check_logprobs(run: Served, wants: bool) -> None:
    if wants and run.kind not in IN_SLOTS:
        raise InputError(
            f"{run.name} writes blocks of masked tokens, whose probabilities have no order; leave logprobs out"
        )


async def completions(request: Request) -> Response:
    given = await read(request, shapes.CompletionRequest)
    server = server_of(request)
    run = server.run(given.model, "infill" if given.suffix else "complete")
    texts = await run_in_threadpool(shapes.texts_of, given.prompt, run.tokenizer)
    if given.suffix:
        return await infill(request, given, run, texts)
    context = server.engine.runs.context_of(run)
    prompts = await run_in_threadpool(
        lambda: [
            wanted(run, context, text, given.max_tokens, USUAL_TOKENS) for text in texts
        ]  # others wait for this thread
    )
    check_total(server, run, given, prompts)
    check_logprobs(run, given.logprobs is not None)
    if given.echo and given.logprobs is not None:
        raise InputError("echo with logprobs is not supported; /tokens gives the probabilities of a text's tokens")
    written = Written(server.engine, run, given, prompts, given.logprobs or 0)
    written.start()
    found = Answer(run, given, written, given.logprobs)
    return await respond(request, given, found, texts if given.echo else None)


async def chat_completions(request: Request) -> Response:
    given = await read(request, shapes.ChatRequest)
    server = server_of(request)
    run = server.run(given.model, "chat")
    messages = [{"role": m.role, "content": m.text} for m in given.messages]
    most = given.max_completion_tokens or given.max_tokens

    def encoded() -> Wanted:
        prompt = chat.render(run.tokenizer, messages)
        context = server.engine.runs.context_of(run)
        found = wanted(run, context, prompt, most, None, chat.encode(run.tokenizer, prompt))
        if most is None:  # as many as fit, and no more than a request may have
            found.max_tokens = max(1, min(found.max_tokens, server.settings.max_tokens // (given.n or 1)))
        return found

    prompts = [await run_in_threadpool(encoded)]
    check_total(server, run, given, prompts)
    check_logprobs(run, given.logprobs)
    if given.top_logprobs and not given.logprobs:
        raise InputError("top_logprobs needs logprobs: true")
    written = Written(server.engine, run, given, prompts, given.top_logprobs or 0)
    written.start()
    tops = (given.top_logprobs or 0) if given.logprobs else None
    return await respond(request, given, Answer(run, given, written, tops))


def fill_gaps(
    method: SamplingParams,
    options: dict[str, Any],
    count: int,
    model: Any,
    texts: list[tuple[str, int]],
    between: Callable[[], None],
) -> list[list[str]]:
    """For every (text with a gap of masks, seed) what stands in the gap, `count` times."""
    both = getattr(model, "both_ways", model)
    rows = [both.encode_masked(text) for text, _ in texts for _ in range(count)]
    masks = [[i for i, token in enumerate(row) if token == both.tokenizer.mask] for row in rows]
    keys = draw_keys([text for text, _ in texts], count, [seed for _, seed in texts])
    both.fill_rows(rows, masks, method=jax.tree.map(jax.numpy.asarray, method), keys=keys, **options)
    found = [both.tokenizer.decode(row[at[0] : at[-1] + 1]) for row, at in zip(rows, masks, strict=True)]
    return [found[i : i + count] for i in range(0, len(found), count)]


async def infill(request: Request, given: shapes.CompletionRequest, run: Served, texts: list[str]) -> Response:
    """Completions with a suffix: a gap of max_tokens masks, filled with what fits on both sides."""
    for name in ("stream", "logprobs", "stop", "echo", "block"):
        if getattr(given, name) not in (None, False, "", []):
            raise InputError(f"{name} is not for a gap in the middle, which is filled as a whole: leave it out")
    server, size = server_of(request), given.max_tokens or USUAL_TOKENS
    suffix = given.suffix or ""
    gaps = await run_in_threadpool(lambda: [infilling(run, text, suffix, size) for text in texts])
    encoded = await run_in_threadpool(run.tokenizer.encode_many, [text + suffix for text in texts])
    prompts = [Wanted(text, ids, [], size) for text, ids in zip(texts, encoded, strict=True)]
    check_total(server, run, given, prompts)
    n, seed = given.n or 1, seed_of(given)
    options = {"steps": given.steps or 0, "threshold": given.threshold, "remask": bool(given.remask)}
    compute = functools.partial(fill_gaps, method_of(given), options, n)
    drawing = (given.temperature, given.top_k, given.top_p, given.min_p)
    alike = ("infill", n, *drawing, *options.values())
    found = await server.compute(request, run, compute, [(gap, seed) for gap in gaps], alike)
    choices = [
        shapes.CompletionChoice(i * n + k, text, None, "length")
        for i, some in enumerate(found)
        for k, text in enumerate(some)
    ]
    prompt, written = sum(len(p.ids) for p in prompts), size * len(choices)
    server.metrics.written.labels(run.name).inc(written)
    usage = shapes.Usage(prompt, prompt + written, written)
    identity = "cmpl-" + secrets.token_hex(12)
    return answer(shapes.Completion(identity, "text_completion", int(time.time()), run.name, choices, usage))
