"""BERT and those who followed: their sizes, what a loss may touch, what each head reads."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bothways.config import ObjectiveConfig
from bothways.configs.bert import recipes
from bothways.data.tokenizer import made_up_vocabulary
from bothways.model.axes import path_names
from bothways.registry import make_module
from bothways.train.objectives import make_objective

ROWS, LENGTH, ASKED = 3, 13, 5
VOCABULARY = made_up_vocabulary(37)


def paths_of(shapes: dict) -> dict[str, tuple[int, ...]]:
    return {"/".join(path_names(path)): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}


# ---- the published sizes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "with_heads", "without"),
    [("bert_base", 110_106_428, 109_482_240), ("bert_large", 336_226_108, 335_141_888)],
)
def test_counts_with_and_without_the_heads(recipe_shapes, name, with_heads, without):
    sizes = {path: int(np.prod(shape)) for path, shape in paths_of(recipe_shapes[name][1]).items()}
    assert sum(sizes.values()) == with_heads
    heads = sum(size for path, size in sizes.items() if path.startswith(("mlm/", "nsp/classes/")))
    assert sum(sizes.values()) - heads == without


@pytest.mark.parametrize("name", recipes)
def test_recipe_runs_and_builds(recipe_shapes, name):
    recipe = recipes[name]
    recipe.check(8)
    cfg, params = recipe_shapes[name]
    module = make_module(recipe.family, cfg)
    length = recipe.train.short_length or cfg.context_length
    batch = batch_of(length, jax.ShapeDtypeStruct, next_sentence=recipe.objective.next_sentence)
    objective = make_objective(recipe.objective, made_up_vocabulary(cfg.vocab_size))
    sums = jax.eval_shape(
        lambda params, batch: module.apply({"params": params}, method=lambda m: objective.terms(m, batch, True)),
        params,
        batch,
    )
    assert set(sums) == ({"mlm", "nsp"} if recipe.model.next_sentence else {"mlm"})
    assert all(value.shape == () for value in jax.tree.leaves(sums))


def test_roberta_has_neither_segments_nor_next_sentences(recipe_shapes):
    bert, roberta = (set(paths_of(recipe_shapes[name][1])) for name in ("bert_base", "roberta_base"))
    assert bert - roberta == {"encoder/embed/segment/embedding"} | {path for path in bert if path.startswith("nsp/")}
    assert len(bert - roberta) == 5
    assert not roberta - bert


def test_modernbert_has_its_size_and_a_window_on_two_of_three_layers(recipe_shapes):
    cfg, shapes = recipe_shapes["modernbert_base"]
    paths = paths_of(shapes)
    assert sum(int(np.prod(shape)) for shape in paths.values()) == pytest.approx(149e6, rel=0.005)
    assert [path for path in paths if path.endswith("/bias")] == ["mlm/bias"]
    assert not any("/position/" in path for path in paths)
    assert [cfg.layer_window(i) for i in range(22)] == [0, 65, 65] * 7 + [0]
    assert [cfg.layer_rotary_base(i) for i in range(3)] == [160_000, 10_000, 10_000]


def test_a_local_layer_reads_to_either_side(filled):
    tiny = {"vocab_size": 37, "d_model": 22, "n_heads": 2, "d_head": 6, "d_ff": 26, "window": 3, "n_layers": 1}
    local = dataclasses.replace(recipes["modernbert_base"].model, **tiny, layer_pattern=("local",)).resolved()
    module, tokens = make_module("bert", local), jnp.asarray(batch_of(LENGTH)["tokens"])
    params = filled(module, tokens)
    read = jax.jit(lambda params, tokens: module.apply({"params": params}, tokens))
    moved = np.abs(read(params, tokens.at[:, 6].set(7)) - read(params, tokens)).max(axis=(0, 2)) > 0
    np.testing.assert_array_equal(np.flatnonzero(moved), [4, 5, 6, 7, 8])


# ---- a small model -------------------------------------------------------------------------------------------------


def batch_of(length: int, make=None, next_sentence: bool = True) -> dict:
    """Three pairs of texts; every row asks for another number of tokens, and the last slots of each are empty."""
    rng = np.random.default_rng(0)
    shape = (ROWS, length)
    at_positions = np.stack([np.sort(rng.permutation(np.arange(1, 9))[:ASKED]) for _ in range(ROWS)])
    weights = (np.arange(ASKED) < np.array([[4], [2], [3]])).astype(np.float32)
    batch = {
        "tokens": rng.integers(5, 37, shape).astype(np.int32),
        "segments": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), shape),
        "mask_positions": np.where(weights > 0, at_positions, 0).astype(np.int32),
        "targets": np.where(weights > 0, rng.integers(5, 37, at_positions.shape), 0).astype(np.int32),
        "weights": weights,
    }
    if next_sentence:
        types = np.repeat(np.array([[0, 1]], np.int32), [length // 2, length - length // 2], axis=1)
        batch |= {
            "types": np.broadcast_to(types, shape),
            "random_next": np.array([0, 1, 1], np.int32),
            "pair_weight": np.array([1, 1, 0], np.float32),
        }
    return {k: make(v.shape, v.dtype) for k, v in batch.items()} if make else batch


def padded(batch: dict, to: int, token: int) -> dict:
    """The same rows with padding behind: tokens nobody reads, in no segment."""
    more = ((0, 0), (0, to - LENGTH))
    longer = {k: np.pad(batch[k], more) for k in ("segments", "types")}
    positions = np.broadcast_to(np.arange(to, dtype=np.int32), (ROWS, to))
    return batch | longer | {"tokens": np.pad(batch["tokens"], more, constant_values=token), "positions": positions}


@pytest.fixture(scope="module")
def objective():
    return make_objective(ObjectiveConfig(kind="masked", next_sentence=True), VOCABULARY)


@pytest.fixture(scope="module")
def bert(tiny, filled, objective):
    """Module, parameters, and jitted (params, batch) -> features and sums of the loss."""
    fields = {
        "norm_position": "post",
        "activation": "gelu",
        "segment_types": 2,
        "embed_norm": True,
        "next_sentence": True,
    }
    module = make_module("bert", dataclasses.replace(tiny, n_layers=2, **fields))
    params = filled(module, jnp.zeros((1, 2), jnp.int32))

    @jax.jit
    def read(params, batch):
        def run(bound):
            inputs = [batch[k] for k in ("tokens", "positions", "segments", "types")]
            return bound(*inputs), objective.terms(bound, batch, True)

        return module.apply({"params": params}, method=run)

    return module, params, read


class Given:
    """A model whose features are given; its heads are those of a BERT."""

    def __init__(self, bound, features):
        self.bound, self.features = bound, features

    def __call__(self, *inputs):
        return self.features

    def __getattr__(self, name):
        return getattr(self.bound, name)


def test_the_loss_pulls_only_on_the_places_that_are_asked(bert, objective):
    module, params, read = bert
    batch = batch_of(LENGTH)
    features, sums = read(params, batch)

    def nats(features):
        run = module.apply({"params": params}, method=lambda m: objective.terms(Given(m, features), batch, False))
        return run["mlm"].nats

    value, gradient = jax.jit(jax.value_and_grad(nats))(features)
    assert float(value) == pytest.approx(float(sums["mlm"].nats), rel=1e-6)
    wanted = np.zeros((ROWS, LENGTH), bool)
    for row, (at_positions, weights) in enumerate(zip(batch["mask_positions"], batch["weights"], strict=True)):
        wanted[row, at_positions[weights > 0]] = True
    assert wanted.sum() == 9
    np.testing.assert_array_equal((np.asarray(gradient) != 0).any(axis=-1), wanted)
    assert (np.abs(np.asarray(gradient)).max(axis=-1)[wanted] > 1e-4).all()


def test_sums_are_those_of_a_plain_softmax(bert):
    module, params, read = bert
    batch = batch_of(LENGTH)
    features, sums = read(params, batch)
    logits, pair = module.apply({"params": params}, features, method=lambda m, f: (m.logits(f), m.next_sentence(f)))
    logprobs, pair = np.asarray(jax.nn.log_softmax(logits)), np.asarray(jax.nn.log_softmax(pair))
    nats = correct = 0.0
    for row in range(ROWS):
        for place, target, weight in zip(*(batch[k][row] for k in ("mask_positions", "targets", "weights")), strict=True):
            nats -= weight * logprobs[row, place, target]
            correct += weight * (logprobs[row, place].argmax() == target)
    labels, weights = batch["random_next"], batch["pair_weight"]
    assert float(sums["mlm"].nats) == pytest.approx(nats, rel=1e-5)
    assert float(sums["mlm"].correct) == correct
    assert float(sums["nsp"].nats) == pytest.approx(-(weights * pair[np.arange(ROWS), labels]).sum(), rel=1e-5)
    assert float(sums["nsp"].correct) == (weights * (pair.argmax(axis=1) == labels)).sum()


def test_padding_changes_neither_features_nor_loss(bert):
    _, params, read = bert
    batch = batch_of(LENGTH)
    features, sums = read(params, batch)
    zero, other = (read(params, padded(batch, 17, token)) for token in (0, 9))
    np.testing.assert_array_equal(zero[0][:, :LENGTH], other[0][:, :LENGTH])
    jax.tree.map(np.testing.assert_array_equal, zero[1], other[1])
    np.testing.assert_allclose(zero[0][:, :LENGTH], features, rtol=2e-5, atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), zero[1], sums)
    in_segment = padded(batch, 17, 9) | {"segments": np.ones((ROWS, 17), np.int32)}
    assert np.abs(read(params, in_segment)[0][:, :LENGTH] - features).max() > 1e-2


def test_every_place_sees_both_ways(bert):
    _, params, read = bert
    batch = batch_of(LENGTH)
    features, _ = read(params, batch)
    for place in (0, LENGTH - 1):
        tokens = batch["tokens"].copy()
        tokens[:, place] = (tokens[:, place] + 1) % 37
        assert (np.abs(read(params, batch | {"tokens": tokens})[0] - features).max(axis=-1) > 1e-4).all()


def test_segment_types_change_the_features(bert):
    _, params, read = bert
    batch = batch_of(LENGTH)
    features, _ = read(params, batch)
    other, _ = read(params, batch | {"types": 1 - batch["types"]})
    assert (np.abs(other - features).max(axis=-1) > 1e-2).all()


# ---- heads ---------------------------------------------------------------------------------------------------------


def test_the_pooler_reads_the_first_token_alone(bert):
    module, params, read = bert
    features = np.asarray(read(params, batch_of(LENGTH))[0])
    pooled = module.apply({"params": params}, features, method="pooled")
    first = features[:, 0] @ params["nsp"]["pooler"]["kernel"] + params["nsp"]["pooler"]["bias"]
    np.testing.assert_allclose(pooled, np.tanh(first), rtol=1e-4, atol=1e-5)
    others = features.copy()
    others[:, 1:] = 0
    np.testing.assert_array_equal(module.apply({"params": params}, others, method="pooled"), pooled)


def test_next_sentence_is_two_scores_on_the_pooled_text(bert):
    module, params, read = bert
    features = read(params, batch_of(LENGTH))[0]
    scores = module.apply({"params": params}, features.astype(jnp.bfloat16), method="next_sentence")
    assert (scores.shape, scores.dtype) == ((ROWS, 2), jnp.float32)
    pooled = module.apply({"params": params}, features, method="pooled")
    exact = pooled @ params["nsp"]["classes"]["kernel"] + params["nsp"]["classes"]["bias"]
    np.testing.assert_allclose(scores, exact, atol=0.05)


def test_an_untied_output_layer_is_its_own(tiny, filled):
    tokens = jnp.zeros((1, 2), jnp.int32)
    tied, untied = (make_module("bert", dataclasses.replace(tiny, tie_embeddings=tie)) for tie in (True, False))
    assert "lm_head" not in filled(tied, tokens)
    for module in (tied, untied):
        params = filled(module, tokens)
        table, bias, _ = module.apply({"params": params}, method="unembedding")
        owner = params["encoder"]["embed"]["token"] if module is tied else params["lm_head"]
        np.testing.assert_array_equal(table, owner["embedding"])
        np.testing.assert_array_equal(bias, params["mlm"]["bias"])


def shapes_in(jaxpr) -> set[tuple[int, ...]]:
    """Shapes of everything that a program makes, the programs inside it too."""
    found = set()
    for equation in jaxpr.eqns:
        found |= {tuple(v.aval.shape) for v in equation.outvars if hasattr(v.aval, "shape")}
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            found |= shapes_in(inner) if hasattr(inner, "eqns") else set()
    return found


def test_only_what_is_asked_meets_the_vocabulary(bert, objective):
    module, params, _ = bert

    def loss(params, batch):
        sums = module.apply({"params": params}, method=lambda m: objective.terms(m, batch, True))
        return sums["mlm"].nats + sums["nsp"].nats

    shapes = shapes_in(jax.make_jaxpr(jax.grad(loss))(params, batch_of(LENGTH)).jaxpr)
    assert (ROWS, ASKED, 37) in shapes
    assert (ROWS, LENGTH, 22) in shapes
    assert not [s for s in shapes if 37 in s and (LENGTH in s or ROWS * LENGTH in s)]
