"""A server in front of tiny runs with weights drawn at random, one of each kind, on a real port."""

import asyncio
import dataclasses
import functools
import json
import threading
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

pytest.importorskip("uvicorn", reason="the extra serve is not installed")

import uvicorn

from bothways import rundir
from bothways.config import ObjectiveConfig
from bothways.data import tokenizer as tokenizers
from bothways.model.config import TransformerConfig
from bothways.recipes import Recipe
from bothways.serve.app import listen, make_app
from bothways.serve.engine import Engine
from bothways.serve.http import Settings
from bothways.serve.runs import Limits, Runs, named
from tests.conftest import HANGS
from tests.corpus import made_up_text

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}me: {% endif %}"
)
KINDS = {
    "causal": ("gpt", ObjectiveConfig()),
    "hybrid": ("gpt", ObjectiveConfig(kind="hybrid")),
    "dial": ("gpt", ObjectiveConfig(kind="diffusion", block_sizes=(4, 0))),
    "masked": ("bert", ObjectiveConfig(kind="masked")),
    "pairs": ("seq2seq", ObjectiveConfig(kind="spans")),
}
SLOTS = {"slots": 3, "piece": 16}
"""Of every server here, so that one compiled program serves all."""


@functools.cache
def trained_tokenizer() -> tokenizers.Tokenizer:
    return tokenizers.train([made_up_text(60), "caf\u00e9 \U0001f389\n"], "bpe", 330)


def write_run(home: Path, tiny: TransformerConfig, kind: str, spare: int = 6) -> Path:
    """A run as train/loop.py leaves it, whose table has `spare` rows that stand for no token."""
    family, objective = KINDS[kind]
    tokenizer = trained_tokenizer()
    extra = {"predicts": "own"} if kind == "dial" else {}
    model = dataclasses.replace(tiny, n_layers=1, context_length=48, vocab_size=len(tokenizer) + spare, **extra)
    if family == "bert":
        model = dataclasses.replace(model, segment_types=2)
    recipe = Recipe(name=kind, family=family, model=model, objective=objective)
    home.mkdir(parents=True)
    tokenizer.save(home / "tokenizer.model")
    (home / "recipe.json").write_text(recipe.to_json())
    if kind == "causal":
        (home / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    rng = np.random.default_rng(3)
    weights = jax.tree.map(lambda s: rng.normal(0, 0.3, s.shape).astype(s.dtype), rundir.param_shapes(recipe))
    with rundir.checkpoint_manager(home, keep=1) as manager:
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(weights),
            train=ocp.args.StandardSave({"step": np.int32(1)}),
            meta=ocp.args.JsonSave({"step": 1, "position": 8, "seed": 0}),
        )
        manager.save(1, args=items)
        manager.wait_until_finished()
    return home


@dataclasses.dataclass
class Running:
    """A server in a thread of its own."""

    engine: Engine
    settings: Settings = Settings()

    def __post_init__(self):
        config = uvicorn.Config(make_app(self.engine, self.settings), port=0, log_level="error")
        self.socket = listen(config)
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=lambda: asyncio.run(self.server.serve([self.socket])), daemon=True)

    def __enter__(self):
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join(timeout=20)
        self.socket.close()


@pytest.fixture(scope="session")
def homes(tmp_path_factory, tiny) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("served")
    return {kind: write_run(place / kind, tiny, kind) for kind in KINDS}


@pytest.fixture(scope="session")
def running(homes):
    runs = Runs(named([str(home) for home in homes.values()]), Limits(**SLOTS))
    with Running(Engine(runs, queue=64)) as server:
        yield server


@pytest.fixture(scope="session")
def http(running):
    import httpx

    with httpx.Client(base_url=running.url, timeout=HANGS) as client:
        yield client
