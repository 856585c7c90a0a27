"""Endpoints that answer at once: vectors, rankings, scores, fills, probabilities of tokens, labels; and what is there."""

import base64
import functools
import importlib.resources
import secrets
from typing import Any

import numpy as np
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from bothways.data.tokenizer import MASK
from bothways.errors import InputError
from bothways.serve import compute, shapes
from bothways.serve.http import Server, answer, read, server_of
from bothways.serve.runs import Served

MOST_TOKENS = 512
"""Of a text whose tokens are looked at one by one."""
MOST_OF_A_CHARACTER = 33
"""Tokens of one character at most: the bytes of U+FDFA in its compatibility decomposition, the longest that there is."""
PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
POLICY = "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'"


def as_list(given: str | list[str]) -> list[str]:
    return [given] if isinstance(given, str) else given


async def count_tokens(server: Server, run: Served, texts: list[str], first: str = "") -> int:
    """Tokens of some texts, each together with `first`; counted in a thread, since others wait for this one.

    Raises:
      InputError: more than a request may have.
    """

    def count() -> int:
        more = len(run.tokenizer.encode(first)) if first else 0
        return sum(map(len, run.tokenizer.encode_many(texts))) + more * len(texts)

    total = await run_in_threadpool(count)
    if total > server.settings.max_input:
        raise InputError(
            f"the request has {total:,} tokens in {len(texts):,} texts; at most {server.settings.max_input:,} are read at once: "
            "send the texts in parts"
        )
    return total


async def check_size(server: Server, run: Served, texts: list[str]) -> None:
    """The same where nobody wants the count: texts so short that they cannot have so many tokens are not encoded for it.

    Raises:
      InputError: more than a request may have.
    """
    if sum(map(len, texts)) * MOST_OF_A_CHARACTER + len(texts) > server.settings.max_input:
        await count_tokens(server, run, texts)


async def embeddings(request: Request) -> Response:
    given = await read(request, shapes.EmbeddingRequest)
    server = server_of(request)
    run = server.run(given.model, "embed")
    width = run.recipe.model.d_model
    if given.dimensions not in (None, width):
        raise HTTPException(400, f"the vectors of {run.name} have {width} dimensions; leave dimensions out")
    texts = await run_in_threadpool(shapes.texts_of, given.input, run.tokenizer)
    total = await count_tokens(server, run, texts)
    call = functools.partial(compute.embed, given.pool)
    rows = await server.compute(request, run, call, texts, ("embed", given.pool))

    def shown(row: np.ndarray) -> Any:
        base64_wanted = given.encoding_format == "base64"
        return base64.b64encode(row.astype("<f4").tobytes()).decode() if base64_wanted else row.tolist()

    server.metrics.prompt_tokens.labels(run.name).inc(total)
    data = [shapes.Embedding("embedding", i, shown(row)) for i, row in enumerate(rows)]
    return answer(shapes.Embeddings("list", run.name, data, shapes.Usage(total, total)))


async def rerank(request: Request) -> Response:
    given = await read(request, shapes.RerankRequest)
    server = server_of(request)
    run = server.run(given.model, "rerank")
    texts = [d if isinstance(d, str) else d.text for d in given.documents]
    total = await count_tokens(server, run, texts, given.query)
    pairs = [(given.query, text) for text in texts]
    found = await server.compute(request, run, compute.rank, pairs, "rank")
    order = sorted(range(len(texts)), key=lambda i: -found[i])[: given.top_n]
    ranked = [shapes.Ranked(i, found[i]) for i in order]
    if given.return_documents:
        for one in ranked:
            one.document = shapes.Document(texts[one.index])
    return answer(shapes.Ranking("rerank-" + secrets.token_hex(8), run.name, ranked, shapes.Usage(total, total)))


async def score(request: Request) -> Response:
    given = await read(request, shapes.ScoreRequest)
    server = server_of(request)
    run = server.run(given.model, "score")
    texts = as_list(given.input)
    await check_size(server, run, texts)
    call = functools.partial(compute.score, given.rule)
    found = await server.compute(request, run, call, texts, ("score", given.rule))
    return answer(shapes.Scores(run.name, [shapes.Scored(s.text, s.logprob, s.tokens, s.rule) for s in found]))


async def fill(request: Request) -> Response:
    given = await read(request, shapes.FillRequest)
    server = server_of(request)
    run = server.run(given.model, "fill")
    texts = as_list(given.input)
    await check_size(server, run, texts)
    call = functools.partial(compute.fill, given.top, given.steps)
    found = await server.compute(request, run, call, texts, ("fill", given.top, given.steps))
    data = [
        shapes.FilledText(f.text, f.filled, [[shapes.Candidate(**c) for c in mask] for mask in f.masks]) for f in found
    ]
    return answer(shapes.Fills(run.name, data))


async def tokens(request: Request) -> Response:
    given = await read(request, shapes.TokensRequest)
    server = server_of(request)
    run = server.run(given.model, "tokens")
    call = functools.partial(compute.token_probabilities, given.direction, given.top, MOST_TOKENS)
    alike = ("tokens", given.direction, given.top)
    [(direction, ids, logprobs, best, values)] = await server.compute(request, run, call, [given.text], alike)
    name = run.tokenizer.piece

    def candidates(i: int) -> list[shapes.Candidate]:
        pairs = zip(best[i].tolist(), np.exp(values[i]).tolist(), strict=True)
        return [shapes.Candidate(name(token), round(p, 5)) for token, p in pairs]

    found = [
        shapes.TextToken(name(t), round(float(np.exp(lp)), 5), candidates(i))
        for i, (t, lp) in enumerate(zip(ids, logprobs, strict=True))
    ]
    return answer(shapes.TextTokens(run.name, direction, found))


async def classify(request: Request) -> Response:
    given = await read(request, shapes.ClassifyRequest)
    server = server_of(request)
    run = server.run(given.model, "classify")
    texts = as_list(given.input)
    await check_size(server, run, texts)
    found = await server.compute(request, run, compute.classify, texts, "classify")
    return answer(shapes.Labels(run.name, [shapes.Label(f.text, f.label, f.p) for f in found]))


# ---- what is there -------------------------------------------------------------------------------------------------


def model_of(run: Served, context: int, loaded: bool) -> shapes.Model:
    diffusion = run.kind == "diffusion"
    sizes = list(run.recipe.objective.block_sizes) if diffusion else []
    mask = MASK if not run.refusal("fill") else None
    return shapes.Model(run.name, "model", run.created, "bothways", run.kind, run.abilities, context, sizes, mask, loaded)


async def models(request: Request) -> Response:
    server = server_of(request)
    runs = server.engine.runs
    found = [model_of(run, runs.context_of(run), name in runs.loaded) for name, run in server.runs.items()]
    return answer(shapes.Models("list", found))


async def model(request: Request) -> Response:
    server, name = server_of(request), request.path_params["model"]
    if name not in server.runs:
        raise HTTPException(404, f"there is no model {name[:100]!r}; there are: {', '.join(server.runs)}")
    run, runs = server.runs[name], server.engine.runs
    return answer(model_of(run, runs.context_of(run), name in runs.loaded))


async def health(request: Request) -> Response:
    if not server_of(request).engine.alive:
        raise HTTPException(503, "the engine has ended")
    return answer(shapes.Health("ok"))


async def metrics(request: Request) -> Response:
    return Response(generate_latest(server_of(request).metrics.registry), media_type=CONTENT_TYPE_LATEST)


async def page(request: Request) -> Response:
    name, kind = PAGE[request.url.path]
    text = (importlib.resources.files("bothways.serve") / "page" / name).read_bytes()
    return Response(text, media_type=kind, headers={"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"})
