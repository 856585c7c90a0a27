"""Checkpoints as `transformers` writes them, tiny and random, with vocabularies learnt from a made-up language."""

import json
from pathlib import Path

import numpy as np
import tokenizers
from safetensors.numpy import load_file, save_file

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
