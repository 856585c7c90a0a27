"""Tokens per second that the input pipeline makes on one core.

    python -m benchmarks.pipeline          # 20 seconds

Rows of a made-up corpus of 20 million tokens in documents of 700 on average, read from a memory map: shuffled, packed,
with segments and positions, of masked ones 15 % hidden.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from bothways.config import ObjectiveConfig
from bothways.data.pipeline import training_batches
from bothways.data.tokenizer import Vocabulary
from bothways.data.tokens import Tokens
from bothways.train.objectives import make_objective

V, SIZE, DOCUMENT = 8192, 20_000_000, 700
KINDS = {
    "causal": ObjectiveConfig(),
    "masked": ObjectiveConfig(kind="masked"),
    "masked, whole words": ObjectiveConfig(kind="masked", whole_words=True),
    "masked, sentence pairs": ObjectiveConfig(kind="masked", next_sentence=True),
    "hybrid": ObjectiveConfig(kind="hybrid"),
    "spans": ObjectiveConfig(kind="spans"),
}


def made_up(home: Path) -> tuple[Tokens, Vocabulary]:
    rng, ids = np.random.default_rng(0), np.arange(V)
    tokens = rng.integers(5, V, SIZE).astype(np.uint16)
    starts = np.unique(np.concatenate([[0], rng.integers(0, SIZE - 2, SIZE // DOCUMENT)]))
    starts = starts[np.diff(starts, append=SIZE) > 2]
    tokens[starts], tokens[starts[1:] - 1] = 2, 3
    tokens.tofile(home / "ids.bin")
    special = ids < 5
    vocabulary = Vocabulary(0, 2, 3, 4, special, ids[5:], (ids % 3 > 0) & ~special, (ids % 20 == 7) & ~special)
    return Tokens(np.memmap(home / "ids.bin", np.uint16, "r"), starts, SIZE), vocabulary


def speed(kind: str, tokens: Tokens, vocabulary: Vocabulary, context: int, batch: int, seconds: float) -> float:
    """Median over five stretches of the tokens per second of this process."""
    rows, example = make_objective(KINDS[kind], vocabulary).source(tokens, context, False)
    batches = training_batches(rows, example, batch_size=batch, seed=0)
    for _ in range(3):
        next(batches)
    found = []
    for _ in range(5):
        count, began = 0, time.process_time()
        while (spent := time.process_time() - began) < seconds / 5:
            made = next(batches)
            count += made["tokens"].size + (made["source"].size if "source" in made else 0)
        found.append(count / spent)
    return float(np.median(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each number")
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        tokens, vocabulary = made_up(Path(home))
        for kind in args.kinds:
            for context in (128, 512, 1024):
                batch = max(1, args.batch_tokens // context)
                found = speed(kind, tokens, vocabulary, context, batch, args.seconds)
                record = {"kind": kind, "context": context, "batch": batch, "tokens_per_second_per_core": round(found)}
                print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
