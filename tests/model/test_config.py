"""TransformerConfig: what is wrong is named, and no field is there for nothing."""

import dataclasses
from typing import Literal, get_args, get_origin, get_type_hints

import jax
import jax.numpy as jnp
import pytest

from bothways.configs import names
from bothways.model.config import LoRAConfig, RotaryScaling, TransformerConfig
from bothways.model.loss import cross_entropy
from bothways.registry import make_module


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"context_length": 0}, [["model.context_length is 0", "at least 1"]]),
        ({"n_layers": -3}, [["model.n_layers is -3"]]),
        ({"d_model": 0, "n_heads": 0}, [["model.d_model is 0"], ["model.n_heads is 0"]]),
        (
            {"vocab_size": -1, "n_kv_heads": -2, "d_head": -3, "d_ff": -4, "window": -5, "segment_types": -6},
            [
                ["model.vocab_size is -1", "negative"],
                ["model.n_kv_heads is -2"],
                ["model.d_head is -3"],
                ["model.d_ff is -4"],
                ["model.window is -5"],
                ["model.segment_types is -6"],
            ],
        ),
        (
            {"dropout_embed": 1.0, "dropout_attention": -0.1, "dropout_residual": 2.0},
            [["dropout_embed is 1.0", "[0, 1)"], ["dropout_attention is -0.1"], ["dropout_residual is 2.0"]],
        ),
        ({"d_model": 50, "n_heads": 7}, [["d_model=50", "n_heads=7", "d_head"]]),
        ({"n_heads": 6, "n_kv_heads": 4}, [["n_heads=6", "n_kv_heads=4"]]),
        ({"position_embedding": "rotary", "d_head": 5}, [["rotary", "even", "5"]]),
        ({"first_norm": False, "norm_position": "post"}, [["first_norm=False", "norm_position=post"]]),
        (
            {"rotary_scaling": RotaryScaling("linear", 0.5, attention_factor=-1.0)},
            [["factor=0.5", "attention_factor=-1.0"]],
        ),
        (
            {"rotary_scaling": RotaryScaling("yarn", 2.0, low=4.0, high=3.0)},
            [["yarn", "original_context=0", "low=4.0", "high=3.0"]],
        ),
        ({"position_embedding": "sinusoidal", "d_model": 21, "d_head": 4}, [["sinusoidal", "even", "21"]]),
        ({"position_embedding": "sinusoidal", "embed_width": 7}, [["sinusoidal", "even", "7"]]),
        ({"masked_transform": False, "embed_width": 7}, [["masked_transform=False", "embed_width=7"]]),
        ({"score_bias": "alibi", "attention": "splash"}, [["attention=splash", "score_bias=alibi"]]),
        ({"score_cap": 5.0, "attention": "cudnn"}, [["attention=cudnn", "score_cap=5.0", "--model.attention auto"]]),
        (
            {"score_cap": -5.0, "logit_cap": -1.0, "query_scale": -2.0},
            [["score_cap is -5.0"], ["logit_cap is -1.0"], ["query_scale is -2.0"]],
        ),
        ({"rotary_base": 0.0}, [["rotary_base is 0.0", "positive"]]),
        (
            {"rotary_base": -1.0, "rotary_base_local": -2.0},
            [["rotary_base is -1.0"], ["rotary_base_local is -2.0", "negative"]],
        ),
        ({"layer_pattern": ()}, [["layer_pattern is empty"]]),
        ({"window": 8}, [["window=8", "global"]]),
        ({"layer_pattern": ("global", "local")}, [["window=0", "local"]]),
        (
            {"init_std": 0.0, "norm_eps": -1e-6, "window": 3, "n_kv_heads": 5},
            [["n_heads=12", "n_kv_heads=5"], ["window=3"], ["init_std is 0.0"], ["norm_eps is -1e-06"]],
        ),
    ],
)
def test_problems_names_every_bad_value_with_its_numbers(fields, wanted):
    problems = TransformerConfig(**fields).problems()
    assert len(problems) == len(wanted)
    for problem, fragments in zip(problems, wanted, strict=True):
        assert all(fragment in problem for fragment in fragments), problem


def test_defaults_and_recipes_have_no_problems():
    models = {"default": TransformerConfig()} | {name: recipe.model for name, recipe in names().items()}
    assert {name: model.problems() for name, model in models.items()} == {name: [] for name in models}


def test_derived_sizes():
    """Zero means derived; what is given stays; resolving twice is resolving once."""
    derived = TransformerConfig(d_model=60, n_heads=5).resolved()
    assert (derived.n_kv_heads, derived.d_head, derived.d_value, derived.d_ff) == (5, 12, 12, 240)
    given = TransformerConfig(d_model=60, n_heads=5, n_kv_heads=1, d_head=7, d_value=3, d_ff=11)
    assert given.resolved() == given
    assert derived.resolved() == derived


def test_layer_pattern_repeats_over_the_layers():
    cfg = TransformerConfig(layer_pattern=("global", "local", "local"), window=9)
    assert [cfg.layer_window(layer) for layer in range(7)] == [0, 9, 9, 0, 9, 9, 0]


def test_local_layers_may_have_a_rotary_base_of_their_own():
    cfg = TransformerConfig(layer_pattern=("global", "local"), window=9, rotary_base=3.0, rotary_base_local=5.0)
    assert [cfg.layer_rotary_base(layer) for layer in range(3)] == [3.0, 5.0, 3.0]
    assert dataclasses.replace(cfg, rotary_base_local=0.0).layer_rotary_base(1) == 3.0


def test_auto_is_float32_on_cpu():
    types = {name: TransformerConfig(dtype=name).compute_dtype for name in ("auto", "float32", "bfloat16")}
    assert types == {"auto": jnp.float32, "float32": jnp.float32, "bfloat16": jnp.bfloat16}


BASE = {
    "n_layers": 1,
    "layer_pattern": ("local", "global"),
    "window": 3,
    "dropout_embed": 0.1,
    "dropout_attention": 0.1,
    "dropout_residual": 0.1,
}
OTHER = {  # field: another value, and what else must hold for the field to matter
    "vocab_size": (41, {}),
    "pad_vocab_to_multiple_of": (16, {}),
    "context_length": (29, {}),
    "n_layers": (2, {}),
    "d_model": (24, {}),
    "n_heads": (4, {}),
    "n_kv_heads": (1, {}),
    "d_head": (8, {}),
    "d_value": (8, {}),
    "d_ff": (34, {}),
    "rotary_base": (500.0, {"position_embedding": "rotary"}),
    "rotary_width": (2, {"position_embedding": "rotary"}),
    "rotary_base_local": (500.0, {"position_embedding": "rotary"}),
    "first_position": (2, {"position_embedding": "sinusoidal"}),
    "relative_buckets": (6, {"score_bias": "relative"}),
    "relative_distance": (19, {"score_bias": "relative"}),
    "rotary_scaling": (RotaryScaling("linear", 2.0), {"position_embedding": "rotary"}),
    "first_norm": (False, {}),
    "norm_eps": (1e-3, {}),
    "bias": (False, {}),
    "qkv_bias": (True, {"bias": False}),
    "attention_bias": (False, {}),
    "mlp_bias": (False, {}),
    "qk_norm": (True, {}),
    "qk_norm_over": ("all", {"qk_norm": True}),
    "query_scale": (7.0, {}),
    "score_cap": (7.0, {}),
    "logit_cap": (7.0, {}),
    "output_transform": (True, {}),
    "window": (2, {}),
    "layer_pattern": (("global", "local"), {}),
    "segment_types": (2, {}),
    "embed_width": (7, {"family": "bert"}),
    "share_layers": (True, {"n_layers": 2}),
    "embed_norm": (True, {}),
    "embed_scale": (True, {}),
    "shared_embeddings": ("tokens", {"family": "seq2seq"}),
    "tie_embeddings": (False, {}),
    "output_scale": (True, {}),
    "output_bias": (True, {}),
    "masked_head": (False, {"family": "bert"}),
    "masked_transform": (False, {"family": "bert"}),
    "next_sentence": (True, {"family": "bert"}),
    "pooler": (True, {"family": "bert"}),
    "dropout_embed": (0.2, {}),
    "dropout_attention": (0.2, {}),
    "dropout_residual": (0.2, {}),
    "init_std": (0.1, {}),
    "lora": (LoRAConfig(rank=3), {}),
    "scan_layers": (True, {"layer_pattern": ("local",)}),
}
HINTS = get_type_hints(TransformerConfig)
CHOICES = {name: get_args(hint) for name, hint in HINTS.items() if get_origin(hint) is Literal}
del CHOICES["qk_norm_over"]  # above, beside what it wants
del CHOICES["shared_embeddings"]
del CHOICES["attention"]  # kernels want larger sizes, and devices: tests/model/test_kernels.py
del CHOICES["predicts"]  # the order of the features that a loss reads: tests/train/test_diffusion.py


@pytest.fixture(scope="module")
def program(tiny):
    """The text of a program that makes initial parameters and the loss with dropout; or the gradient of that loss."""
    made = {}

    def text(family: str = "gpt", gradient: bool = False, **fields) -> str:
        cfg = dataclasses.replace(tiny, **BASE | fields)
        assert cfg.problems() == []
        module = make_module(family, cfg)

        def loss(bound, tokens):
            if family == "bert":
                features = bound(tokens, deterministic=False)
                if not cfg.masked_head:
                    return jnp.sum(features)
            elif family == "seq2seq":
                features = bound(tokens, tokens, deterministic=False)
            else:
                features, _ = bound(tokens, deterministic=False)
            return cross_entropy(bound.transform(features), *bound.unembedding(), tokens, jnp.ones(tokens.shape)).nats

        def run(key, tokens):
            rngs = {"params": key, "dropout": key}
            if not gradient:
                return module.init_with_output(rngs, tokens, method=loss)
            params = module.init(key, tokens)
            return jax.grad(lambda params: module.apply(params, tokens, rngs=rngs, method=loss))(params)

        which = family, gradient, cfg
        if which not in made:
            key = jax.eval_shape(lambda: jax.random.key(0))
            made[which] = jax.jit(run).lower(key, jax.ShapeDtypeStruct((2, 5), jnp.int32)).as_text()
        return made[which]

    return text


def test_the_same_configuration_gives_the_same_program(program, tiny_with):
    """Else the tests below would prove nothing."""
    assert program(dtype="auto") == program(dtype="float32")  # on CPU; not the same key in the fixture's memory


def test_every_field_is_tested_below():
    assert {*OTHER, *CHOICES, "attention", "predicts"} == {field.name for field in dataclasses.fields(TransformerConfig)}


@pytest.mark.parametrize("field", OTHER)
def test_changing_a_field_changes_the_program(program, field):
    value, others = OTHER[field]
    assert program(**others | {field: value}) != program(**others)


@pytest.mark.parametrize("field", CHOICES)
def test_every_choice_of_a_field_is_another_program(program, field):
    choices = [choice for choice in CHOICES[field] if choice != "auto"]
    programs = {program(gradient=field == "remat", **{field: choice}) for choice in choices}
    assert len(programs) == len(choices)
