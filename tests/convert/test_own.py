"""Every run leaves: with a modelling file of ours, `transformers` computes what we do and writes the same text."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import bothways
from bothways.config import ObjectiveConfig
from bothways.convert.run import export_run, import_run
from bothways.data import tokenizer as tokenizers
from bothways.data.config import DataConfig
from bothways.recipes import Recipe
from bothways.rundir import Run, TaskInfo, load_run, module_of, param_shapes, read_recipe, read_task
from tests.corpus import made_up_text
from tests.train.bodies import LENGTH, write

torch = pytest.importorskip("torch", reason="the extra `parity` (torch, transformers) is not installed")
transformers = pytest.importorskip("transformers", reason="the extra `parity` (torch, transformers) is not installed")

ROTARY = {"position_embedding": "rotary", "norm": "rms", "activation": "swiglu", "bias": False}
YARN = {"kind": "yarn", "factor": 3.0, "original_context": 11, "high": 3.0}
CASES = {  # name: family, objective, fields
    "gpt": ("gpt", "causal", {"n_layers": 2, "activation": "relu2", "norm_position": "post", "d_value": 5}),
    "modern": (
        "gpt",
        "causal",
        ROTARY
        | {"n_layers": 3, "n_heads": 6, "n_kv_heads": 2, "qk_norm": True, "tie_embeddings": False, "window": 5}
        | {"layer_pattern": ("global", "local"), "rotary_base_local": 100.0, "pad_vocab_to_multiple_of": 17},
    ),
    "gemma": (
        "gpt",
        "causal",
        ROTARY
        | {"n_layers": 3, "norm_position": "both", "qk_norm": True, "query_scale": 7.0, "activation": "geglu_tanh"}
        | {"score_cap": 0.5, "logit_cap": 9.0, "output_transform": True}
        | {"layer_pattern": ("nope", "global"), "qk_norm_over": "all", "qkv_bias": True},
    ),
    "neox": (
        "gpt",
        "causal",
        {"position_embedding": "rotary", "parallel": "two_norms", "rotary_width": 4, "n_layers": 2},
    ),
    "gptj": (
        "gpt",
        "causal",
        {"position_embedding": "rotary", "parallel": "one_norm", "attention_bias": False, "mlp_bias": False}
        | {"tie_embeddings": False, "output_bias": True, "activation": "relu2"},
    ),
    "albert": (
        "bert",
        "masked",
        {"share_layers": True, "embed_width": 7, "n_layers": 3, "segment_types": 2, "activation": "relu2"}
        | {"logit_cap": 0.75, "score_cap": 0.5},
    ),
    "out": ("bert", "masked", {"norm_position": "out", "activation": "relu2"}),
    "hybrid": ("gpt", "hybrid", ROTARY | {"activation": "geglu", "rotary_scaling": YARN}),
    "dial": ("gpt", "diffusion", ROTARY | {"predicts": "own"}),
    "bert": ("bert", "masked", {"activation": "relu2", "position_embedding": "sinusoidal", "embed_scale": True}),
    "local": (
        "bert",
        "masked",
        ROTARY | {"norm_position": "pre", "first_norm": False, "n_layers": 2, "masked_transform": False},
    ),
    "pairs": ("seq2seq", "pairs", {"n_layers": 2, "norm_position": "post", "activation": "relu"}),
    "spans": ("seq2seq", "spans", ROTARY | {"tie_embeddings": False, "output_transform": True, "output_bias": True}),
    "bart": (
        "seq2seq",
        "pairs",
        {"shared_embeddings": "tokens", "embed_norm": True, "output_bias": True, "activation": "silu", "d_value": 5},
    ),
    "t5": (
        "seq2seq",
        "pairs",
        {
            "position_embedding": "none",
            "score_bias": "relative",
            "relative_buckets": 6,
            "relative_distance": 11,
            "output_scale": True,
        }
        | {"n_layers": 2, "pad_vocab_to_multiple_of": 17},
    ),
    "m2m": (
        "seq2seq",
        "pairs",
        {"position_embedding": "sinusoidal_t2t", "first_position": 2, "activation": "relu2", "n_heads": 2},
    ),
    "alibi": (
        "gpt",
        "causal",
        {"position_embedding": "none", "score_bias": "alibi", "n_heads": 3, "n_kv_heads": 3, "activation": "relu2"},
    ),
}
TASKS = {"classify": ("gpt", "mean"), "regress": ("gpt", "token"), "tag": ("bert", "token")}
TASKS |= {"span": ("bert", "token"), "choice": ("bert", "late")}


BERT = {"norm_position": "post", "segment_types": 2, "embed_norm": True, "next_sentence": True}


@functools.cache
def vocabulary() -> tokenizers.Tokenizer:
    return tokenizers.train([made_up_text(60)], "bpe", 390)


def run_of(name: str, tiny, home: Path) -> Path:
    """A run directory of random weights; a name of TASKS is a fine-tuned run."""
    task, tokenizer = None, vocabulary()
    if name in TASKS:
        labels = ("no", "yes", "perhaps") if name in ("classify", "tag") else ()
        task = TaskInfo("made up", name, labels, 11, (), TASKS[name][1])
    family, kind, fields = CASES.get(name) or (TASKS[name][0], "", {})
    fields = {"n_layers": 1, **(BERT if family == "bert" else {}), **fields}
    if "rotary_scaling" in fields:
        fields |= {"rotary_scaling": dataclasses.replace(tiny.rotary_scaling, **fields["rotary_scaling"])}
    model = dataclasses.replace(tiny, context_length=LENGTH, vocab_size=len(tokenizer), **fields)
    trained_in = {"hybrid": {"causal_share": 0.25}, "diffusion": {"block_sizes": (1, 3, 0)}}.get(kind, {})
    objective = ObjectiveConfig(kind or ("masked" if family == "bert" else "causal"), **trained_in)
    data = DataConfig(source_field="de", target_field="en") if kind == "pairs" else DataConfig()
    recipe = Recipe(name="tiny", family=family, model=model.resolved(), objective=objective, data=data)
    rng = np.random.default_rng(0)
    params = jax.tree_util.tree_map_with_path(  # scales are around 1, so that nothing is lost behind a norm
        lambda path, s: rng.normal(path[-1].key == "scale", 0.3, s.shape).astype(np.float32), param_shapes(recipe, task)
    )
    write(Run(home, recipe, tokenizer, module_of(recipe, task), params, 0), home)
    if task:
        (home / "task.json").write_text(json.dumps(dataclasses.asdict(task)))
    return home


@pytest.fixture(scope="module")
def exported(tiny, tmp_path_factory):
    """Name of a case -> (its run, the directory it left as, what the export said); made once."""
    made = {}

    def of(name: str):
        if name not in made:
            home = tmp_path_factory.mktemp(name)
            run = run_of(name, tiny, home / "run")
            made[name] = run, home / "out", export_run(run, home / "out", lambda _: None)
        return made[name]

    return of


@pytest.fixture(scope="module", autouse=True)
def modules_cache(tmp_path_factory):
    """Where transformers puts a copy of a modelling file before it runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


def text_of(tokenizer: tokenizers.Tokenizer, ids) -> str:
    """What a run makes of ids up to the end. `tokenizers` gives one U+FFFD for every byte of a run of bytes that is no
    UTF-8, and we for the wrong ones only, so that texts of random weights are compared as one side decodes both."""
    ids = [int(i) for i in ids if i not in (tokenizer.pad, tokenizer.bos)]
    return tokenizer.decode(ids[: ids.index(tokenizer.eos)] if tokenizer.eos in ids else ids)


def opened(kind: str, home: Path):
    return getattr(transformers, kind).from_pretrained(home, trust_remote_code=True).eval()


@pytest.mark.parametrize("name", [*CASES, *TASKS])
def test_the_modelling_file_computes_what_we_do_and_the_run_comes_back(exported, name, tmp_path):
    run, out, said = exported(name)
    assert said.family == "bothways"
    assert said.max_difference < 1e-4
    import_run(str(out), tmp_path / "back", "shakespeare", lambda _: None)
    before, after = read_recipe(run), read_recipe(tmp_path / "back")
    assert (before.family, before.model.resolved()) == (after.family, after.model.resolved())
    assert read_task(run) == read_task(tmp_path / "back")
    for field in ("kind", "block_sizes", "causal_share"):
        assert getattr(before.objective, field) == getattr(after.objective, field)
    export_run(tmp_path / "back", tmp_path / "again", lambda _: None)
    for file in out.iterdir():
        if file.is_file():
            assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


def test_a_tuned_decoder_that_reads_both_ways_does_so_elsewhere(tiny, tmp_path):
    run = run_of("classify", tiny, tmp_path / "run")
    task = json.loads((run / "task.json").read_text())
    (run / "task.json").write_text(json.dumps(task | {"both_ways": True}))
    assert export_run(run, tmp_path / "out", lambda _: None).max_difference < 1e-4


@pytest.mark.parametrize("name", ["gpt", "modern", "gemma", "neox", "hybrid", "alibi"])
def test_greedy_text_with_a_cache_and_padding_on_the_left_is_ours(exported, name):
    run, out, _ = exported(name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out, padding_side="left", trust_remote_code=True)
    model, texts = opened("AutoModelForCausalLM", out), ["the king", "the queen sees the dog and"]
    here = bothways.load(run)
    ours = here.sample(texts, max_tokens=9, greedy=True)
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    told = model.generate(**inputs, max_new_tokens=9, do_sample=False)[:, inputs.input_ids.shape[1] :]
    for row, mine in zip(told, ours, strict=True):
        assert text_of(here.tokenizer, row) == mine.text


@pytest.mark.parametrize("name", ["pairs", "spans", "bart", "t5"])
def test_an_encoder_decoder_writes_the_same_target(exported, name):
    run, out, _ = exported(name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    model, texts = opened("AutoModelForSeq2SeqLM", out), ["the king", "the queen sees the dog and"]
    here = bothways.load(run)
    ours = here.sample(texts, max_tokens=9, greedy=True)
    told = model.generate(**tokenizer(texts, return_tensors="pt", padding=True), max_new_tokens=9, do_sample=False)
    for row, mine in zip(told, ours, strict=True):
        assert text_of(here.tokenizer, row) == mine.text


def test_a_hybrid_and_a_dial_are_masked_models_too(exported):
    """Read both ways, and in blocks, as the run's own module reads them."""
    for name, block in (("hybrid", None), ("dial", 3)):
        run, out, _ = exported(name)
        mine, tokens = load_run(run, print), np.arange(4, 17, dtype=np.int32)[None]
        model = opened("AutoModelForMaskedLM", out)

        def ours(module, tokens=tokens, block=block):
            whole = np.full(1, tokens.shape[1], np.int32) if block is None else None
            return module.logits(module.own(module(tokens, prefix=whole, block=block)[0]))

        wanted = mine.module.apply({"params": mine.params}, method=ours)
        with torch.no_grad():
            got = model(torch.from_numpy(tokens.astype(np.int64)), block_size=block).logits.numpy()
        np.testing.assert_allclose(got, wanted, atol=1e-4, rtol=0)


def test_a_fine_tuned_run_has_its_labels_and_padding_changes_nothing(exported):
    for name, kind in (("classify", "SequenceClassification"), ("tag", "TokenClassification")):
        model = opened(f"AutoModelFor{kind}", exported(name)[1])
        assert model.config.id2label == {0: "no", 1: "yes", 2: "perhaps"}
        tokens = torch.arange(5, 12)[None]
        padded = torch.nn.functional.pad(tokens, (0, 3))
        with torch.no_grad():
            alone, beside = model(tokens).logits, model(padded, attention_mask=(padded > 0).long()).logits
        np.testing.assert_allclose(beside[:, : alone.shape[1]], alone, atol=1e-5)


def test_a_head_stays_in_float32_where_matrices_are_bfloat16(exported, tmp_path):
    """As our own heads do, so that the scores there are the scores here."""
    from safetensors.torch import load_file  # numpy has no bfloat16

    run = exported("classify")[0]
    done = export_run(run, tmp_path / "out", lambda _: None, dtype="bfloat16")
    assert done.max_difference < 1e-4
    kinds = {name: tensor.dtype for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items()}
    heads = {name for name, kind in kinds.items() if kind == torch.float32 and name.endswith("weight") and "head" in name}
    assert heads
    assert torch.bfloat16 in kinds.values()
