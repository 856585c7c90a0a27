"""`bothways search`: the texts nearest to a query, and how often they are the right ones."""

import itertools
from pathlib import Path

import tyro

import bothways
from bothways.commands.shared import capability, emit, which
from bothways.errors import InputError
from bothways.log import log

Positional = tyro.conf.Positional
AGAIN = 50
"""Texts of each query that are reranked."""


def search(
    run: Positional[str],
    corpus: Positional[Path],
    queries: Positional[Path | None] = None,
    qrels: Path | None = None,
    split: str = "test",
    top: int = 10,
    bm25: bool = False,
    against: str = "",
    rerank: str = "",
    rerank_top: int = AGAIN,
    step: str = "newest",
    json: bool = False,
) -> None:
    """Find the texts nearest to each query by the vectors of a run; with right answers, print nDCG@10, MRR@10 and recall,
    and for two systems their differences, paired by query.

    Args:
        run: A run directory.
        corpus: Documents: BEIR's directory (corpus.jsonl, queries.jsonl, qrels/); a file with `_id` and `text`, or a text per
            line; or `bibles`: queries are held-out verses, documents a modern version (bibles:5: five words of each).
        queries: A file of queries, in the same formats; without it, those of the directory.
        qrels: A file of right answers: query-id, corpus-id and score, separated by tabs. A directory has its own.
        split: For a directory: the split whose queries are used, qrels/SPLIT.tsv.
        top: Number of texts for each query, best first; also the k of recall@k.
        bm25: Also rank by words alone, with BM25 (pip install 'bothways[search]').
        against: Another run for the same search, to compare with.
        rerank: A run that was fine-tuned on pairs of texts: it scores each query with its best texts, and reorders them.
        rerank_top: Number of best texts that are reranked.
        step: Which checkpoint: newest, best (on held-out text), or the step of a kept one.
        json: One JSON object per text, or per metric.
    """
    from bothways.data import bibles
    from bothways.data.config import DataConfig
    from bothways.data.retrieval import check_answers, collection
    from bothways.sample import search as of

    for name, value in (("--top", top), ("--rerank-top", rerank_top)):
        if value < 1:
            raise InputError(f"{name} is {value}; it must be at least 1")
    if rerank_top != AGAIN and not rerank:
        raise InputError("--rerank-top is for --rerank; leave it out, or name a run that reads pairs of texts")
    name, _, words = str(corpus).partition(":")
    if name == "bibles" and not corpus.exists():
        corpus = bibles.beir(Path(DataConfig.cache).expanduser(), f"kjv:{words}" if words else "kjv")
        log(f"BEIR's directory of the held-out books is {corpus}")
    if split != "test" and (queries or qrels or not corpus.is_dir()):
        raise InputError("--split is for BEIR's directory and its own queries; leave it out")
    found = collection(corpus, queries, qrels, split)
    # What is wrong with a text or an answer is found before any is embedded.
    check_answers(found.right, dict.fromkeys(name for name, _ in found.documents()))
    model = bothways.load(run, step=which(step))
    capability(model, "embed", "")
    if against:
        if not found.right:
            raise InputError(
                "--against compares by right answers, and there are none; name them with --qrels, or leave it out"
            )
        other = bothways.load(against)
        capability(other, "embed", "")
    scorer = of.pair_scorer(bothways.load(rerank)) if rerank else None
    depth = max(top, of.DEPTH if found.right else 1, rerank_top if rerank else 1)
    systems = {"bm25": of.by_words(found.queries, found.documents(), depth)} if bm25 else {}
    if against:
        systems["against"] = of.search(other, found.queries, found.documents(), depth)
    systems["search"] = ranking = of.search(model, found.queries, found.documents(), depth)
    if scorer is not None:
        best = {query: ranked[:rerank_top] for query, ranked in ranking.items()}
        wanted = {name for ranked in best.values() for name, _ in ranked}
        texts = {name: text for name, text in found.documents() if name in wanted}
        systems["rerank"] = of.reranked(scorer, best, found.queries, texts)
    if found.right:
        figures = [f for system, ranked in systems.items() for f in of.measures(ranked, found.right, top, system)]
        for one, two in itertools.combinations(reversed(systems), 2):
            figures += of.differences(systems[one], systems[two], found.right, top, f"{one}-{two}")
        for figure in figures:
            low, high = figure.interval
            shown = f"{figure.suite} {figure.metric} {figure.value:.4f} [{low:.4f}, {high:.4f}] ({figure.n} queries)"
            emit(figure, json, shown)
        return
    for system, ranked in systems.items():
        for query, texts_of in ranked.items():
            for rank, (name, score) in enumerate(texts_of[:top], 1):
                line = {"system": system, "query": query, "id": name, "score": round(score, 6), "rank": rank}
                emit(line, json, f"{system}\t{query}\t{rank}\t{name}\t{score:.4f}")
