"""Search by vectors: exact, in memory that does not grow with the texts; how well it finds; and a second reading of the best."""

import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bothways.data.metrics import Ratio
from bothways.data.retrieval import Right
from bothways.embedding import read_embedding
from bothways.errors import InputError
from bothways.sample.evaluate import Metric
from bothways.sample.predict import TaskPredictor

BLOCK = 2**13
"""Documents whose vectors are on the device at a time."""
QUERIES = 2**9
"""Queries that meet a block at a time: BLOCK x QUERIES scores are there at once, 16 MiB."""
PAIRS = 2**12
"""Pairs of texts that are encoded and scored at a time."""
DEPTH = 10
"""Ranks that nDCG and MRR look at."""

Ranking = dict[str, list[tuple[str, float]]]
"""Query -> (document, score), the best first."""
SIDES = {"query": ("query",), "document": ("document", "passage", "corpus")}
"""Names that a run's prompts for each side may have."""


def unit(vectors: np.ndarray) -> np.ndarray:
    """[texts, D] of length 1."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def embed_side(model: Any, texts: Sequence[str], side: str) -> np.ndarray:
    """[texts, D] of length 1, each behind the run's prompt for queries, or for documents, where it has one.

    Raises:
      InputError: vectors that are not finite.
    """
    said = model.embedding if hasattr(model, "embedding") else read_embedding(model.run.home)
    names = [name for name in SIDES[side] if said and name in said.prompts]
    found = model.embed(texts, prompt=names[0] if names else "")
    if not np.isfinite(found).all():
        raise InputError(f"the vectors of {model.run.home} are not finite: use an earlier checkpoint with --step")
    return unit(found)


@functools.partial(jax.jit, static_argnames="k")
def _best(
    queries: jax.Array, block: jax.Array, first: jax.Array, real: jax.Array, scores: jax.Array, where: jax.Array, k: int
) -> tuple[jax.Array, jax.Array]:
    """The k best of those so far, [Q, k] scores and numbers, and of a block [N, D] of documents from number `first` on, of
    which `real` are there. Of equals the earlier document comes first."""
    near = jnp.matmul(queries, block.T, precision="highest")
    at = jnp.arange(block.shape[0])
    near = jnp.where(at < real, near, -jnp.inf)
    both = jnp.concatenate([scores, near], axis=1)
    numbers = jnp.concatenate([where, jnp.broadcast_to(first + at, near.shape)], axis=1)
    best, chosen = jax.lax.top_k(both, k)
    return best, jnp.take_along_axis(numbers, chosen, axis=1)


def top_k(
    queries: np.ndarray, blocks: Iterable[np.ndarray], k: int, block: int = BLOCK, together: int = QUERIES
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest documents of each query by inner product, exactly.

    Args:
      queries: [Q, D].
      blocks: vectors [n, D] of documents, n at most `block`, which come one after the other.

    Returns:
      [Q, k] scores and numbers of documents, the best first; where there are fewer documents, -inf and -1 at the end.
    """
    parts = [queries[i : i + together] for i in range(0, len(queries), together)]
    size = min(together, len(queries))
    sent = [jnp.asarray(np.pad(part, ((0, size - len(part)), (0, 0)))) for part in parts]
    found = [(jnp.full((size, k), -jnp.inf), jnp.full((size, k), -1, jnp.int32)) for _ in parts]
    first = 0
    for vectors in blocks:
        filled = jnp.asarray(np.pad(vectors, ((0, block - len(vectors)), (0, 0))))
        found = [
            _best(part, filled, jnp.int32(first), jnp.int32(len(vectors)), *best, k)
            for part, best in zip(sent, found, strict=True)
        ]
        first += len(vectors)
    scores, numbers = (np.concatenate([np.asarray(best[i]) for best in found])[: len(queries)] for i in (0, 1))
    return scores, np.where(np.isfinite(scores), numbers, -1)


def search(
    model: Any, queries: dict[str, str], documents: Iterable[tuple[str, str]], k: int, block: int = BLOCK
) -> Ranking:
    """The k documents nearest to each query by the cosine of their vectors.

    In memory are the vectors of the queries and of one block of documents, the texts of that block, and all ids.

    Args:
      model: a run that can `embed`, as `bothways.load` gives it.
      documents: (id, text), gone through once.
    """
    names: list[str] = []
    stream = iter(documents)

    def blocks() -> Iterable[np.ndarray]:
        while held := list(itertools.islice(stream, block)):
            names.extend(name for name, _ in held)
            yield embed_side(model, [text for _, text in held], "document")

    scores, numbers = top_k(embed_side(model, list(queries.values()), "query"), blocks(), k, block)
    return {
        query: [(names[n], float(score)) for n, score in zip(at, of, strict=True) if n >= 0]
        for query, at, of in zip(queries, numbers, scores, strict=True)
    }


def by_words(queries: dict[str, str], documents: Iterable[tuple[str, str]], k: int) -> Ranking:
    """BM25 as the bm25s library has it by default: Lucene's, k1 = 1.5, b = 0.75, without English stop words. All texts are in
    memory.

    Raises:
      InputError: the library is not installed.
    """
    try:
        import bm25s
    except ModuleNotFoundError as e:
        raise InputError("BM25 is the library bm25s, which is not installed: pip install 'bothways[search]'") from e
    # Importing the library sets its logger to DEBUG, which any handler of the root logger would print.
    logging.getLogger("bm25s").setLevel(logging.WARNING)
    names, texts = zip(*documents, strict=True)
    index = bm25s.BM25()
    index.index(bm25s.tokenize(list(texts), show_progress=False), show_progress=False)
    asked = bm25s.tokenize(list(queries.values()), show_progress=False)
    numbers, scores = index.retrieve(asked, k=min(k, len(names)), show_progress=False)
    return {
        query: [(names[n], float(score)) for n, score in zip(at, of, strict=True)]
        for query, at, of in zip(queries, numbers, scores, strict=True)
    }


def pair_scorer(model: Any) -> TaskPredictor:
    """The run that orders texts anew. Raises InputError for one that was not fine-tuned on pairs, or gives them no score."""
    if not isinstance(model, TaskPredictor):
        raise InputError(f"{model.run.home} is not fine-tuned on pairs of texts; `bothways finetune` makes a run that is")
    model.check_pair_scores()
    return model


def reranked(scorer: TaskPredictor, ranking: Ranking, queries: dict[str, str], texts: dict[str, str]) -> Ranking:
    """The same documents in the order of a run that was fine-tuned on pairs of texts; of equals the earlier comes first.

    Args:
      texts: of all documents in the ranking.
    """
    pairs = ((queries[query], texts[name]) for query, found in ranking.items() for name, _ in found)
    parts = iter(lambda: list(itertools.islice(pairs, PAIRS)), [])
    scores = (score for part in parts for score in scorer.pair_scores(part))
    scored = {query: [(name, next(scores)) for name, _ in found] for query, found in ranking.items()}
    return {query: sorted(found, key=lambda pair: -pair[1]) for query, found in scored.items()}


# ---- how well ------------------------------------------------------------------------------------------------------


def ndcg(gains: Sequence[int], best: Sequence[int]) -> float:
    """Gains of what was found, by rank, over those of the best order (Järvelin and Kekäläinen 2002; gains as they are, as in
    trec_eval and BEIR)."""
    dcg: Callable[[Sequence[int]], float] = lambda of: sum(g / np.log2(i + 2) for i, g in enumerate(of[:DEPTH]))  # noqa: E731
    return float(dcg(gains) / dcg(sorted(best, reverse=True)))


def by_query(ranking: Ranking, right: Right, k: int) -> dict[str, list[float]]:
    """nDCG@10, MRR@10 and recall@k of each query, in the order of their names.

    Args:
      ranking: k documents of each query, and DEPTH at least.
      right: has a right answer for each.
    """
    of: dict[str, list[float]] = {f"ndcg@{DEPTH}": [], f"mrr@{DEPTH}": [], f"recall@{k}": []}
    for query in sorted(ranking):
        found = ranking[query]
        answers = {name: max(0, score) for name, score in right[query].items()}
        gains = [answers.get(name, 0) for name, _ in found]
        first = next((i for i, gain in enumerate(gains[:DEPTH], 1) if gain), 0)
        wanted = sum(score > 0 for score in answers.values())
        values = ndcg(gains, list(answers.values())), 1 / first if first else 0.0, sum(g > 0 for g in gains[:k]) / wanted
        for name, value in zip(of, values, strict=True):
            of[name].append(value)
    return of


def _figures(system: str, values: dict[str, np.ndarray]) -> list[Metric]:
    """Means over queries, with 95 % intervals by resampling queries."""
    figures = []
    for name, of in values.items():
        ratio = Ratio()
        ratio.add(of, np.ones(len(of)))
        figures.append(Metric(system, name, ratio.value, ratio.interval(), ratio.n, "queries"))
    return figures


def measures(ranking: Ranking, right: Right, k: int, system: str = "search") -> list[Metric]:
    """nDCG@10, MRR@10 and recall@k over queries, with 95 % intervals by resampling queries. As `by_query`."""
    return _figures(system, {name: np.array(values) for name, values in by_query(ranking, right, k).items()})


def differences(ranking: Ranking, other: Ranking, right: Right, k: int, system: str) -> list[Metric]:
    """What `measures` gives of a ranking minus that of another of the same queries, paired: 95 % intervals by resampling queries,
    each with both of its figures."""
    a, b = by_query(ranking, right, k), by_query(other, right, k)
    return _figures(system, {name: np.subtract(a[name], b[name]) for name in a})
