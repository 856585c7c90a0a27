"""How long until the first training step is done, from the start of the process: `bothways train`, GPT-2 124M."""

import os
import random
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

from benchmarks.harness import OURS, Row, Setting, alternate, threads
from benchmarks.models import made_up_tokenizer

ROOT = Path(__file__).parent.parent
PEER = "transformers, PyTorch eager, fused AdamW"
THEIRS = """
import sys, torch, transformers
torch.set_num_threads(int(sys.argv[1]))
sizes = {"n_layer": int(sys.argv[2]), "n_embd": int(sys.argv[3]), "n_head": int(sys.argv[4])}
drop = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **drop))
adamw = torch.optim.AdamW(model.parameters(), fused=True)
tokens = torch.randint(0, 50257, (1, 256))
loss = model(tokens, labels=tokens).loss
loss.backward()
torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
adamw.step()
print("loss", loss.item(), file=sys.stderr, flush=True)
"""


def seconds_until_loss(command: list[str], environment: dict[str, str]) -> float:
    """Seconds from the start of a command until it tells a loss; it is stopped then.

    Raises:
      RuntimeError: it ended before.
    """
    began = time.perf_counter()
    process = subprocess.Popen(command, env=os.environ | environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    said = []
    try:
        for line in process.stderr:
            said.append(line)
            if "loss " in line:
                return time.perf_counter() - began
        raise RuntimeError(f"{' '.join(command)} printed no loss: {''.join(said[-20:])}")
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def first_step(setting: Setting) -> Row:
    """Cold, with nothing compiled; and again, from the compilation cache. Text and tokenizer are prepared before."""
    layers, width, heads = (2, 32, 2) if setting.tiny else (12, 768, 12)
    home = setting.home / "start"
    home.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 9))) for _ in range(500)]
    text = "\n\n".join(" ".join(rng.choices(words, k=60)) + "." for _ in range(200))
    (home / "text.txt").write_text(text)
    made_up_tokenizer("gpt", 50_257).save_in(home)
    sizes = {"n-layers": layers, "d-model": width, "n-heads": heads, "context-length": 256}
    command = [sys.executable, "-m", "bothways", "train", "gpt2_small", "--data.corpus", str(home / "text.txt")]
    command += ["--data.tokenizer", str(home / "tokenizer.json"), "--data.cache", str(home / "cache")]
    command += ["--train.batch-size", "1", "--train.log-every", "1"]
    command += [part for name, value in sizes.items() for part in (f"--model.{name}", str(value))]

    def ours(programs: Path, *more: str) -> None:
        with tempfile.TemporaryDirectory(dir=home) as run:
            seconds_until_loss([*command, *more, "--workdir", run + "/run"], {"JAX_COMPILATION_CACHE_DIR": str(programs)})

    def cold(*more: str) -> None:
        with tempfile.TemporaryDirectory(dir=home) as programs:
            ours(Path(programs), *more)

    def theirs() -> None:
        seconds_until_loss([sys.executable, "-c", THEIRS, *map(str, (threads(), layers, width, heads))], {})

    kept, scan = home / "programs", "--model.scan-layers"
    runs = {
        OURS: cold,
        f"{OURS}, from the cache": lambda: ours(kept),
        f"{OURS}, layers scanned": lambda: cold(scan),
        f"{OURS}, layers scanned, from the cache": lambda: ours(kept, scan),
        **({PEER: theirs} if setting.peers else {}),
    }
    sides = {name: types.SimpleNamespace(run=run) for name, run in runs.items()}  # each start is a process of its own
    seconds = alternate(sides, min(setting.rounds, 3))
    return Row("first step after start, GPT-2 124M, 1 x 256", "s", 0, seconds, "as PyTorch; from the cache half of that")
