"""Rows from a store that is far away: 30 ms a request, and 50 MB/s for all requests together.

    python -m benchmarks.prepare DIR --sides 2         # makes DIR/to, prepared text
    python -m benchmarks.reading DIR/to                # [--delay 0.03] [--rate 50e6] [--pace 2e6] [--batches 400]

The store (tests/launch/emulator.py) is a process of its own. The text is read by blocks, as one above 2 GiB is, with an
empty cache on disk. Twice through the first batches, each of 64 rows of 1,024: as fast as they come; and at the pace of a
training step, which sleeps: then the waits for a batch are what counts, and how many of them are above a millisecond.
"""

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BUCKET, ROWS, LENGTH = "some-bucket", 64, 1024
STORE = f"""
import sys
from pathlib import Path
from tests.launch import emulator
with emulator.store({BUCKET!r}) as (objects, variables):
    from gcp_storage_emulator.handlers.objects import _checksums, _make_object_resource
    for path in sorted(Path(sys.argv[1]).iterdir()):
        if path.is_file():
            raw = path.read_bytes()
            made = _make_object_resource("", {BUCKET!r}, f"text/{{path.name}}", "application/octet-stream", str(len(raw)))
            objects.create_file({BUCKET!r}, f"text/{{path.name}}", raw, _checksums(raw, made))
    objects.delay, objects.rate = float(sys.argv[2]), float(sys.argv[3])
    print("\\n".join(f"{{k}}={{v}}" for k, v in variables.items()), flush=True)
    print(flush=True)
    sys.stdin.read()
"""


def waits(cache: str, batches: int, pace: float) -> list[float]:
    """Seconds that each batch was waited for, by a step that takes ROWS * LENGTH / pace seconds; 0: no time."""
    from bothways.data import corpora, examples, pipeline, tokens
    from bothways.data.config import DataConfig

    cfg = DataConfig(corpus=f"gs://{BUCKET}/text", tokenizer="tokenizer.model", cache=cache)
    store = corpora.prepared_text.at(cfg)
    rows = tokens.Rows(store.open("train", Path(cache)), LENGTH, 0)
    made = pipeline.training_batches(rows, examples.causal, batch_size=ROWS, seed=0)
    found = []
    for _ in range(batches):
        began = time.monotonic()
        next(made)
        found.append(time.monotonic() - began)
        time.sleep(ROWS * LENGTH / pace if pace else 0)
    made.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="what `bothways prepare` wrote")
    parser.add_argument("--delay", type=float, default=0.03)
    parser.add_argument("--rate", type=float, default=50e6)
    parser.add_argument("--pace", type=float, default=2e6, help="tokens a second that the training step takes")
    parser.add_argument("--batches", type=int, default=400)
    given = parser.parse_args()
    from bothways.data import prepared

    prepared.WHOLE = 0
    words = [sys.executable, "-c", STORE, str(given.text), str(given.delay), str(given.rate)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as store:
        for line in itertools.takewhile(str.strip, store.stdout):
            name, _, value = line.rstrip().partition("=")
            os.environ[name] = value
        for pace in (0.0, given.pace):
            with tempfile.TemporaryDirectory() as cache:
                began = time.monotonic()
                first, *rest = waits(cache, given.batches, pace)
                rate = (given.batches - 1) * ROWS * LENGTH / (time.monotonic() - began - first)
            late = [wait for wait in rest if wait > 1e-3]
            print(
                f"{f'a step at {pace / 1e6:g} M tokens/s' if pace else 'as fast as they come'}: {rate / 1e6:.2f} M tokens/s; "
                f"first batch after {first:.2f} s; of {len(rest)} others {len(late)} waited for more than 1 ms, "
                f"the longest {max(rest) * 1e3:.1f} ms, all together {sum(rest):.2f} s",
                flush=True,
            )
        store.stdin.close()


if __name__ == "__main__":
    main()
