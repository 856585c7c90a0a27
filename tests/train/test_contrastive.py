"""Contrastive training: what its losses are, that neither devices nor pieces change them, and what it refuses."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bothways
from bothways import sharding
from bothways.cli import main
from bothways.config import MeshConfig, ObjectiveConfig, OptimizerConfig, TrainConfig
from bothways.data import corpora, tokens
from bothways.data.config import DataConfig
from bothways.data.contrasts import Sets
from bothways.data.rng import ExampleRng
from bothways.data.tokenizer import made_up_vocabulary
from bothways.data.tokens import Tokens
from bothways.errors import InputError
from bothways.model.config import LoRAConfig, TransformerConfig
from bothways.recipes import Recipe
from bothways.registry import make_module, tiny_inputs
from bothways.train.gradient_cache import cached_gradients, cut
from bothways.train.objectives import make_objective
from bothways.train.objectives.contrastive import contrastive, normalized
from bothways.train.optimizer import make_optimizer
from bothways.train.step import init_state, make_train_step, state_shardings

RANKING = ObjectiveConfig(kind="contrastive", temperature=0.3)


def compared(vectors, cfg, **fields):
    """The loss and the share that is right, of vectors whose texts all differ."""
    B, N, _ = vectors.shape
    batch = {"ids": jnp.arange(2 * B * N).reshape(B, N, 2), "weight": jnp.ones(B), "score": jnp.zeros(B)} | fields
    objective = contrastive(cfg, None)
    found = jax.jit(objective.halves.compare)(jnp.asarray(vectors), batch)["contrast"]
    weight = objective.weights(batch)["contrast"]
    return float(found.nats / weight), float(found.correct / weight)


@pytest.fixture(scope="module")
def vectors():
    return np.random.default_rng(0).normal(size=(5, 3, 7)).astype(np.float32)


def near(vectors, width=None):
    """Cosines of every query with all texts that are none, [B, B * (N - 1)]; query i's own is at i * (N - 1)."""
    v = vectors[..., :width] / np.linalg.norm(vectors[..., :width], axis=-1, keepdims=True)
    return v[:, 0] @ v[:, 1:].reshape(-1, v.shape[-1]).T


def ranked(scores, hidden=()):
    """Cross-entropy of each query's own text, [B]."""
    scores = scores.copy()
    for at in hidden:
        scores[at] = -np.inf
    own = scores[np.arange(len(scores)), np.arange(len(scores)) * (scores.shape[1] // len(scores))]
    return np.log(np.exp(scores).sum(axis=1)) - own


def test_ranking_is_among_all_texts_of_the_batch(vectors):
    scores = near(vectors) / 0.3
    loss, right = compared(vectors, RANKING)
    assert loss == pytest.approx(ranked(scores).mean(), rel=1e-5)
    assert right == pytest.approx(np.mean(scores.argmax(axis=1) == np.arange(5) * 2))


def test_what_belongs_is_no_negative_in_another_set(vectors):
    """Set 3 has the positive of set 1 as its hard negative; sets 0 and 4 ask the same."""
    ids = np.arange(30).reshape(5, 3, 2)
    ids[3, 2], ids[4, 0] = ids[1, 1], ids[0, 0]
    scores, hidden = near(vectors) / 0.3, [(1, 3 * 2 + 1), (0, 4 * 2), (4, 0)]
    loss, _ = compared(vectors, RANKING, ids=jnp.asarray(ids))
    assert loss == pytest.approx(ranked(scores, hidden).mean(), rel=1e-5)


def test_sets_that_only_fill_a_batch_count_for_nothing(vectors):
    weight = np.array([1, 1, 1, 0, 0], np.float32)
    for cfg, others in (
        (RANKING, {}),
        (dataclasses.replace(RANKING, loss="triplet"), {}),
        (dataclasses.replace(RANKING, loss="cosent"), {"score": jnp.array([0.3, 0.1, 0.2, 0.7, 0.9])}),
    ):
        full = compared(vectors[:3], cfg, **{name: x[:3] for name, x in others.items()})
        ids = jnp.arange(30).reshape(5, 3, 2)
        assert compared(vectors, cfg, weight=jnp.asarray(weight), ids=ids, **others) == pytest.approx(full, rel=1e-5)


def test_triplets_and_scored_pairs(vectors):
    v = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    inside = np.einsum("bd,bnd->bn", v[:, 0], v[:, 1:])
    loss, right = compared(vectors, dataclasses.replace(RANKING, loss="triplet", margin=0.4))
    assert loss == pytest.approx(np.maximum(0, 0.4 + inside[:, 1] - inside[:, 0]).mean(), rel=1e-5)
    assert right == pytest.approx(np.mean(inside[:, 0] > inside[:, 1]))
    score = np.array([0.1, 0.9, 0.5, 0.5, 0.2])
    loss, right = compared(vectors, dataclasses.replace(RANKING, loss="cosent"), score=jnp.asarray(score))
    pairs = [(inside[i, 0] - inside[j, 0]) / 0.3 for i in range(5) for j in range(5) if score[i] < score[j]]
    assert loss == pytest.approx(np.log(1 + np.exp(pairs).sum()), rel=1e-5)
    assert right == pytest.approx(np.mean(np.array(pairs) < 0))


def test_held_out_batches_of_scored_pairs_count_as_the_pairs_in_them(vectors):
    """A last one that is not full does not weigh as much as those before it."""
    cfg = dataclasses.replace(RANKING, loss="cosent")
    objective, nats, weight, wanted = contrastive(cfg, None), 0.0, 0.0, 0.0
    for count in (5, 2):
        fields = {"score": jnp.array([0.3, 0.1, 0.2, 0.7, 0.9]), "weight": jnp.arange(5) < count}
        fields |= {"ids": jnp.arange(30).reshape(5, 3, 2)}
        nats += objective.halves.compare(jnp.asarray(vectors), fields)["contrast"].nats
        weight += objective.weights(fields)["contrast"]
        wanted += count * compared(vectors, cfg, **fields)[0]
    assert float(nats / weight) == pytest.approx(wanted / 7, rel=1e-5)


def test_each_width_has_a_loss_of_its_own(vectors):
    loss, _ = compared(vectors, dataclasses.replace(RANKING, widths=(2, 7)))
    assert loss == pytest.approx(sum(ranked(near(vectors, w) / 0.3).mean() for w in (2, 7)), rel=1e-5)


def test_a_vector_of_zeros_has_a_gradient():
    assert np.isfinite(jax.grad(lambda v: normalized(v).sum())(jnp.zeros((2, 1, 3)))).all()


# ---- through the train step -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batch():
    """Eight sets of three texts, two of them the same."""
    rng = np.random.default_rng(1)
    sizes = rng.integers(2, 13, 24)
    ids = rng.integers(5, 37, sizes.sum()).astype(np.int32)
    starts = np.cumsum(sizes) - sizes
    sets = Sets(3, ([2], [3]), np.arange(8.0))
    rows, _ = source(RANKING).source(Tokens(ids, starts, 0, sets=sets), 11, False)
    return rows[np.arange(8)]


def source(cfg):
    return make_objective(cfg, made_up_vocabulary(37))


def stepped(tiny, batch, devices, accumulate=1, family="bert", cfg=RANKING, axes=None):
    """Parameters and loss after one step of plain gradient descent with momentum."""
    model = dataclasses.replace(tiny, n_layers=1, masked_head=False, scan_layers=False)
    module = make_module(family, model)
    mesh = sharding.make_mesh(MeshConfig(**(axes or {})), devices)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.01, schedule="constant", weight_decay=0.0), 10)
    fresh = lambda seed: init_state(module, tiny_inputs(family), optimizer, seed)  # noqa: E731
    placed = state_shardings(mesh, jax.eval_shape(fresh, 0))
    state = jax.jit(fresh, out_shardings=placed)(0)
    step = make_train_step(module, source(cfg), optimizer, mesh, placed, accumulate=accumulate)
    state, metrics = step(state, sharding.to_global(mesh, batch), 0)
    return jax.device_get(state.opt_state), {name: float(x) for name, x in metrics.items()}


@pytest.fixture(scope="module")
def whole(tiny, batch, eight_devices):
    return stepped(tiny, batch, eight_devices[:1])


@pytest.mark.parametrize("how", ["accumulated", "devices"])
def test_neither_pieces_nor_devices_change_loss_and_gradient(how, tiny, batch, whole, eight_devices):
    """The gradient is what the optimizer's first moment holds after one step."""
    many = {"accumulated": (1, 4, {}), "devices": (8, 1, {"data": 4, "fsdp": 2})}
    count, accumulate, axes = many[how]
    state, metrics = stepped(tiny, batch, eight_devices[:count], accumulate, axes=axes)
    assert metrics["loss"] == pytest.approx(whole[1]["loss"], rel=1e-5)
    assert metrics["contrast_accuracy"] == whole[1]["contrast_accuracy"]
    assert metrics["grad_norm"] == pytest.approx(whole[1]["grad_norm"], rel=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), state, whole[0])


def test_both_passes_of_a_piece_drop_the_same():
    """The gradient of the loss of all pieces, each encoded under its key."""
    batch, keys = {"x": jnp.arange(12.0).reshape(6, 2) / 7}, jax.random.split(jax.random.key(3), 3)
    params = jax.random.normal(jax.random.key(4), (2, 5))

    def encode(params, piece, key):
        return jnp.tanh(piece["x"] @ params) * jax.random.bernoulli(key, 0.5, (2, 5))

    def compare(vectors, batch):
        return jnp.sum(jnp.sin(vectors @ vectors.T))

    def together(params):
        pieces = cut(batch, 3)
        found = jnp.stack([encode(params, {"x": pieces["x"][i]}, keys[i]) for i in range(3)])
        return compare(jnp.moveaxis(found, 0, 1).reshape(6, 5), batch)

    measure = lambda loss: (loss, {"loss": loss})  # noqa: E731
    grads, metrics = jax.jit(lambda p: cached_gradients(encode, compare, measure, p, batch, keys))(params)
    loss, wanted = jax.jit(jax.value_and_grad(together))(params)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(grads, wanted, rtol=1e-4, atol=1e-6)


def test_texts_are_cut_wrapped_and_told_apart():
    ids, starts = np.array([7, 8, 9, 10, 11, 7, 8, 9, 12, 13], np.int32), np.array([0, 5])
    rows, example = source(RANKING).source(Tokens(ids, starts, 0, sets=Sets(2, ([2], [3]), np.zeros(1))), 5, False)
    found = example(rows[np.array([0])], ExampleRng(0, np.array([0])))
    assert found["tokens"].tolist() == [[[2, 7, 8, 9, 3]] * 2]
    assert (found["ids"][0, 0] == found["ids"][0, 1]).all()  # what differs is behind the cut
    assert rows.cut == 2


# ---- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A word in capitals belongs to the word; what does not is another in capitals."""
    home, rng = tmp_path_factory.mktemp("sets"), np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), 3)) for _ in range(120)]
    records = [{"q": w, "p": w.upper(), "n": words[i - 1].upper(), "s": i % 5} for i, w in enumerate(words)]
    (home / "sets.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (home / "sets.tsv").write_text("q\tp\tn\ts\n" + "".join("\t".join(map(str, r.values())) + "\n" for r in records))
    return home


@pytest.fixture(scope="module")
def recipe(folder, cache_dir):
    return Recipe(
        name="sets",
        family="bert",
        model=TransformerConfig(context_length=16, n_layers=1, d_model=32, n_heads=2, dtype="float32"),
        data=DataConfig(
            corpus=str(folder / "sets.jsonl"),
            text_fields=("q", "p"),
            query_prompt="a",
            tokenizer="char",
            vocab_size=300,
            cache=str(cache_dir),
        ),
        objective=ObjectiveConfig(kind="contrastive", text_length=8),
        optimizer=OptimizerConfig(learning_rate=0.01, schedule="constant"),
        train=TrainConfig(steps=40, batch_size=8, eval_every=40, save_every=40, log_every=20, tracker="none"),
    )


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory, one_device):
    home = tmp_path_factory.mktemp("runs") / "sets"
    recipe.fit(home)
    return home


def test_a_run_finds_what_belongs(run):
    model = bothways.load(run)
    words = ["abc", "hgf", "dab", "cce", "fed"]
    found = model.embed(words, prompt="query") @ model.embed([w.upper() for w in words]).T
    assert found.argmax(axis=1).tolist() == list(range(5))
    assert not model.recipe.model.masked_head
    assert (model.embedding.length, model.embedding.prompts) == (8, {"query": "a"})
    np.testing.assert_allclose(np.linalg.norm(model.embed(words), axis=1), 1, rtol=1e-5)


def test_adapters_and_a_decoder_go_through_the_loop(run, recipe, folder, tmp_path, one_device):
    few = dataclasses.replace(recipe.train, steps=2, eval_every=2, save_every=2, grad_accum_steps=2)
    three = dataclasses.replace(recipe.data, corpus=str(folder / "sets.tsv"), text_fields=("q", "p", "n"))
    adapted = dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, lora=LoRAConfig(rank=3)),
        data=dataclasses.replace(recipe.data, tokenizer=str(run / "tokenizer.model")),
        train=dataclasses.replace(few, init_from=str(run)),
    )
    adapted.fit(tmp_path / "adapted")
    before, after = (bothways.load(home).embed(["abc"]) for home in (run, tmp_path / "adapted"))
    assert 1e-6 < np.abs(before - after).max() < 0.5
    ask = dataclasses.replace(recipe.objective, loss="triplet", pool="last", widths=(7, 32))
    dataclasses.replace(recipe, family="gpt", data=three, objective=ask, train=few).fit(tmp_path / "gpt")
    assert bothways.load(tmp_path / "gpt").embed(["abc", "d"]).shape == (2, 32)


def test_scores_are_read_with_their_texts(recipe, folder):
    data = dataclasses.replace(recipe.data, corpus=str(folder / "sets.tsv"), score_field="s")
    corpus = corpora.load(data)
    tokenizer = tokens.obtain_tokenizer(data, corpus)
    found = tokens.prepare(corpus, "train", tokenizer, data.cache)
    assert found.sets.scores[:6].tolist() == [0, 1, 2, 3, 4, 0]
    assert (
        tokenizer.decode(found.ids[: found.starts[1]]) == "a" + json.loads(next(corpus.documents("train"))[1])["texts"][0]
    )


def test_commands_that_want_tokens_say_what_the_run_is(run, capsys):
    assert main(["evaluate", str(run)]) == 2
    assert "was trained to make vectors: it can embed and search" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("record", "fields", "message"),
    [
        ({"q": "a", "p": " "}, {}, "line 7: the text under 'p' is empty"),
        ({"q": "a"}, {}, "line 7: no text under 'p'"),
        ({"q": "a", "p": "b", "s": "much"}, {"score_field": "s"}, "the score under 's' is 'much'; it must be a number"),
        ({"q": "a", "p": "b", "s": True}, {"score_field": "s"}, "the score under 's' is 'True'"),
        ({"q": "a", "p": "b"}, {"score_field": "s"}, "line 7: no score under 's'; the fields are q, p"),
    ],
)
def test_records_that_are_no_sets_are_refused(record, fields, message, recipe, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(6 * '{"q": "a", "p": "b", "s": 0.5}\n' + json.dumps(record) + "\n")
    data = dataclasses.replace(recipe.data, corpus=str(path), **fields)
    ask = dataclasses.replace(recipe.objective, loss="cosent" if fields else "ranking")
    with pytest.raises(InputError, match=message):
        dataclasses.replace(recipe, data=data, objective=ask).fit(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("section", "fields", "message"),
    [
        ("data", {"text_fields": (), "query_prompt": ""}, "set --data.text-fields QUERY POSITIVE"),
        ("data", {"text_fields": ("q",)}, "name the text to search with"),
        ("data", {"source_field": "q", "target_field": "p"}, "leave one of them out"),
        ("data", {"score_field": "s"}, "cosent, and only cosent, needs scores"),
        ("objective", {"kind": "masked"}, "sets of texts are for objective.kind=contrastive"),
        ("objective", {"loss": "triplet"}, "needs hard negatives"),
        ("objective", {"text_length": 17}, "objective.text_length is 17"),
        ("objective", {"widths": (8, 64)}, "objective.widths has 64, and model.d_model is 32"),
        ("objective", {"temperature": 0.0}, "objective.temperature is 0.0"),
    ],
)
def test_recipes_that_do_not_fit_are_refused(section, fields, message, recipe):
    wrong = dataclasses.replace(recipe, **{section: dataclasses.replace(getattr(recipe, section), **fields)})
    with pytest.raises(InputError, match=message):
        wrong.check(1)
