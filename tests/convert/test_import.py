"""Checkpoints in and out without any other library: every tensor once, nothing half-written, an import trains on."""

import dataclasses
import json
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bothways import one_by_one
from bothways.configs import find
from bothways.convert import check, files
from bothways.convert.families import FAMILIES, family_for
from bothways.convert.gguf_file import ARCHITECTURES
from bothways.convert.layout import shapes_of
from bothways.convert.run import _fitting, export_run, import_run
from bothways.convert.stored import DTYPES, save_tensors
from bothways.errors import InputError
from bothways.model.config import RotaryScaling
from bothways.model.stack import unstack_layers
from bothways.recipes import Recipe
from bothways.rundir import param_shapes
from tests.convert.published import SIZES, change, checkpoint, refused

# ---- layout -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_giving_is_taking_backwards_and_no_tensor_is_left(name, tmp_path):
    source = checkpoint(name, tmp_path)
    family, tensors = FAMILIES[name], load_file(source / "model.safetensors")
    cfg = family.config(json.loads((source / "config.json").read_text()), tensors)
    shapes = shapes_of(param_shapes(Recipe(family=family.ours, model=cfg)))
    layout = family.layout_for(cfg)
    params = layout.from_checkpoint(tensors, shapes, family.absent(cfg))
    again = layout.to_checkpoint(params, family.absent(cfg))
    assert again.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_allclose(again[key], tensor, rtol=0, atol=1e-7 if layout.norms_from_zero else 0)
    with pytest.raises(InputError, match=f"left over: {min(tensors)}"):
        layout.from_checkpoint(tensors, shapes, {min(tensors)})


def test_every_problem_with_the_tensors_is_named(tmp_path, capfd):
    source = checkpoint("gpt2", tmp_path / "source")
    change(source, **{"transformer/ln_f/bias": None, "extra/weight": np.zeros(3, np.float32)})
    change(source, **{"transformer/h/1/attn/c_attn/weight": np.zeros((22, 65), np.float32)})
    says = ["missing: transformer.ln_f.bias", "left over: extra.weight", "c_attn.weight is [22, 65], wanted [22, 66]"]
    refused(source, tmp_path / "run", capfd, *says)


def test_a_configuration_is_what_it_was_after_both_ways():
    """For each family, with each value that has a field of its own away from its default."""
    theirs = FAMILIES["llama"].config(
        {"model_type": "llama", "vocab_size": 31}
        | SIZES["llama"]
        | {"rope_scaling": {"type": "yarn", "factor": 3, "original_max_position_embeddings": 7, "attention_factor": 1.5}}
        | {"tie_word_embeddings": True, "attention_dropout": 0.2, "rms_norm_eps": 1e-3},
        ["model."],
    )
    assert theirs.rotary_scaling == RotaryScaling("yarn", 3.0, 7, 1.0, 32.0, 1.5)
    assert (theirs.dropout_attention, theirs.norm_eps, theirs.tie_embeddings) == (0.2, 1e-3, True)
    assert FAMILIES["llama"].differences(theirs) == []
    assert FAMILIES["llama"].differences(dataclasses.replace(theirs, qk_norm=True)) == ["qk_norm=False, not True"]
    modern = dataclasses.replace(find("modernbert_base").model, layer_pattern=("global", "local"), rotary_base_local=5.0)
    assert family_for(modern.resolved(), "bert", 0).name == "modernbert"


def test_a_run_that_no_published_family_computes_says_why(tiny, tmp_path):
    cfg = dataclasses.replace(tiny, activation="relu2", d_head=11)
    with pytest.raises(InputError, match=r"no published family(.|\n)*gpt2 .*relu2(.|\n)*llama "):
        family_for(cfg, "gpt", 0)


# ---- what comes in ----------------------------------------------------------------------------------------------------


def test_a_sharded_checkpoint_and_bfloat16_give_the_same_run(tmp_path):
    source = checkpoint("llama", tmp_path / "whole")
    tensors = {k: v.astype(ml_dtypes.bfloat16) for k, v in load_file(source / "model.safetensors").items()}
    (source / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, some in parts.items():
        save_file({k: tensors[k] for k in some}, source / file)
    (source / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {k: file for file, some in parts.items() for k in some}})
    )
    found = files.read(str(source)).tensors
    assert found.keys() == tensors.keys()
    for key in names:
        np.testing.assert_array_equal(found[key], tensors[key].astype(np.float32))
    (source / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match="not there: model-00002-of-00002"):
        files.read(str(source))


def test_a_bfloat16_checkpoint_goes_through_without_loss_and_in_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("bothways.convert.check.transformers_logits", lambda *_: (None, ""))
    monkeypatch.setattr("bothways.convert.stored.ON_DISK", 2**10)  # parameters lie in files meanwhile
    monkeypatch.setattr(one_by_one, "CHUNK", 2**10)
    whole, computed = check.our_logits, []

    def by_layer(recipe, params, *rest):
        one = whole(recipe, params, *rest)
        with monkeypatch.context() as patch:
            patch.setattr(check, "BY_LAYER", 0)
            for these in (params, unstack_layers(params)):  # as they are kept, and as they are decoded with
                computed.append(np.abs(whole(recipe, these, *rest) - one).max())
        return one

    monkeypatch.setattr(check, "our_logits", by_layer)
    source = checkpoint("llama", tmp_path / "source")
    tensors = {
        k: v.astype(ml_dtypes.bfloat16) if v.ndim > 1 else v for k, v in load_file(source / "model.safetensors").items()
    }
    save_file(tensors, source / "model.safetensors")
    import_run(str(source), tmp_path / "run", "shakespeare", print, "bfloat16")
    export_run(tmp_path / "run", tmp_path / "out", print)
    assert len(computed) == 2
    assert max(computed) < 1e-5
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert {k: v.dtype for k, v in out.items()} == {k: v.dtype for k, v in tensors.items()}
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(out[name], tensor)
    stored = files.stored_tensors(tmp_path / "out" / "model.safetensors")
    (tmp_path / "shards").mkdir()
    save_tensors(tmp_path / "shards", stored, DTYPES["bfloat16"], shard_bytes=3000)
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys()
    sizes = [p.stat().st_size for p in (tmp_path / "shards").glob("*.safetensors")]
    assert len(sizes) > 3
    for name, file in index["weight_map"].items():
        np.testing.assert_array_equal(load_file(tmp_path / "shards" / file)[name], tensors[name])


def test_a_table_may_have_a_few_rows_more_than_the_vocabulary_has_tokens():
    """DeepSeek's have 102,400 for 100,015 tokens; none beyond the vocabulary is ever drawn."""
    for tokens, rows in ((100_015, 102_400), (100_015, 105_278), (307, 1331), (307, 307)):
        assert _fitting(range(tokens), rows, "x", print) == range(tokens)
    for tokens, rows in ((100_015, 105_279), (307, 1332), (307, 306)):
        with pytest.raises(InputError, match="not of one model"):
            _fitting(range(tokens), rows, "x", print)


def test_first_names_copies_and_buffers_of_bert(tmp_path):
    """bert-base-uncased calls norms gamma and beta, repeats the output layer, and stores position ids."""
    source = checkpoint("bert", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    old = {
        (k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")): v
        for k, v in tensors.items()
    }
    old["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"]
    old["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"]
    old["bert.embeddings.position_ids"] = np.arange(23)[None]
    plain = FAMILIES["bert"].canonical_names(old, tied=True)
    assert plain.keys() == tensors.keys()
    with pytest.raises(InputError, match="decoder.weight and bert.embeddings.*differ"):
        FAMILIES["bert"].canonical_names(
            old | {"cls.predictions.decoder.weight": old["cls.predictions.decoder.weight"] + 1}, tied=True
        )
    body = {k.removeprefix("bert."): v for k, v in tensors.items() if k.startswith("bert.")}
    assert FAMILIES["bert"].canonical_names(body, tied=True).keys() == {k for k in tensors if k.startswith("bert.")}


def test_the_first_checkpoints_of_nomic_bert_have_gpt2s_keys():
    """nomic-embed-text-v1.5, published before `transformers` had the family."""
    old = {"n_embd": 28, "n_head": 2, "n_layer": 3, "n_inner": 26, "n_positions": 23, "layer_norm_epsilon": 1e-6}
    old |= {
        "attn_pdrop": 0.1,
        "embd_pdrop": 0.2,
        "resid_pdrop": 0.2,
        "rotary_emb_base": 500,
        "rotary_scaling_factor": None,
    }
    old |= {"activation_function": "swiglu", "mlp_fc1_bias": False, "prenorm": False, "vocab_size": 31}
    new = SIZES["nomic_bert"] | {"layer_norm_eps": 1e-6, "attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.2}
    new |= {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "vocab_size": 31}
    family = FAMILIES["nomic_bert"]
    assert family.config(old, ["nomic_bert."]) == family.config(new, ["nomic_bert."])
    assert family.config({"vocab_size": 31}, []).rotary_base == 1000.0
    with pytest.raises(InputError, match="mlp_fc1_bias is True; a nomic_bert with that"):
        family.config(old | {"mlp_fc1_bias": True}, ["nomic_bert."])


def write_gguf(source: Path, path: Path, architecture: str = "llama", add_bos: bool = True) -> None:
    """A GGUF file of a Llama checkpoint, as llama.cpp converts it: rotary pairs side by side, half precision."""
    config, tensors = json.loads((source / "config.json").read_text()), load_file(source / "model.safetensors")
    fast = json.loads((source / "tokenizer.json").read_text())
    writer = gguf.GGUFWriter(path, architecture)
    for theirs, name in ARCHITECTURES["llama"].config.items():
        if name in config:
            add = writer.add_float32 if isinstance(config[name], float) else writer.add_uint32
            add(f"{architecture}.{theirs}", config[name])
    tokens = sorted(fast["model"]["vocab"], key=fast["model"]["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if t in ("<s>", "</s>") else 1 for t in tokens])
    writer.add_token_merges([" ".join(pair) for pair in fast["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(add_bos)
    back = {stem.removeprefix("model.layers.{}."): name for name, stem in ARCHITECTURES["llama"].stems.items()}
    for name, tensor in tensors.items():
        parts = name.split(".")
        stem = ".".join(parts[3:-1]) if parts[1] == "layers" else ".".join(parts[:-1])
        if stem in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = config["num_attention_heads" if stem[10] == "q" else "num_key_value_heads"]
            tensor = tensor.reshape(heads, 2, -1, tensor.shape[-1]).swapaxes(1, 2).reshape(tensor.shape)
        where = f"blk.{parts[2]}." if parts[1] == "layers" else ""
        writer.add_tensor(f"{where}{back[stem]}.weight", tensor.astype(np.float16 if tensor.ndim > 1 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_file_is_the_checkpoint_that_it_was_made_from(tmp_path, tied):
    source = checkpoint("llama", tmp_path / "source", tie_word_embeddings=tied)
    write_gguf(source, tmp_path / "model.gguf")
    whole, packed = files.read(str(source)), files.read(str(tmp_path / "model.gguf"))
    assert packed.tensors.keys() == whole.tensors.keys()
    for name, tensor in whole.tensors.items():
        np.testing.assert_allclose(packed.tensors[name], tensor, atol=1e-3)
    configs = [FAMILIES["llama"].config(s.config, s.tensors) for s in (whole, packed)]
    assert dataclasses.replace(configs[1], norm_eps=1e-5) == configs[0]  # GGUF keeps it in float32
    text = "the dog sees 42 ships."
    assert packed.tokenizer.encode(text) == whole.tokenizer.encode(text)
    assert (packed.tokenizer.opening, packed.tokenizer.eos) == ((0,), 1)


# ---- what is refused --------------------------------------------------------------------------------------------------


def test_a_truncated_file_is_refused(tmp_path, capfd):
    source = checkpoint("gpt2", tmp_path / "source")
    whole = (source / "model.safetensors").read_bytes()
    for size in (len(whole) - 100, 50, 3):
        (source / "model.safetensors").write_bytes(whole[:size])
        refused(source, tmp_path / "run", capfd, "model.safetensors cannot be read", f"{size:,} bytes", "is it whole?")
    write_gguf(checkpoint("llama", tmp_path / "llama"), tmp_path / "x.gguf")
    packed = (tmp_path / "x.gguf").read_bytes()
    for size in (len(packed) - 1000, 500, 2):
        (tmp_path / "x.gguf").write_bytes(packed[:size])
        refused(tmp_path / "x.gguf", tmp_path / "run", capfd, "x.gguf cannot be read", "is it whole?")


def test_what_is_not_supported_is_refused_by_name(tmp_path, capfd):
    source = checkpoint("gpt2", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    for values, part in (
        ({"model_type": "mamba"}, "family 'mamba'; there are gpt2, openai-gpt, llama"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"activation_function": "swish"}, "activation 'swish'"),
        ({"n_embd": None}, "must say 'n_embd'"),
        ({"vocab_size": 290}, "307 tokens, and its config.json says vocab_size=290"),
        ({"vocab_size": 4000}, "307 tokens, and its config.json says vocab_size=4000"),
        ({"n_head": 4}, "d_model=22 is not divisible by model.n_heads=4"),
        ({"n_head": "2"}, "n_head is '2'; it must be a whole number"),
        ({"n_layer": 2.5}, "n_layer is 2.5; it must be a whole number"),
        ({"n_embd": [22]}, "n_embd is [22]; it must be a whole number"),
        ({"n_positions": True}, "n_positions is True; it must be a whole number"),
        ({"layer_norm_epsilon": "small"}, "layer_norm_epsilon is 'small'; it must be a number"),
        ({"rope_parameters": [1]}, "rope_parameters is [1]; it must be an object"),
        ({"architectures": 5}, "architectures is 5; it must be a list of names"),
        ({"architectures": [{}]}, "architectures is [{}]; it must be a list of names"),
        ({"model_type": ["gpt2"]}, "the family ['gpt2']; there are gpt2"),
        ({"bos_token_id": "a"}, "bos_token_id is 'a'; it must be a whole number, a list of these, or null"),
        ({"eos_token_id": [{}]}, "eos_token_id is [{}]; it must be a whole number"),
        ({"vocab_size": 0}, "vocab_size is 0; it must be how many tokens there are"),
    ):
        (source / "config.json").write_text(json.dumps(config | values))
        refused(source, tmp_path / "run", capfd, part)
    (source / "config.json").write_text("[]")
    refused(source, tmp_path / "run", capfd, "holds no JSON object")
    refused(tmp_path, tmp_path / "run", capfd, "has no config.json")
    refused(tmp_path / "absent", tmp_path / "run", capfd, "absent does not exist")
    llama = checkpoint("llama", tmp_path / "llama")
    write_gguf(llama, tmp_path / "x.gguf", architecture="falcon")
    refused(tmp_path / "x.gguf", tmp_path / "run", capfd, "'falcon'")
    config = json.loads((llama / "config.json").read_text()) | {"rope_scaling": {"rope_type": "longrope", "factor": 2}}
    (llama / "config.json").write_text(json.dumps(config))
    refused(llama, tmp_path / "run", capfd, "longrope", "linear, dynamic, llama3, yarn")
    (llama / "config.json").write_text(json.dumps(config | {"rope_scaling": {"rope_type": "linear", "factor": "two"}}))
    refused(llama, tmp_path / "run", capfd, "config.json of this llama is not understood", "'two'")
    gemma = checkpoint("gemma2", tmp_path / "gemma")
    config = json.loads((gemma / "config.json").read_text())
    (gemma / "config.json").write_text(json.dumps(config | {"attn_logit_softcapping": "fifty"}))
    refused(gemma, tmp_path / "run", capfd, "config.json of this gemma2 is not understood", "'fifty'")


def test_no_pickle_is_opened(tmp_path, capfd):
    source = checkpoint("gpt2", tmp_path / "source")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    refused(source, tmp_path / "run", capfd, "pytorch_model.bin is a pickle", "save_pretrained")
    (tmp_path / "model.ckpt").write_bytes(b"x")
    refused(tmp_path / "model.ckpt", tmp_path / "run", capfd, "model.ckpt is a pickle", "save_pretrained")


def test_nothing_is_written_over(tmp_path, capfd):
    source = checkpoint("gpt2", tmp_path / "source")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("x")
    refused(source, tmp_path / "run", capfd, "exists already")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"qk_layernorm": True}, "qk_layernorm is True; a stablelm with that is not supported"),
        ({"partial_rotary_factor": 0.1}, "partial_rotary_factor 0.1 turns none of a head's 4 features"),
        ({"partial_rotary_factor": 0.9}, "rotary_width=3 must be even"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rotary scaling is not supported"),
        ({"use_qkv_bias": "yes"}, "use_qkv_bias is 'yes'; it must be true or false"),
        ({"hidden_act": "tanh"}, "the activation 'tanh' is not among silu"),
    ],
)
def test_a_stablelm_that_the_block_does_not_compute_is_refused(values, part):
    sizes = SIZES["stablelm"] | {"vocab_size": 83}
    assert FAMILIES["stablelm"].config(sizes, []).parallel == ""
    with pytest.raises(InputError, match=part):
        FAMILIES["stablelm"].config(sizes | values, [])
