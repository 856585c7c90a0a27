"""The description of every endpoint, made from the shapes that read and write them."""

import importlib.metadata
from typing import Any

import msgspec

from bothways.serve import shapes

ENDPOINTS: dict[str, tuple[str, Any, Any]] = {
    "/v1/completions": (
        "Continue prompts; with a suffix, fill the gap between",
        shapes.CompletionRequest,
        shapes.Completion,
    ),
    "/v1/chat/completions": ("Answer a chat", shapes.ChatRequest, shapes.ChatCompletion),
    "/v1/embeddings": ("A vector for each text", shapes.EmbeddingRequest, shapes.Embeddings),
    "/v1/rerank": ("Order documents by how well they answer a query", shapes.RerankRequest, shapes.Ranking),
    "/rerank": ("As /v1/rerank", shapes.RerankRequest, shapes.Ranking),
    "/score": ("Log-probability of each text, in nats", shapes.ScoreRequest, shapes.Scores),
    "/fill": ("Fill the masks of each text", shapes.FillRequest, shapes.Fills),
    "/tokens": (
        "Probability of every token of a text, and what else could stand there",
        shapes.TokensRequest,
        shapes.TextTokens,
    ),
    "/classify": ("Labels from a fine-tuned run", shapes.ClassifyRequest, shapes.Labels),
}
"""Paths that take a JSON body: what they do, what they take, what they give."""
STREAMS = ("/v1/completions", "/v1/chat/completions")
ERRORS = {
    "400": "The request cannot be answered; the message says why",
    "401": "The key is missing or wrong",
    "404": "No such model",
    "413": "The body is too long",
    "429": "The queue is full; Retry-After says when to try again",
    "500": "A fault of the server",
    "503": "The run cannot be loaded now",
    "504": "The time is over",
}


def description() -> dict[str, Any]:
    """In OpenAPI 3.1."""
    kinds = [kind for _, *pair in ENDPOINTS.values() for kind in pair]
    given = [*dict.fromkeys(kinds), shapes.Models, shapes.Model, shapes.Health, shapes.Error]
    references, components = msgspec.json.schema_components(given, ref_template="#/components/schemas/{name}")
    schema = dict(zip(given, references, strict=True))

    def body(kind: Any) -> dict[str, Any]:
        return {"application/json": {"schema": schema[kind]}}

    def responses(kind: Any, *codes: str) -> dict[str, Any]:
        found: dict[str, Any] = {"200": {"description": "The answer", "content": body(kind)}}
        return found | {code: {"description": ERRORS[code], "content": body(shapes.Error)} for code in codes}

    paths: dict[str, Any] = {}
    for path, (summary, takes, gives) in ENDPOINTS.items():
        answers = responses(gives, *ERRORS)
        if path in STREAMS:
            answers["200"]["content"]["text/event-stream"] = {"schema": {"type": "string"}}
        paths[path] = {
            "post": {"summary": summary, "requestBody": {"required": True, "content": body(takes)}, "responses": answers}
        }
    name = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    got = {
        "/v1/models": ("Runs that are served", shapes.Models, ()),
        "/health": ("Whether it runs", shapes.Health, ("503",)),
    }
    for path, (summary, gives, codes) in got.items():
        paths[path] = {"get": {"summary": summary, "responses": responses(gives, "401", *codes)}}
    one = {"summary": "One run", "parameters": [name], "responses": responses(shapes.Model, "401", "404")}
    paths["/v1/models/{model}"] = {"get": one}
    figures = {"200": {"description": "Figures", "content": {"text/plain": {"schema": {"type": "string"}}}}}
    paths["/metrics"] = {"get": {"summary": "Figures for Prometheus", "responses": figures}}
    info = {"title": "bothways serve", "version": importlib.metadata.version("bothways")}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": {"schemas": components}}
