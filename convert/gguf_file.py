"""GGUF, the file format of llama.cpp, for decoders of the Llama family: read as the checkpoint that it was made from."""

from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from bothways.convert.files import Checkpoint
from bothways.data.published import PublishedTokenizer, roles_of
from bothways.data.vocabulary_files import byte_level_bpe
from bothways.errors import InputError

STEMS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONFIG = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "feed_forward_length": "intermediate_size",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
CONTROL, USER_DEFINED = 3, 4
"""Types of tokens: those that stand for no text, and those that are found in a text before it is cut."""
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _splitting(kind: str) -> tokenizers.pre_tokenizers.PreTokenizer | None:
    """How a text is cut before merging, by llama.cpp's name for it; None where byte-level BPE does it alone."""
    pre = tokenizers.pre_tokenizers
    if kind in ("default", "gpt-2"):
        return None
    if kind == "smollm":
        return pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)])
    if kind == "llama-bpe":
        split = pre.Split(tokenizers.Regex(LLAMA3), "isolated")
        return pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    raise InputError(f"this GGUF file cuts texts as {kind!r}; there are default, gpt-2, smollm, llama-bpe")


def read(path: Path) -> Checkpoint:
    """A Llama-family decoder, dequantised.

    Raises:
      InputError: no such file, damaged, of another architecture, or the package gguf is not installed.
    """
    try:
        import gguf
    except ImportError as e:
        raise InputError(f"{path} is a GGUF file; to read it, `pip install gguf`") from e
    if not path.is_file():
        raise InputError(f"no file {path}")
    try:
        reader = gguf.GGUFReader(path)
        said = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {t.name: gguf.dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors}
    except NotImplementedError as e:
        raise InputError(f"{path}: {e} in the package gguf; give a file in another quantisation, such as Q8_0") from e
    except (ValueError, KeyError, IndexError, OSError, MemoryError) as e:
        raise InputError(
            f"{path} cannot be read ({type(e).__name__}: {e}); it is {path.stat().st_size:,} bytes long: is it whole?"
        ) from e
    kind = said.get("general.architecture")
    if kind != "llama":
        raise InputError(f"{path} holds a {kind!r}; of GGUF files only the Llama family is supported")
    config: dict[str, Any] = {theirs: said[f"llama.{name}"] for name, theirs in CONFIG.items() if f"llama.{name}" in said}
    config |= {"model_type": "llama", "tie_word_embeddings": "output.weight" not in tensors}
    config |= {"vocab_size": tensors["token_embd.weight"].shape[0]} if "token_embd.weight" in tensors else {}
    factors = tensors.pop("rope_freqs.weight", None)
    scaling = said.get("llama.rope.scaling.type", "none")
    if factors is not None or scaling not in ("none", "linear"):
        raise InputError(
            f"{path} has rotary scaling of a kind that GGUF does not spell out; import the original checkpoint"
        )
    if scaling == "linear":
        config["rope_scaling"] = {"rope_type": "linear", "factor": said["llama.rope.scaling.factor"]}
    heads = {"attn_q": config.get("num_attention_heads"), "attn_k": config.get("num_key_value_heads")}
    renamed = {}
    for name, tensor in tensors.items():
        parts = name.split(".")  # token_embd.weight, or blk.7.attn_q.weight
        stem = parts[-2]
        if heads.get(stem):
            tensor = _halves(tensor, heads[stem])
        where = f"model.layers.{parts[1]}." if parts[0] == "blk" else ""
        renamed[f"{where}{STEMS.get(stem, stem)}.{parts[-1]}"] = tensor
    return Checkpoint(path, config, renamed, _tokenizer(said, path))


def _halves(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key matrix: llama.cpp pairs feature 2k with 2k + 1 for its rotary positions, we k with k + K/2."""
    pairs = tensor.reshape(heads, -1, 2, *tensor.shape[1:])
    return pairs.swapaxes(1, 2).reshape(tensor.shape)


def _tokenizer(said: dict[str, Any], path: Path) -> PublishedTokenizer:
    model = said.get("tokenizer.ggml.model")
    if model != "gpt2":
        raise InputError(
            f"{path} holds a {model!r} vocabulary; of GGUF files only byte-level BPE (gpt2) is supported: "
            "import the original checkpoint with its tokenizer.json"
        )
    names, types, cut = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"], said.get("tokenizer.ggml.pre")
    special = [name for name, kind in zip(names, types, strict=True) if kind == CONTROL]
    llama3 = cut == "llama-bpe"  # of these llama.cpp takes words whole, and puts BOS first unless the file says no
    vocab, merges = {name: i for i, name in enumerate(names)}, said["tokenizer.ggml.merges"]
    fast = byte_level_bpe(vocab, merges, special, whole_words=llama3)
    added = [name for name, kind in zip(names, types, strict=True) if kind == USER_DEFINED]
    fast.add_tokens([tokenizers.AddedToken(name, normalized=False) for name in added])
    splitting = _splitting(cut or "default")
    if splitting is not None:
        fast.pre_tokenizer = splitting
    known = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad", "mask": "mask"}
    ids = {f"{ours}_token_id": said.get(f"tokenizer.ggml.{theirs}_token_id") for theirs, ours in known.items()}
    roles = roles_of(fast, {}, ids, path)
    if said.get("tokenizer.ggml.add_bos_token", llama3):
        bos = roles["bos"]
        fast.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, fast.token_to_id(bos))]
        )
    return PublishedTokenizer(fast.to_str(), roles)
