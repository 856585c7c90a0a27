"""Before the port opens: what the runs will take, and programs of slots and embeddings, compiled."""

from collections.abc import Callable

import numpy as np

from bothways.embedding import EmbeddingInfo
from bothways.log import log
from bothways.sample.batching import rows_that_fit
from bothways.sample.decode import bucket, close_bucket
from bothways.serve.compute import PORTION
from bothways.serve.runs import Loaded, Runs, Served


def tell_memory(runs: Runs) -> None:
    """What each run takes once it is loaded, counted from shapes."""
    limits, total, bases = runs.limits, 0, set()
    for run in runs.served.values():
        size = runs.context_of(run)
        params, cache = run.bytes, run.cache_bytes(limits.slots, size)
        base = runs.bases.get(run.name)
        total += params + cache - (run.base_bytes if base in bases else 0)
        bases |= {base} if base else set()
        slots = f" and {cache / 2**20:,.0f} MiB for {limits.slots} slots of {size} tokens" if cache else ""
        shared = f", of them {run.base_bytes / 2**20:,.0f} shared by all adapters of {base[0]}" if base else ""
        log(f"{run.name} ({run.kind}) takes {params / 2**20:,.0f} MiB for its parameters{shared}{slots}")
    kept = limits.prefix_cache * sum(run.kind in ("causal", "hybrid") for run in runs.served.values())
    log(f"in all {total / 2**20:,.0f} MiB, and up to {kept / 2**20:,.0f} MiB for beginnings of prompts that are kept")


def warm(runs: Runs) -> None:
    """Load every run and compile what its slots need; of masked runs and embedders, embeddings of every number of rows of
    every length. Scores, fills, writing in blocks and fine-tuned heads compile at the first request."""
    for name, run in runs.served.items():
        loaded = runs.get(name)
        if loaded.pool is not None:
            loaded.pool.warm()
        if run.kind in ("masked", "embedder"):
            _warm_embedding(run, loaded)
        log(f"{name} is compiled")


def _warm_embedding(run: Served, loaded: Loaded) -> None:
    from bothways.sample.embed import pooled

    model = loaded.model
    fitting, pool = rows_that_fit(run.recipe.model), (model.embedding or EmbeddingInfo()).pool
    for length, rows in shapes_of_texts(run.context_length, fitting):
        tokens = np.zeros((rows, length), np.int32)
        pooled(model.run.module, model.run.params, tokens, tokens, np.ones_like(tokens), pool)


def shapes_of_texts(context: int, fitting: Callable[[int], int]) -> list[tuple[int, int]]:
    """Every (length, rows) of a batch of texts that the engine computes at once, which are PORTION at most."""
    lengths = sorted({min(close_bucket(n), context) for n in range(1, context + 1)})
    return [(n, 1 << k) for n in lengths for k in range(bucket(min(fitting(n), PORTION), 1).bit_length())]
