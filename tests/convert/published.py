"""Checkpoints, tiny and random, with vocabularies learned from a made-up language."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import tokenizers
from safetensors.numpy import load_file, save_file

import bothways
from bothways.convert.families import FAMILIES
from bothways.recipes import Recipe
from bothways.rundir import param_shapes
from tests.corpus import made_up_text

SPECIAL = {"gpt2": ["<|endoftext|>"], "llama": ["<s>", "</s>"]}
BERT_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROBERTA_SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def byte_level(special: list[str], size: int = 307) -> tokenizers.Tokenizer:
    """Byte-level BPE, the special tokens first."""
    fast = tokenizers.Tokenizer(tokenizers.models.BPE())
    fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = tokenizers.decoders.ByteLevel()
    named = [tokenizers.AddedToken(t, special=True, lstrip=t == "<mask>") for t in special]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=named, initial_alphabet=alphabet, show_progress=False
    )
    fast.train_from_iterator([made_up_text(60)], trainer)
    return fast


def wordpiece(size: int = 83) -> tokenizers.Tokenizer:
    """BERT's WordPiece, uncased; with padding and truncation set, as sentence-transformers leaves them."""
    fast = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    fast.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    fast.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    fast.decoder = tokenizers.decoders.WordPiece()
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=size, special_tokens=BERT_SPECIAL, limit_alphabet=50, show_progress=False
    )
    fast.train_from_iterator([made_up_text(60)], trainer)
    fast.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[(t, fast.token_to_id(t)) for t in ("[CLS]", "[SEP]")],
    )
    fast.enable_truncation(11)
    fast.enable_padding(length=13)
    return fast


def tokenizer_for(family: str) -> tokenizers.Tokenizer:
    alike = {
        "distilbert": "bert",
        "electra": "bert",
        "xlm-roberta": "roberta",
        "camembert": "roberta",
        "openai-gpt": "gpt2",
        "albert": "bert",
        "nomic_bert": "bert",
        "eurobert": "modernbert",
        "modernbert-decoder": "modernbert",
        "mpnet": "roberta",
        **dict.fromkeys(("bart", "mbart", "marian", "pegasus", "m2m_100"), "roberta"),
    }
    family = alike.get(family, family)
    return learned(family if family in ("bert", "modernbert", "roberta", "gpt2") else "llama")


@functools.cache
def learned(family: str) -> tokenizers.Tokenizer:
    """Of a family with a vocabulary of its own; learned once, so that nobody may change it."""
    if family in ("bert", "modernbert"):
        return wordpiece() if family == "bert" else byte_level(BERT_SPECIAL)
    return byte_level(ROBERTA_SPECIAL if family == "roberta" else SPECIAL[family])


def save_tokenizer(family: str, home: Path) -> int:
    """tokenizer.json beside a checkpoint; how many tokens it has."""
    fast = tokenizer_for(family)
    home.mkdir(parents=True, exist_ok=True)
    fast.save(str(home / "tokenizer.json"))
    return fast.get_vocab_size()


def written(home: Path, config: dict, tensors: dict[str, np.ndarray]) -> Path:
    """A checkpoint directory from its parts."""
    (home / "config.json").write_text(json.dumps(config))
    save_file(tensors, home / "model.safetensors", {"format": "pt"})
    return home


def shuffled(home: Path, seed: int = 0) -> None:
    """Norms and biases get numbers of their own, so that none can be mistaken for another."""
    rng, tensors = np.random.default_rng(seed), load_file(home / "model.safetensors")
    noisy = {n: (t + rng.normal(0, 0.2, t.shape)).astype(np.float32) for n, t in tensors.items()}
    save_file(noisy, home / "model.safetensors", {"format": "pt"})


SIZES = {
    "gpt2": {"n_embd": 22, "n_head": 2, "n_layer": 3, "n_inner": 26, "n_positions": 23},
    "llama": {
        "hidden_size": 22,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_hidden_layers": 3,
    }
    | {"intermediate_size": 26, "max_position_embeddings": 23, "rope_theta": 500.0, "rms_norm_eps": 1e-5},
}
SIZES["bert"] = {"hidden_size": 22, "num_attention_heads": 2, "num_hidden_layers": 3, "intermediate_size": 26}
SIZES["roberta"] = SIZES["bert"] | {"max_position_embeddings": 25}
SIZES["bert"] |= {"max_position_embeddings": 23}
SIZES["modernbert"] = SIZES["bert"] | {"hidden_size": 20, "num_hidden_layers": 4}
SIZES["modernbert-decoder"] = SIZES["modernbert"] | {"local_attention": 6}
SIZES |= {"xlm-roberta": SIZES["roberta"], "camembert": SIZES["roberta"]}
SIZES["distilbert"] = {"dim": 22, "n_heads": 2, "n_layers": 3, "hidden_dim": 26, "max_position_embeddings": 23}
SIZES["electra"] = SIZES["bert"] | {"embedding_size": 22}
SIZES["openai-gpt"] = {k: v for k, v in SIZES["gpt2"].items() if k != "n_inner"}
SIZES |= {"mistral": SIZES["llama"] | {"sliding_window": 7}, "qwen3": SIZES["llama"]}
SIZES["phi3"] = {k: v for k, v in SIZES["llama"].items() if k != "head_dim"} | {"hidden_size": 24}
SIZES |= dict.fromkeys(("qwen2", "smollm3", "ernie4_5", "gemma"), SIZES["llama"])
SIZES["gemma2"] = SIZES["llama"] | {"sliding_window": 5, "query_pre_attn_scalar": 8}
SIZES["gemma2"] |= {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 0.75}
SIZES["gemma3_text"] = SIZES["llama"] | {"sliding_window": 5, "sliding_window_pattern": 2}
SIZES["smollm3"] = SIZES["llama"] | {"no_rope_layer_interval": 2}
SIZES |= dict.fromkeys(("olmo2", "starcoder2"), SIZES["phi3"])
SIZES["starcoder2"] = SIZES["phi3"] | {"sliding_window": 5}
SIZES |= dict.fromkeys(("gpt_neox", "phi"), SIZES["bert"] | {"hidden_size": 24, "rotary_pct": 0.5})
SIZES["stablelm"] = SIZES["phi3"] | {"use_qkv_bias": True, "partial_rotary_factor": 0.5}
SIZES["nemotron"] = SIZES["llama"] | {"norm_eps": 1e-4}
SIZES["gptj"] = SIZES["gpt2"] | {"n_embd": 24, "rotary_dim": 6}
SIZES["opt"] = {k: v for k, v in SIZES["bert"].items() if k != "intermediate_size"} | {"ffn_dim": 26}
SIZES["llada"] = {"d_model": 24, "n_heads": 4, "n_kv_heads": 2, "n_layers": 3, "mlp_hidden_size": 26}
SIZES["llada"] |= {"max_sequence_length": 23, "rope_theta": 500.0}
SIZES["Dream"] = SIZES["phi3"]
SIZES["bloom"] = {"hidden_size": 21, "n_head": 3, "n_layer": 3, "seq_length": 23}
SIZES["falcon"] = {"hidden_size": 24, "num_attention_heads": 6, "num_hidden_layers": 3, "ffn_hidden_size": 26}
SIZES["falcon"] |= {"num_kv_heads": 2, "new_decoder_architecture": True, "max_position_embeddings": 23}
SIZES["albert"] = SIZES["bert"] | {"embedding_size": 14}
SIZES["mpnet"] = SIZES["roberta"]
SIZES["eurobert"] = SIZES["llama"]
SIZES["nomic_bert"] = SIZES["bert"] | {"hidden_size": 28}
SIDES = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 3), ("attention_heads", 2))}
SIDES |= {"encoder_ffn_dim": 26, "decoder_ffn_dim": 26, "d_model": 22, "max_position_embeddings": 23}
SIDES |= {"is_encoder_decoder": True, "decoder_start_token_id": 2}
SIZES |= dict.fromkeys(("bart", "mbart", "marian", "pegasus", "m2m_100"), SIDES)
SIZES["t5"] = {
    "d_model": 22,
    "d_kv": 6,
    "d_ff": 26,
    "num_layers": 3,
    "num_heads": 2,
    "relative_attention_num_buckets": 10,
}
SIZES["t5"] |= {"relative_attention_max_distance": 13, "is_encoder_decoder": True, "decoder_start_token_id": 1}
SIZES["mt5"] = SIZES["t5"]
STEM_OF_HEAD = {
    **{name: ["final_logits_bias"] for name in ("bart", "mbart", "marian", "pegasus")},
    "bert": ["cls.predictions.", "cls.seq_relationship."],
    "roberta": ["lm_head."],
    "albert": ["predictions.", "sop_classifier."],
    "mpnet": ["lm_head."],
    "modernbert": ["decoder."],
    "nomic_bert": ["cls.predictions."],
}


def checkpoint(name: str, home: Path, **values) -> Path:
    """A checkpoint of random numbers, laid out as the family's own."""
    family, vocab_size = FAMILIES[name], save_tokenizer(name, home)
    config = {"model_type": name, "vocab_size": vocab_size} | SIZES[name] | values
    cfg = family.config(config, [family.prefix, *STEM_OF_HEAD.get(name, [])])
    shapes = param_shapes(Recipe(family=family.ours, model=cfg))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: rng.normal(0, 0.2, s.shape).astype(np.float32), shapes)
    return written(home, config, family.layout_for(cfg).to_checkpoint(params, family.absent(cfg)))


def change(home: Path, **tensors) -> None:
    """Replace tensors of a checkpoint, or add them; None takes one away."""
    found = load_file(home / "model.safetensors") | {k.replace("/", "."): v for k, v in tensors.items()}
    save_file({k: v for k, v in found.items() if v is not None}, home / "model.safetensors")


def quiet(_: str) -> None:
    pass


def refused(source: Path | str, home: Path, capfd, *parts: str) -> None:
    """The import ends with code 2, says all this, and leaves nothing behind."""
    before = sorted(home.parent.iterdir())
    assert bothways.main(["import", str(source), str(home)]) == 2
    said = capfd.readouterr().err
    for part in parts:
        assert part in said, said
    assert sorted(home.parent.iterdir()) == before
