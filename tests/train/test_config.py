"""Batch ramps, meshes and recipes: numbers that are functions of the configuration."""

import dataclasses
import json

import pytest

from bothways.config import MeshConfig, ObjectiveConfig, TrainConfig
from bothways.configs import find, names
from bothways.data.pipeline import evaluation_batches
from bothways.data.tokenizer import made_up_vocabulary
from bothways.errors import InputError
from bothways.flops import tokens_per_row
from bothways.plan.training import made_up_tokens
from bothways.recipes import Recipe
from bothways.train.objectives import make_objective


def test_without_a_ramp_position_is_step_times_batch():
    cfg = TrainConfig(batch_size=7)
    assert [cfg.batch_at(s) for s in (0, 1, 11)] == [(0, 7), (7, 7), (77, 7)]


def test_a_ramp_grows_along_the_line_and_loses_no_row():
    cfg = TrainConfig(steps=500, batch_size=100, batch_size_start=4, batch_size_ramp_rows=5000)
    rows = 0
    for step in range(500):
        position, size = cfg.batch_at(step)
        assert position == rows
        line = 4 + 96 * min(1, rows / 5000)
        assert size <= line + 8  # never ahead of the line by more than rounding
        assert size >= line / 2 - 8  # and never behind by more than the doubling
        rows += size
    assert cfg.batch_at(499)[1] == 100
    assert [s[2] for s in cfg.stages()] == [4, 8, 16, 32, 64, 100]


def test_patience_needs_a_checkpoint_for_every_evaluation():
    """Else a run that is resumed counts from another best one."""
    assert not TrainConfig(eval_every=300, save_every=100, patience=2).problems()
    assert not TrainConfig(eval_every=100, save_every=300).problems()
    (problem,) = TrainConfig(eval_every=100, save_every=300, patience=2).problems()
    assert "train.save_every=300" in problem
    for name in names():
        cfg = find(name).train
        assert cfg.eval_every % cfg.save_every == 0, name  # so that the best of each is kept


@pytest.mark.parametrize("rows", [1, 50, 4999, 5000, 123_456])
def test_steps_for_rows(rows):
    cfg = TrainConfig(batch_size=100, batch_size_start=4, batch_size_ramp_rows=5000)
    steps = cfg.steps_for(rows)
    assert cfg.batch_at(steps)[0] >= rows > cfg.batch_at(steps - 1)[0]


def test_mesh_fills_the_rest():
    assert MeshConfig(-1, 2, 2).sizes(8) == {"data": 2, "fsdp": 2, "tensor": 2, "context": 1}
    assert MeshConfig().sizes(1) == {"data": 1, "fsdp": 1, "tensor": 1, "context": 1}
    assert MeshConfig(3, 1, 1).problems(8)
    assert MeshConfig(-1, 3, 1).problems(8)
    assert MeshConfig(-1, -1, 1).problems(8)
    assert not MeshConfig(2, 2, 2).problems(8)


def test_every_problem_is_listed_at_once(tiny_recipe):
    broken = dataclasses.replace(
        tiny_recipe,
        family="gtp",
        model=dataclasses.replace(
            tiny_recipe.model,
            n_heads=5,
            n_kv_heads=2,
            d_head=0,
            d_model=22,
            position_embedding="rope",
            layer_pattern=("dense", "x"),
        ),
        optimizer=dataclasses.replace(tiny_recipe.optimizer, learning_rate=-1.0, weight_decay=float("nan")),
        train=dataclasses.replace(tiny_recipe.train, steps=0, seed=2**31),
    )
    with pytest.raises(InputError) as e:
        broken.check(1)
    for part in (
        "family is 'gtp'; there are gpt, bert, seq2seq",
        "model.position_embedding is 'rope'; there are learned, sinusoidal, sinusoidal_halves, sinusoidal_t2t, rotary, none",
        "model.layer_pattern is ('dense', 'x'); there are global, local",
        "d_model=22",
        "n_heads=5",
        "learning_rate is -1.0",
        "optimizer.weight_decay is nan; it must be a finite number",
        "train.steps is 0",
        "train.seed is 2147483648; it must be at most 2147483647",
    ):
        assert part in str(e.value)


def test_a_batch_that_the_mesh_does_not_divide(tiny_recipe):
    uneven = dataclasses.replace(tiny_recipe, train=dataclasses.replace(tiny_recipe.train, batch_size=12))
    with pytest.raises(InputError, match=r"a batch of 12 rows does not divide into data\*fsdp=8 parts.*multiple of 8"):
        uneven.check(8)


def test_rows_that_the_context_axis_does_not_divide(tiny_recipe):
    train = dataclasses.replace(tiny_recipe.train, short_length=6, short_steps=1)
    recipe = dataclasses.replace(tiny_recipe, train=train, mesh=MeshConfig(2, 1, 1, 4))
    with pytest.raises(InputError, match="train.short_length=6 is not divisible by mesh.context=4") as e:
        recipe.check(8)
    assert "model.context_length" not in str(e.value)


@pytest.mark.parametrize(("name", "least"), [("bert_tiny", 5), ("roberta_base", 2), ("spans_base", 3), ("gpt1", 2)])
def test_rows_that_hold_no_example(name, least):
    """The least length makes examples; less is refused."""
    recipe, vocabulary = find(name), made_up_vocabulary(101)
    objective = make_objective(recipe.objective, vocabulary)
    rows, example = objective.source(made_up_tokens(7, 101), least, True)
    for batch in evaluation_batches(rows, example, batch_size=8, seed=0):
        lengths = [batch[key].shape[1] for key in ("tokens", "source") if key in batch]
        assert max(lengths) == least
        small = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, context_length=least))
        assert sum(lengths) == tokens_per_row(small)
    for length, short in ((least - 1, 0), (512, least - 1)):
        cut = dataclasses.replace(
            recipe,
            model=dataclasses.replace(recipe.model, context_length=length),
            train=dataclasses.replace(recipe.train, short_length=short, short_steps=short),
        )
        with pytest.raises(InputError, match=f"is {least - 1}; "):
            cut.check(1)


def test_next_sentences_are_asked_of_masked_rows_only(tiny_recipe):
    asked = dataclasses.replace(tiny_recipe, objective=ObjectiveConfig(next_sentence=True))
    with pytest.raises(InputError, match="next_sentence is for masked objectives, not causal"):
        asked.check(1)


def test_a_bert_has_its_own_transform_before_the_output_layer(tiny_recipe):
    model = dataclasses.replace(tiny_recipe.model, output_transform=True)
    asked = dataclasses.replace(tiny_recipe, family="bert", model=model, objective=ObjectiveConfig("masked"))
    with pytest.raises(InputError, match=r"model\.masked_transform: leave model\.output_transform out"):
        asked.check(1)


@pytest.mark.parametrize("kind", ["masked", "hybrid", "spans"])
def test_a_tokenizer_without_a_mask_hides_nothing(kind):
    vocabulary = dataclasses.replace(made_up_vocabulary(101), mask=None)
    with pytest.raises(InputError, match=f"kind={kind} hides tokens behind a mask, and this tokenizer has no mask"):
        make_objective(ObjectiveConfig(kind=kind), vocabulary)
    make_objective(ObjectiveConfig(kind="causal"), vocabulary)


def test_a_recipe_of_before_there_were_versions_opens_under_todays_names():
    old = {
        "family": "bert",
        "model": {"context": 64, "positions": "rotary", "layer_pattern": ["dense", "local"], "window": 9},
        "objective": {"kind": "masked", "mask_share": 1.0, "random_share": 0.0},
        "optimizer": {"decay_share": 0.5, "final_share": 0.1},
        "train": {"accumulate": 2, "keep": 5, "average": 3, "ramp_from": 4, "ramp_rows": 9, "max_bad_steps": 7},
        "mesh": {"max_copied": 0.3},
    }
    recipe = Recipe.from_json(json.dumps(old))
    assert (recipe.model.context_length, recipe.model.position_embedding) == (64, "rotary")
    assert recipe.model.layer_pattern == ("global", "local")
    assert (recipe.objective.mask_token_prob, recipe.objective.random_token_prob) == (1.0, 0.0)
    assert (recipe.optimizer.decay_fraction, recipe.optimizer.final_lr_ratio) == (0.5, 0.1)
    train = recipe.train
    assert (train.grad_accum_steps, train.max_to_keep, train.average_last_checkpoints) == (2, 5, 3)
    assert (train.batch_size_start, train.batch_size_ramp_rows, train.max_nonfinite_steps) == (4, 9, 7)
    assert recipe.mesh.max_replicated_fraction == 0.3
    with pytest.raises(InputError, match="fields this version does not know: context"):
        Recipe.from_json(json.dumps(old | {"format": 2}))  # only what is old is read so


def test_decay_that_ends_before_warm_up_is_refused(tiny_recipe):
    early = dataclasses.replace(tiny_recipe.optimizer, warmup_steps=4, decay_steps=3)
    with pytest.raises(InputError, match="decay_steps=3 is not after optimizer.warmup_steps=4"):
        dataclasses.replace(tiny_recipe, optimizer=early).check(1)


def test_recipes_survive_json():
    for recipe in names().values():
        assert Recipe.from_json(recipe.to_json()) == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", r"recipe is \[\]; it must be a JSON object"),
        ('{"model": 3}', "recipe.model is 3; it must be a JSON object, with the fields of TransformerConfig"),
        ('{"model": {"layer_pattern": "dense"}}', 'recipe.model.layer_pattern is "dense"; it must be a list'),
        ('{"train": {"steps": "many"}}', 'recipe.train.steps is "many"; it must be a whole number'),
        ('{"train": {"steps": true}}', "recipe.train.steps is true; it must be a whole number"),
        ('{"model": {"layer_pattern": [3]}}', r"recipe.model.layer_pattern is \[3\]; each element must be a string"),
        ('{"format": 99}', "has format 99, and this version of bothways reads up to"),
        ('{"format": true}', "has format True; it must be a whole number"),
        ('{"family": null}', "recipe.family is null; it must be a string"),
        ('{"trian": {}}', "fields this version does not know: trian"),
        ("{", "not JSON"),
    ],
)
def test_json_that_is_no_recipe(text, message):
    with pytest.raises(InputError, match=message):
        Recipe.from_json(text)


def test_every_recipe_is_sound():
    for recipe in names().values():
        devices = 8 if recipe.train.batch_size % 8 == 0 else 1
        recipe.check(devices)


def test_only_what_makes_another_run_is_a_difference(tiny_recipe):
    often = dataclasses.replace(tiny_recipe.train, log_every=5, grad_accum_steps=2, steps=99)
    where = dataclasses.replace(tiny_recipe.data, cache="/elsewhere")
    model = dataclasses.replace(tiny_recipe.model, remat="full", scan_layers=False)
    same = dataclasses.replace(tiny_recipe, mesh=MeshConfig(4, 2, 1), train=often, data=where, model=model)
    assert tiny_recipe.differences(same) == []
    other = dataclasses.replace(tiny_recipe, train=dataclasses.replace(tiny_recipe.train, seed=4))
    assert tiny_recipe.differences(other) == ["train.seed: 0 -> 4"]
    starts = [dataclasses.replace(tiny_recipe.train, init_from=name) for name in ("runs/x", "runs/x/")]
    one, two = (dataclasses.replace(tiny_recipe, train=t) for t in starts)
    assert one.differences(two) == []


def test_a_recipe_file_works_by_path(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from bothways.configs import find\nrecipes = {'mine': find('gpt2_small')}\n")
    assert find(str(path)).name == "mine"
    path.write_text("recipes = 1/0\n")
    with pytest.raises(InputError, match="ZeroDivisionError"):
        find(str(path))


def test_an_unknown_recipe_gets_the_nearest_name():
    with pytest.raises(InputError, match="did you mean gpt2_small"):
        find("gpt2_smal")
