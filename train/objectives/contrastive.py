"""Texts told apart by their vectors: the objective of embedding models, for bodies of either direction."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from bothways.config import ObjectiveConfig
from bothways.data import examples
from bothways.data.contrast_rows import ContrastRows
from bothways.data.pipeline import ExampleFn, RowSource
from bothways.data.tokens import Tokens
from bothways.embedding import EmbeddingInfo
from bothways.model.axes import constrain_activation
from bothways.model.loss import TokenLoss
from bothways.model.task import text_vectors
from bothways.recipes import Recipe
from bothways.train.objectives.core import Batch, Halves, Objective, Setting, Sums

Vectors = Float[jax.Array, "B N D"]
"""Of each text of each set, of length 1."""
HIDDEN = -1e30


def contrastive(cfg: ObjectiveConfig, setting: Setting) -> Objective:
    """Multiple-negatives ranking, triplets, or CoSENT, over the whole global batch."""
    of = {"ranking": ranking, "triplet": triplet, "cosent": cosent}[cfg.loss]

    def source(tokens: Tokens, length: int, padded: bool) -> tuple[RowSource, ExampleFn]:
        return ContrastRows(tokens, min(length, cfg.text_length or length), setting.vocabulary.pad), examples.as_is

    def weights(batch: Batch) -> dict[str, jax.Array]:
        return {"contrast": jnp.sum(batch["weight"])}

    def encode(module: Any, batch: Batch, deterministic: bool) -> Vectors:
        B, N, T = batch["tokens"].shape
        tokens, segments = (batch[name].reshape(B * N, T) for name in ("tokens", "segments"))
        features = module(tokens, segments=segments, deterministic=deterministic)
        features = features[0] if isinstance(features, tuple) else features
        return text_vectors(features.astype(jnp.float32), segments, cfg.pool).reshape(B, N, -1)

    def compare(found: Vectors, batch: Batch) -> Sums:
        each = [of(normalized(found[..., :width]), batch, cfg) for width in cfg.widths or (found.shape[-1],)]
        return {"contrast": TokenLoss(sum(x.nats for x in each), sum(x.correct for x in each) / len(each))}

    def terms(module: Any, batch: Batch, deterministic: bool) -> Sums:
        return compare(encode(module, batch, deterministic), batch)

    return Objective(source, weights, terms, Halves(encode, compare), embedding_of)


def embedding_of(recipe: Recipe) -> EmbeddingInfo:
    """How a run that was trained so makes vectors."""
    ask, data = recipe.objective, recipe.data
    prompts = {"query": data.query_prompt, "document": data.document_prompt}
    length = ask.text_length or recipe.model.context_length
    return EmbeddingInfo(ask.pool, True, length, {name: text for name, text in prompts.items() if text})


def normalized(vectors: Vectors) -> Vectors:
    """Of length 1, with a gradient where there is nothing but zeros."""
    return vectors * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(vectors), axis=-1, keepdims=True), 1e-24))


def cosines(a: Float[jax.Array, "B D"], b: Float[jax.Array, "C D"]) -> Float[jax.Array, "B C"]:
    return jnp.matmul(a, b.T, precision="highest")


def same(a: Int[jax.Array, "B 2"], b: Int[jax.Array, "C 2"]) -> jax.Array:
    """[B, C] which texts are the same to the model."""
    return jnp.all(a[:, None] == b[None], axis=-1)


def ranking(vectors: Vectors, batch: Batch, cfg: ObjectiveConfig) -> TokenLoss:
    """The text that belongs to each query, among all texts of the batch but the queries (multiple negatives ranking, arXiv
    1705.00652, section 4.4; InfoNCE).

    What is the same text as the one that belongs, or belongs to the same query in another set, is no negative.
    """
    B, N, D = vectors.shape
    # Each device keeps its queries; of the documents, all see all: the one thing that travels.
    documents = constrain_activation(vectors[:, 1:].reshape(B * (N - 1), D), None, None)
    ids = constrain_activation(batch["ids"], None, None, None)
    scores = cosines(vectors[:, 0], documents) / cfg.temperature
    own = jnp.arange(B)[:, None] * (N - 1) == jnp.arange(B * (N - 1))[None]
    belongs = same(batch["ids"][:, 1], ids[:, 1:].reshape(-1, 2))
    asked = same(batch["ids"][:, 0], ids[:, 0])  # [B, B]
    also = jnp.zeros((B, B, N - 1), bool).at[:, :, 0].set(asked).reshape(B, -1)
    real = jnp.repeat(constrain_activation(batch["weight"], None) > 0, N - 1)[None]
    scores = jnp.where(own | (real & ~belongs & ~also), scores, HIDDEN)
    right = jnp.sum(jnp.where(own, scores, 0.0), axis=1)
    nats = jax.nn.logsumexp(scores, axis=1) - right
    return TokenLoss(jnp.sum(batch["weight"] * nats), jnp.sum(batch["weight"] * (right >= jnp.max(scores, axis=1))))


def triplet(vectors: Vectors, batch: Batch, cfg: ObjectiveConfig) -> TokenLoss:
    """How far each hard negative is from being less near than the text that belongs, by a margin between cosines (arXiv
    1503.03832, section 3.1); the mean over the negatives of a set."""
    near = jnp.sum(vectors[:, :1] * vectors[:, 1:], axis=-1)
    excess = jnp.maximum(0.0, cfg.margin + near[:, 1:] - near[:, :1])
    right = near[:, 0] > jnp.max(near[:, 1:], axis=1)
    return TokenLoss(jnp.sum(batch["weight"] * jnp.mean(excess, axis=1)), jnp.sum(batch["weight"] * right))


def cosent(vectors: Vectors, batch: Batch, cfg: ObjectiveConfig) -> TokenLoss:
    """log(1 + the sum over pairs i, j with a lower score for i of exp((cosine_i - cosine_j) / temperature)): cosines in the
    order of the scores (https://kexue.fm/archives/8847), and the share of i, j in this order. A batch has one loss: both
    count as many times as there are pairs, so that held-out batches weigh what is in them."""
    near = jnp.sum(vectors[:, 0] * vectors[:, 1], axis=-1)
    near, score, weight = (constrain_activation(x, None) for x in (near, batch["score"], batch["weight"]))
    counts = (score[:, None] < score[None]) & (weight[:, None] * weight[None] > 0)
    apart = jnp.where(counts, (near[:, None] - near[None]) / cfg.temperature, HIDDEN)
    ordered = jnp.sum(counts & (near[:, None] < near[None])) / jnp.maximum(jnp.sum(counts), 1)
    count = jnp.sum(weight)
    return TokenLoss(count * jax.nn.logsumexp(jnp.append(apart.reshape(-1), 0.0)), count * ordered)
