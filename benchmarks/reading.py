"""Rows from a store that is far away: 30 ms a request, and 50 MB/s for all requests together.

    python -m benchmarks.reading                # [--delay 0.03] [--rate 50e6] [--pace 2e6] [--batches 400]

The store (tests/launch/emulator.py) is a process of its own, with 160 MiB of made-up ids as `bothways prepare` writes them.
They are read by blocks, as a text above 2 GiB is, with an empty cache on disk. Twice through the first batches, each of 64
rows of 1,024: as fast as they come; and at the pace of a training step, which sleeps: then the waits for a batch are what
counts, and how many of them are above a millisecond. Beside it, what a million tokens cost the host in core-seconds.
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


def make(home: Path, shards: int = 10, tokens: int = 2**23, document: int = 512) -> None:
    """Prepared text of made-up ids, in documents of one length."""
    import zlib

    import numpy as np

    from bothways.data import prepared
    from bothways.data.stores import Folder

    folder, rng, found = Folder(str(home)), np.random.default_rng(0), []
    starts = np.arange(0, tokens, document, dtype="<i8").tobytes()
    for number in range(shards):
        name, ids = f"train-{number:05d}-000", rng.integers(5, 8192, tokens).astype("<u2").tobytes()
        folder.write(f"{name}.ids", ids)
        folder.write(f"{name}.starts", starts)
        shard = {"name": name, "tokens": tokens, "documents": tokens // document, "bytes": 4 * tokens}
        found.append(shard | {"crc32": prepared.checksums(ids), "starts_crc32": zlib.crc32(starts)})
    manifest = {
        "name": "made-up",
        "fingerprint": "made-up",
        "dtype": "<u2",
        "tokenizer": {"fingerprint": "made-up", "files": []},
        "settings": {"source_field": ""},
        "splits": {"train": {"shards": found}},
    }
    prepared.write_manifest(folder, manifest)


def waits(cache: str, batches: int, pace: float) -> list[float]:
    """Seconds that each batch was waited for, by a step that takes ROWS * LENGTH / pace seconds; 0: no time."""
    from bothways.data import corpora, examples, pipeline, tokens
    from bothways.data.config import DataConfig

    cfg = DataConfig(corpus=f"gs://{BUCKET}/text", tokenizer="tokenizer.model", cache=cache)
    store = corpora.prepared_text.at(cfg)
    rows = tokens.Rows(store.open("train", Path(cache)), LENGTH, 0)
    made = pipeline.training_batches(rows, examples.causal, batch_size=ROWS, seed=0)
    found, ends = [], 0.0
    for _ in range(batches):
        began = time.monotonic()
        next(made)
        came = time.monotonic()
        found.append(came - began)
        if pace:  # a step begins when its batch is there and the one before it is done
            ends = (max(ends, came) if came - began > 1e-3 else ends or came) + ROWS * LENGTH / pace
            time.sleep(max(0.0, ends - time.monotonic()))
    made.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delay", type=float, default=0.03)
    parser.add_argument("--rate", type=float, default=50e6)
    parser.add_argument("--pace", type=float, default=2e6, help="tokens a second that the training step takes")
    parser.add_argument("--batches", type=int, default=400)
    given = parser.parse_args()
    from bothways.data import prepared

    prepared.WHOLE = 0
    made = tempfile.TemporaryDirectory()
    make(Path(made.name))
    words = [sys.executable, "-c", STORE, made.name, str(given.delay), str(given.rate)]
    with made, subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as store:
        for line in itertools.takewhile(str.strip, store.stdout):
            name, _, value = line.rstrip().partition("=")
            os.environ[name] = value
        for pace in (0.0, given.pace):
            with tempfile.TemporaryDirectory() as cache:
                began, cores = time.monotonic(), time.process_time()
                first, *rest = waits(cache, given.batches, pace)
                rate = (given.batches - 1) * ROWS * LENGTH / (time.monotonic() - began - first)
            cores = (time.process_time() - cores) / (given.batches * ROWS * LENGTH) * 1e6
            late = [wait for wait in rest if wait > 1e-3]
            print(
                f"{f'a step at {pace / 1e6:g} M tokens/s' if pace else 'as fast as they come'}: {rate / 1e6:.2f} M tokens/s; "
                f"first batch after {first:.2f} s; of {len(rest)} others {len(late)} waited for more than 1 ms, "
                f"the longest {max(rest) * 1e3:.1f} ms, all together {sum(rest):.2f} s; "
                f"{cores:.3f} core-seconds a million",
                flush=True,
            )
        store.stdin.close()


if __name__ == "__main__":
    main()
