"""What every endpoint shares: reading a request, errors in OpenAI's shape, who may ask, clients that go away, figures."""

import asyncio
import dataclasses
import hmac
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bothways.errors import InputError
from bothways.serve.engine import Call, Engine, QueueFull, Unavailable
from bothways.serve.runs import Served
from bothways.serve.shapes import Error, ErrorBody, refuse_unsupported

T = TypeVar("T")
OPEN = ("/", "/health", "/page.css", "/page.js", "/openapi.json")
"""Paths that want no key: they tell nothing of the runs."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What requests may take, and who may make them.

    `body` in bytes; `seconds` that a request may take; `max_tokens` that it may ask for, all choices together; `max_input`
    tokens of the texts that it has read.
    """

    api_key: str = ""
    cors: tuple[str, ...] = ()
    body: int = 2**20
    seconds: float = 300.0
    max_tokens: int = 65_536
    max_input: int = 300_000


class Metrics:
    """Figures in Prometheus' form, of one server."""

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()
        args: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("bothways_requests", "Requests answered", ["path", "status"], **args)
        self.prompt_tokens = Counter("bothways_prompt_tokens", "Tokens of prompts read", ["model"], **args)
        self.written = Counter("bothways_generation_tokens", "Tokens written", ["model"], **args)
        buckets = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
        self.first = Histogram("bothways_time_to_first_token_seconds", "Until the first text", buckets=buckets, **args)
        self.gap = Histogram(
            "bothways_time_per_token_seconds", "A token of a text after its first", buckets=buckets, **args
        )
        self.seconds = Histogram("bothways_request_seconds", "Until the answer", ["path"], buckets=buckets, **args)
        for name, text, value in (
            ("bothways_requests_waiting", "Requests in the queue", lambda: engine.waiting),
            ("bothways_slots_busy", "Slots that hold a text", lambda: engine.busy_slots),
            ("bothways_runs_loaded", "Runs in memory", lambda: len(engine.runs.loaded)),
            ("bothways_runs_bytes", "Memory of the loaded runs and their slots", lambda: engine.runs.bytes),
        ):
            Gauge(name, text, **args).set_function(value)


@dataclasses.dataclass(frozen=True)
class Server:
    """What endpoints work with; `request.app.state.server`."""

    engine: Engine
    runs: dict[str, Served]
    settings: Settings
    metrics: Metrics

    def run(self, name: str, what: str) -> Served:
        """The run of a request that wants something.

        Raises:
          HTTPException: 404, there is none of that name.
          InputError: it cannot do this.
        """
        if name not in self.runs:
            raise HTTPException(404, f"there is no model {name[:100]!r}; there are: {', '.join(self.runs)}")
        if why := self.runs[name].refusal(what):
            raise InputError(why)
        return self.runs[name]

    async def compute(
        self, request: Request, run: Served, compute: Callable[..., list[Any]], items: list[Any], alike: Any
    ) -> list[Any]:
        """What a call gives, computed with others like it."""
        gone = False
        call = Call(run.name, compute, items, alike, gone=lambda: gone)
        self.engine.submit(call)
        try:
            return await while_connected(request, asyncio.wrap_future(call.future), self.settings.seconds)
        finally:
            gone = True


def number(text: str) -> int | float:
    """A JSON number with a fraction or an exponent: 12.0 is an integer, as JSON Schema has it."""
    value = float(text)
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


PLAIN = msgspec.json.Decoder(float_hook=number)


def server_of(request: Request) -> Server:
    return request.app.state.server


async def read(request: Request, shape: type[T]) -> T:
    """The body of a request.

    Raises:
      InputError: no JSON, or not of this shape.
      HTTPException: 413, longer than the server takes.
    """
    limit, parts, size = server_of(request).settings.body, [], 0
    async for part in request.stream():
        parts.append(part)
        size += len(part)
        if size > limit:
            raise HTTPException(413, f"the body is longer than {limit:,} bytes")
    try:
        text = b"".join(parts)
        text.decode("utf-8")
        plain = PLAIN.decode(text)
        found = msgspec.convert(plain, shape)
        refuse_unsupported(plain)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise InputError(f"the body is not what this endpoint takes: {e}") from e
    return found


async def while_connected(request: Request, work: Awaitable[T], seconds: float) -> T:
    """The result of `work`, which is cancelled when the client goes away or the time is over.

    Raises:
      ClientDisconnect, TimeoutError.
    """

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, left = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        done, _ = await asyncio.wait({task, left}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task in done:
            return task.result()
        raise ClientDisconnect if left in done else TimeoutError
    finally:
        task.cancel()
        left.cancel()


def answer(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, headers, "application/json")


# ---- errors --------------------------------------------------------------------------------------------------------

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "unavailable_error",
    504: "timeout_error",
}
CODES = {401: "invalid_api_key", 404: "not_found", 413: "body_too_long", 429: "queue_full", 504: "timeout"}


def error_of(status: int, message: str) -> Error:
    return Error(ErrorBody(message, KINDS.get(status, "server_error"), None, CODES.get(status)))


def status_of(error: Exception) -> tuple[int, str]:
    """The status and the message that a client sees of an error: never a traceback."""
    if isinstance(error, HTTPException):
        return error.status_code, str(error.detail)
    if isinstance(error, InputError):
        return 400, str(error)
    if isinstance(error, QueueFull):
        return 429, "as many requests wait as the queue holds; try again in a second"
    if isinstance(error, Unavailable):
        return 503, str(error)
    if isinstance(error, TimeoutError):
        return 504, "the time that a request may take is over; ask for less"
    return 500, "something failed in the server, which wrote down what it was; other requests go on"


async def show_error(request: Request, error: Exception) -> Response:
    status, message = status_of(error)
    headers = {"Retry-After": "1"} if status in (429, 503) else {}
    if isinstance(error, HTTPException) and error.headers:
        headers |= dict(error.headers)
    return answer(error_of(status, message), status, headers)


async def show_nothing(request: Request, error: Exception) -> Response:
    """To a client that has gone."""
    return Response(status_code=499)


SHOWN: dict[Any, Any] = {
    **dict.fromkeys((HTTPException, InputError, QueueFull, Unavailable, TimeoutError, Exception), show_error),
    ClientDisconnect: show_nothing,
}


# ---- around every endpoint -----------------------------------------------------------------------------------------


class Guard:
    """Asks for the key, counts, and says to browsers what the page may do."""

    def __init__(self, app: ASGIApp, server: Server, paths: tuple[str, ...]):
        self.app, self.server, self.paths = app, server, paths
        self.key = server.settings.api_key.encode()

    def allowed(self, scope: Scope) -> bool:
        if not self.key or scope["path"] in OPEN or scope["method"] == "OPTIONS":
            return True
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        return hmac.compare_digest(given.removeprefix(b"Bearer "), self.key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path, began, status = scope["path"] if scope["path"] in self.paths else "other", time.monotonic(), 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-content-type-options", b"nosniff")]
            await send(message)

        try:
            if self.allowed(scope):
                await self.app(scope, receive, watched)
            else:
                refused = error_of(401, "this server wants its key: `Authorization: Bearer KEY`")
                await answer(refused, 401, {"WWW-Authenticate": "Bearer"})(scope, receive, watched)
        finally:
            self.server.metrics.requests.labels(path, str(status)).inc()
            self.server.metrics.seconds.labels(path).observe(time.monotonic() - began)
