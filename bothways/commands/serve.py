"""`bothways serve`: serves runs over HTTP, with a page."""

import math
import os
import signal
from pathlib import Path

import tyro

from bothways.commands.shared import ONE
from bothways.config import MeshConfig
from bothways.errors import InputError
from bothways.log import log

Positional = tyro.conf.Positional
KEY = "BOTHWAYS_API_KEY"


def serve(
    runs: Positional[tuple[str, ...]],
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key_file: Path | None = None,
    cors: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    slots: int = 16,
    context: int = 2048,
    memory: float = 0.0,
    queue: int = 256,
    timeout: float = 300.0,
    max_tokens: int = 65_536,
    max_input: int = 300_000,
    max_body: int = 2**20,
    warm: bool = False,
    merge_adapters: bool = True,
    mesh: MeshConfig = ONE,
) -> None:
    """Serve runs over HTTP: OpenAI's endpoints, /rerank, /score, /fill, /tokens, /classify, and a page at /.

    Args:
        runs: Run directories; NAME=DIRECTORY serves a run under another name than that of its directory.
        host: Address to listen on; 0.0.0.0 lets other machines in.
        port: Port to listen on; 0 takes a free one.
        api_key_file: A file with the key that requests must carry; or set BOTHWAYS_API_KEY.
        cors: An origin whose pages may send requests; may be given several times.
        slots: Texts that a run generates at a time, token by token; others wait.
        context: Most tokens of a prompt and its continuation together, if the run's own context is longer.
        memory: GiB for parameters and slots; beyond that, the least recently used runs are unloaded. 0: no limit.
        queue: Requests that may wait; more get status 429.
        timeout: Seconds that a request may take; also the time that running requests have after SIGTERM.
        max_tokens: Most tokens that a request may ask for, all its choices together.
        max_input: Most tokens in the texts of a request that embeds, ranks, scores, fills or classifies.
        max_body: Most bytes of a request's body.
        warm: Before the port opens, load every run and compile what its slots need, and the embeddings of masked runs and
            embedders. Scores, fills, writing in blocks and fine-tuned heads compile at the first request.
        merge_adapters: Merge adapters into their base. With --no-merge-adapters they stay apart from it, and a base that
            several runs share is in memory once; each token takes longer.
        mesh: Devices over which the parameters are sharded.
    """
    try:
        import uvicorn

        from bothways.serve import app, engine, http
        from bothways.serve import runs as served_runs
        from bothways.serve import warm as warming
    except ModuleNotFoundError as e:
        raise InputError(f"serve needs {e.name}: pip install 'bothways[serve]'") from e

    if not runs:
        raise InputError("serve wants at least one run: bothways serve runs/shakespeare_gpt")
    numbers = {"slots": slots, "context": context, "queue": queue, "timeout": timeout, "max-tokens": max_tokens}
    for name, value in (numbers | {"max-input": max_input, "max-body": max_body}).items():
        if not 1 <= value < math.inf:
            raise InputError(f"{name} is {value}; it must be at least 1, and finite")
    if not 0 <= memory < math.inf or not 0 <= port < 65536:
        raise InputError(f"memory is {memory} and port {port}: wanted 0 or more GiB, and a port from 0 to 65535")
    settings = http.Settings(read_key(api_key_file), cors, max_body, timeout, max_tokens, max_input)
    room = int(memory * 2**30)
    limits = served_runs.Limits(slots=slots, context=context, memory=room, merge_adapters=merge_adapters)
    loaded = served_runs.Runs(served_runs.named(runs), limits, mesh)
    warming.tell_memory(loaded)
    if host not in ("127.0.0.1", "localhost", "::1") and not settings.api_key:
        log(f"anybody who reaches {host}:{port} may use it: no key is set (--api-key-file, or {KEY})")
    application = app.make_app(engine.Engine(loaded, queue), settings)
    config = uvicorn.Config(
        application,
        host,
        port,
        log_level="warning",
        timeout_graceful_shutdown=int(timeout),
        timeout_keep_alive=75,  # a client that sends on a connection while it is being closed loses its request
        server_header=False,
    )
    server = uvicorn.Server(config)
    try:
        config.load()
        listening = app.listen(config)
    except SystemExit as e:
        raise InputError(f"cannot listen on {host}:{port}; another program may, or the address is not ours") from e
    if warm:
        warming.warm(loaded)
    # uvicorn ends the process by the signal that it got once all requests are answered; that is no failure.
    signal.signal(signal.SIGTERM, lambda *_: None)
    log(f"serving {', '.join(loaded.served)} at http://{host}:{listening.getsockname()[1]}/")
    server.run(sockets=[listening])


def read_key(path: Path | None) -> str:
    """The key from a file, or from the environment; empty if none is set.

    Raises:
      InputError: the file cannot be read, or holds no key.
    """
    if path is None:
        return os.environ.get(KEY, "").strip()
    if not path.is_file():
        raise InputError(f"no file {path}")
    try:
        key = path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as e:
        raise InputError(f"{path} is not text in UTF-8: {e}") from e
    if not key:
        raise InputError(f"{path} is empty; write the key into it")
    return key
