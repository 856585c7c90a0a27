"""LLaDA and Dream, whose code is not in `transformers`: they compute what a Llama or a Qwen 2 without its causal mask does."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bothways.convert.run import export_run, import_run
from bothways.rundir import load_run
from tests.convert.published import save_tokenizer, shuffled

torch = pytest.importorskip("torch", reason="the extra `parity` (torch, transformers) is not installed")
transformers = pytest.importorskip("transformers", reason="the extra `parity` (torch, transformers) is not installed")

SIZES = {"hidden_size": 42, "num_attention_heads": 3, "num_hidden_layers": 2, "intermediate_size": 41}
SIZES |= {
    "num_key_value_heads": 1,
    "max_position_embeddings": 37,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "rms_norm_eps": 1e-5,
}
LLADA = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "num_hidden_layers": "n_layers",
    "intermediate_size": "mlp_hidden_size",
    "max_position_embeddings": "max_sequence_length",
    "rms_norm_eps": "rms_norm_eps",
}
NAMES = {"embed_tokens": "wte", "norm": "ln_f", "self_attn.o_proj": "attn_out", "input_layernorm": "attn_norm"}
NAMES |= {"post_attention_layernorm": "ff_norm", "mlp.gate_proj": "ff_proj", "mlp.up_proj": "up_proj"}
NAMES |= {f"self_attn.{name}": name for name in ("q_proj", "k_proj", "v_proj")} | {"mlp.down_proj": "ff_out"}


def as_llada(home: Path) -> None:
    """A Llama's checkpoint under the names of LLaDA's."""

    def named(name: str) -> str:
        if name == "lm_head.weight":
            return "model.transformer.ff_out.weight"
        *where, stem = name.removeprefix("model.").removesuffix(".weight").split(".", 2)
        where = f"blocks.{where[1]}." if where else ""
        return f"model.transformer.{where}{NAMES[stem]}.weight"

    tensors, config = load_file(home / "model.safetensors"), json.loads((home / "config.json").read_text())
    save_file({named(name): tensor for name, tensor in tensors.items()}, home / "model.safetensors")
    found = {ours: config[theirs] for theirs, ours in LLADA.items()} | {"model_type": "llada", "rope_theta": 500.0}
    (home / "config.json").write_text(json.dumps(found | {"block_type": "llama", "weight_tying": False}))


@pytest.mark.parametrize("name", ["llada", "Dream"])
def test_it_is_a_decoder_without_its_causal_mask_and_comes_back(name, tmp_path):
    source, kind = tmp_path / "source", "Llama" if name == "llada" else "Qwen2"
    values = SIZES | {"vocab_size": save_tokenizer("llama", source), "rope_parameters": {"rope_theta": 500.0}}
    config = getattr(transformers, f"{kind}Config")(**values)
    torch.manual_seed(0)
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(source)
    shuffled(source)
    theirs = getattr(transformers, f"{kind}ForCausalLM").from_pretrained(source, attn_implementation="eager").eval()
    tokens = np.random.default_rng(1).integers(5, 60, (1, 11)).astype(np.int32)
    with torch.no_grad():
        everything = torch.zeros(1, 1, 11, 11)
        wanted = theirs(torch.from_numpy(tokens.astype(np.int64)), attention_mask=everything).logits.numpy()
        assert np.abs(theirs(torch.from_numpy(tokens.astype(np.int64))).logits.numpy() - wanted).max() > 0.1
    if name == "llada":
        as_llada(source)
    else:
        stated = json.loads((source / "config.json").read_text()) | {
            "model_type": "Dream",
            "architectures": ["DreamModel"],
        }
        (source / "config.json").write_text(json.dumps(stated))

    assert import_run(str(source), tmp_path / "run", "shakespeare", print).family == name
    run = load_run(tmp_path / "run", print)
    assert (run.recipe.objective.kind, run.recipe.objective.block_sizes) == ("diffusion", (0,))
    assert run.recipe.model.predicts == {"llada": "own", "Dream": "next"}[name]

    def whole(module):
        return module.logits(module(tokens, prefix=np.full(1, 11, np.int32))[0])

    np.testing.assert_allclose(run.module.apply({"params": run.params}, method=whole), wanted, atol=1e-4, rtol=0)
    export_run(tmp_path / "run", tmp_path / "a", print)
    import_run(str(tmp_path / "a"), tmp_path / "again", "shakespeare", print)
    export_run(tmp_path / "again", tmp_path / "b", print)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    stored = load_file(tmp_path / "a" / "model.safetensors")
    for key, tensor in load_file(source / "model.safetensors").items():
        np.testing.assert_array_equal(stored[key], tensor)
