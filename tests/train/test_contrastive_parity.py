"""The same weights and pairs in sentence-transformers: the loss of every step is the same, and so are the vectors after it."""

import dataclasses
import importlib
import json

import numpy as np
import pytest

import bothways
from bothways.config import ObjectiveConfig, OptimizerConfig, TrainConfig
from bothways.convert import sentence
from bothways.convert.run import export_run, import_run
from bothways.data.config import DataConfig
from bothways.embedding import EmbeddingInfo
from bothways.rundir import read_recipe
from bothways.train.loop import train
from tests.convert.published import checkpoint, quiet

pytestmark = [pytest.mark.usefixtures("one_device"), pytest.mark.filterwarnings("ignore")]
STEPS, RATE, TEMPERATURE = 20, 0.001, 0.05
EPS = 1e-6  # gradients that are nothing but rounding move nothing
NAMES, VERBS = "king queen fool ship dog".split(), "sees the storm,loves the crown,is old".split(",")
PAIRS = [(f"the {name} {verb}", f"{verb.split()[-1]} {name}") for name in NAMES for verb in VERBS]


@pytest.fixture(scope="module")
def library():
    """Imported here, where it is needed: that takes seconds in every process that collects the tests."""
    pytest.importorskip("torch", reason="torch is not installed")
    return pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")


@pytest.fixture(scope="module")
def published(library, tmp_path_factory):
    """A small random BERT without dropout, as a directory of sentence-transformers."""
    home = tmp_path_factory.mktemp("published") / "bert"
    checkpoint("bert", home, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    sentence.write(home, EmbeddingInfo("mean", True, 11), 22)
    return home


def theirs(library, home, cached):
    """Losses of each step in sentence-transformers, and vectors after them."""
    import torch

    losses = importlib.import_module("sentence_transformers.losses")
    model = library.SentenceTransformer(str(home), device="cpu").train()
    kind = losses.CachedMultipleNegativesRankingLoss if cached else losses.MultipleNegativesRankingLoss
    loss_of = kind(model, scale=1 / TEMPERATURE, **({"mini_batch_size": 5} if cached else {}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), eps=EPS, weight_decay=0.0)
    read = getattr(model, "preprocess", model.tokenize)  # its name before version 6
    found = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of([read([pair[side] for pair in PAIRS]) for side in (0, 1)], None)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        found.append(float(loss))
    return found, model.eval().encode([text for text, _ in PAIRS])


@pytest.fixture
def one_thread(library):
    """Matrices so small wait for threads longer than for products."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("cached", [False, True])
def test_losses_and_vectors_are_those_of_sentence_transformers(
    library, published, cached, tmp_path, cache_dir, monkeypatch
):
    monkeypatch.setattr("bothways.convert.check.transformers_logits", lambda *_: (None, ""))
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"q": a, "p": b}) + "\n" for a, b in PAIRS))
    (tmp_path / "held.jsonl").write_text('{"q": "a", "p": "b"}\n')
    import_run(str(published), tmp_path / "run", "", quiet)
    start = read_recipe(tmp_path / "run")
    recipe = dataclasses.replace(
        start,
        model=dataclasses.replace(start.model, dropout_embed=0.0, dropout_attention=0.0, dropout_residual=0.0),
        data=DataConfig(
            corpus=str(path),
            validation=str(tmp_path / "held.jsonl"),
            text_fields=("q", "p"),
            tokenizer=start.data.tokenizer,
            cache=str(cache_dir),
        ),
        objective=ObjectiveConfig(kind="contrastive", temperature=TEMPERATURE, text_length=11),
        optimizer=OptimizerConfig(learning_rate=RATE, schedule="constant", b1=0.9, b2=0.95, eps=EPS, weight_decay=0.0),
        train=TrainConfig(
            steps=STEPS,
            batch_size=len(PAIRS),
            grad_accum_steps=3 if cached else 1,
            log_every=1,
            eval_every=STEPS,
            init_from=str(tmp_path / "run"),
            tracker="none",
        ),
    )
    train(recipe, tmp_path / "tuned")
    lines = map(json.loads, (tmp_path / "tuned" / "metrics.jsonl").read_text().splitlines())
    ours = [line["loss"] for line in lines if "loss" in line]
    wanted, vectors = theirs(library, published, cached)
    assert len(ours) == STEPS
    assert wanted[0] - wanted[-1] > 0.2  # it learns, so that the steps are compared and not the start alone
    assert ours == pytest.approx(wanted, abs=1e-3)
    found = bothways.load(tmp_path / "tuned").embed([text for text, _ in PAIRS])
    np.testing.assert_allclose(found, vectors, atol=5e-4)
    if not cached:
        export_run(tmp_path / "tuned", tmp_path / "out", quiet)
        opened = library.SentenceTransformer(str(tmp_path / "out"), device="cpu")
        np.testing.assert_allclose(opened.encode([text for text, _ in PAIRS]), found, atol=1e-5)
