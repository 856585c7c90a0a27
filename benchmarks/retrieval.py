"""Training files for the held-out books of docs/embeddings.md, from the embedded bibles.

    python -m benchmarks.retrieval mine DIR                     # DIR/train.jsonl, DIR/held.jsonl: query, positive, negative
    python -m benchmarks.retrieval pairs DIR --run runs/tuned   # DIR/pairs.csv: text, text_b, label (right, wrong)

Queries are the words in the middle of King James verses, texts those of the World English Bible; of the books that are trained on
alone. `mine` takes for each of 6,000 queries the wrong verse that BM25 ranks highest among every third; `pairs` takes each query with its
verse, and with those wrong ones that a run ranks highest, for `bothways finetune`.
"""

import argparse
import csv
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bothways.data import bibles
from bothways.sample.search import Ranking, by_words, search

WORDS = 5
QUERIES = 6_000
EVERY = 3
"""Of the verses of training books every so many-th may be a wrong answer."""
HELD = 64
DEPTH = 3
Verse = tuple[int, str, str]
"""Its number, the query, the verse that is right."""


def of_split(split: str) -> list[Verse]:
    return [verse for verse in bibles.verses(f"kjv:{WORDS}", "web") if bibles.split_of(verse[0]) == split]


def wrong(ranking: Ranking, verse: Verse, texts: dict[str, str]) -> Iterator[str]:
    """Texts of a ranking, best first, without the right one and others that read the same."""
    number, _, right = verse
    return (texts[name] for name, _ in ranking[str(number)] if name != str(number) and texts[name] != right)


def drawn(verses: list[Verse], count: int) -> tuple[list[Verse], dict[str, str]]:
    """So many queries, always the same, and the texts that wrong answers are taken from."""
    return random.Random(0).sample(verses, count), {str(number): text for number, _, text in verses[::EVERY]}


def mine(home: Path) -> None:
    """Sets of query, positive and hard negative, which BM25 ranks highest; and some of the books that validation holds out."""
    chosen, texts = drawn(of_split("train"), QUERIES)
    ranking = by_words({str(number): query for number, query, _ in chosen}, texts.items(), DEPTH)
    sets = ((verse, next(wrong(ranking, verse, texts), "")) for verse in chosen)
    # Beside a held-out query stands the text of some other verse: too few are held out to mine among.
    held = ((verse, chosen[verse[0] % 100][2]) for verse in of_split("validation")[:HELD])
    for name, records in (("train.jsonl", sets), ("held.jsonl", held)):
        with (home / name).open("w", encoding="utf-8") as out:
            for (_, query, right), negative in records:
                if negative:
                    out.write(json.dumps({"query": query, "positive": right, "negative": negative}) + "\n")


def pairs(home: Path, model: Any, count: int) -> None:
    """Pairs of a query and a verse: the right one, and as many as DEPTH wrong ones that a run ranks highest."""
    chosen, texts = drawn(of_split("train"), count)
    ranking = search(model, {str(number): query for number, query, _ in chosen}, texts.items(), DEPTH)
    with (home / "pairs.csv").open("w", newline="", encoding="utf-8") as out:
        rows = csv.writer(out)
        rows.writerow(["text", "text_b", "label"])
        for verse in chosen:
            _, query, right = verse
            rows.writerow([query, right, "right"])
            rows.writerows([query, text, "wrong"] for text in wrong(ranking, verse, texts))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.retrieval", description=__doc__)
    parser.add_argument("what", choices=["mine", "pairs"])
    parser.add_argument("home", type=Path, metavar="DIR")
    parser.add_argument("--run", help="of pairs: the run whose ranking says which wrong verses are hard")
    parser.add_argument("--queries", type=int, default=1_000, help="of pairs: so many queries")
    given = parser.parse_args(arguments)
    if (given.what == "pairs") != bool(given.run):
        parser.error("--run is for pairs, which need it")
    given.home.mkdir(parents=True, exist_ok=True)
    if given.what == "mine":
        mine(given.home)
    else:
        import bothways

        pairs(given.home, bothways.load(given.run), given.queries)


if __name__ == "__main__":
    main()
