"""The server put together: routes, engine, and how both begin and end."""

import contextlib
import socket
from collections.abc import AsyncIterator

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from bothways.serve import ask, generate, openapi
from bothways.serve.engine import Engine
from bothways.serve.http import SHOWN, Guard, Metrics, Server, Settings, answer

ASKED = {
    "/v1/completions": generate.completions,
    "/v1/chat/completions": generate.chat_completions,
    "/v1/embeddings": ask.embeddings,
    "/v1/rerank": ask.rerank,
    "/rerank": ask.rerank,
    "/score": ask.score,
    "/fill": ask.fill,
    "/tokens": ask.tokens,
    "/classify": ask.classify,
}
SEEN = {
    "/v1/models": ask.models,
    "/health": ask.health,
    "/metrics": ask.metrics,
    **dict.fromkeys(ask.PAGE, ask.page),
}


def listen(config: uvicorn.Config) -> socket.socket:
    """The socket that a server of this configuration listens on. Answers go out at once: with Nagle's algorithm the body of
    each would wait for the client's acknowledgement of its head, which comes 40 ms late. asyncio turns it off only for
    sockets that name TCP as their protocol, and uvicorn's do not; connections take it over from the socket.

    Raises:
      SystemExit: the address or port is not to be had.
    """
    listening = config.bind_socket()
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def make_app(engine: Engine, settings: Settings | None = None) -> Starlette:
    """The application, in front of an engine that it starts and stops."""
    settings = settings or Settings()
    server = Server(engine, engine.runs.served, settings, Metrics(engine))
    described = openapi.description()

    async def description(request: Request) -> Response:
        return answer(described)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        engine.start()
        yield
        engine.stop()

    routes = [Route(path, endpoint, methods=["POST"]) for path, endpoint in ASKED.items()]
    routes += [Route(path, endpoint, methods=["GET"]) for path, endpoint in SEEN.items()]
    routes += [Route("/v1/models/{model}", ask.model, methods=["GET"]), Route("/openapi.json", description)]
    around = [Middleware(Guard, server=server, paths=(*ASKED, *SEEN))]
    if settings.cors:
        allowed = {"allow_origins": settings.cors, "allow_methods": ["*"], "allow_headers": ["*"]}
        around.insert(0, Middleware(CORSMiddleware, **allowed))
    app = Starlette(routes=routes, middleware=around, exception_handlers=SHOWN, lifespan=lifespan)
    app.state.server = server
    return app
