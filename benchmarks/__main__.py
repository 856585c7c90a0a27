"""The command line: python -m benchmarks [ROW ...] measures, and writes results.json and the table in README.md."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import adapters, embedding, generation, scoring, start, training
from benchmarks.harness import OURS, Row, Setting, keep, record, write_table

HERE = Path(__file__).parent
ROWS: dict[str, Callable[[Setting], Row]] = {
    "train-gpt-small": training.gpt_small,
    "train-gpt-small-bfloat16": training.gpt_small_bfloat16,
    "train-gpt-2048": training.gpt_2048,
    "train-gpt-8192": training.gpt_8192,
    "train-gpt2": training.gpt2,
    "train-gpt2-bfloat16": training.gpt2_bfloat16,
    "train-bert": training.bert_base,
    "train-bert-bfloat16": training.bert_base_bfloat16,
    "train-lora": adapters.lora,
    "train-lora-bfloat16": adapters.lora_bfloat16,
    "generate-1": generation.one,
    "generate-8": generation.eight,
    "score-pll": scoring.pll,
    "score-ragged": scoring.ragged,
    "embed-short": embedding.short,
    "embed-short-bfloat16": embedding.short_bfloat16,
    "start": start.first_step,
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; none: all")
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that it runs; the table stays")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-peers", action="store_true", help="our own sides only")
    parser.add_argument("--home", type=Path, default=Path("runs/benchmarks"), help="where models are made and kept")
    parser.add_argument("--results", type=Path, default=HERE / "results.json")
    given = parser.parse_args(arguments)
    if unknown := set(given.rows) - set(ROWS):
        parser.error(f"no row is called {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    home = given.home / "tiny" if given.tiny else given.home
    setting = Setting(home.absolute(), given.tiny, given.rounds, not given.no_peers)
    for name in given.rows or ROWS:
        row = ROWS[name](setting)
        for side in row.seconds:
            more = "" if side == OURS else f"  ours is {record(row)['faster'][side]:.2f} times as fast"
            print(f"{row.name}: {side}: {row.figure(side):.4g} {row.unit}{more}", file=sys.stderr, flush=True)
        if not given.tiny and setting.peers:
            write_table(HERE / "README.md", keep(given.results, [record(row)]))


if __name__ == "__main__":
    main()
