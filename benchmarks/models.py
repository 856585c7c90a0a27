"""The same random weights for every side: a run of ours, a directory that `transformers` opens, a ctranslate2 model."""

import contextlib
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tokenizers

from benchmarks.harness import Setting, threads
from bothways.config import ObjectiveConfig, OptimizerConfig
from bothways.convert.run import export_run, save_params
from bothways.data.config import DataConfig
from bothways.data.published import PublishedTokenizer
from bothways.data.tokenizer import Tokenizer
from bothways.model.config import TransformerConfig
from bothways.recipes import Recipe
from bothways.registry import make_module, tiny_inputs

END_OF_TEXT = "<|endoftext|>"
BERT_ROLES = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
RUNNING_TEXT = DataConfig(separate_documents=False)
ADAMW = OptimizerConfig(learning_rate=1e-4, schedule="constant", b2=0.95, weight_decay=0.1, clip_norm=1.0)


def gpt(layers: int, width: int, heads: int, vocabulary: int, context: int) -> Recipe:
    """A GPT-2 without dropout, as it is pre-trained today."""
    sizes = {"n_layers": layers, "d_model": width, "n_heads": heads, "vocab_size": vocabulary, "context_length": context}
    return Recipe("gpt", "gpt", TransformerConfig(**sizes).resolved(), RUNNING_TEXT, optimizer=ADAMW)


def bert(layers: int, width: int, heads: int, vocabulary: int, context: int) -> Recipe:
    """A BERT with its masked-token head, and dropout 0.1 everywhere, as in arXiv 1810.04805."""
    sizes = {"n_layers": layers, "d_model": width, "n_heads": heads, "vocab_size": vocabulary, "context_length": context}
    drop = dict.fromkeys(("dropout_embed", "dropout_attention", "dropout_residual"), 0.1)
    like = {"norm_position": "post", "norm_eps": 1e-12, "activation": "gelu", "segment_types": 2, "embed_norm": True}
    model = TransformerConfig(**sizes, **drop, **like, init_residual="same").resolved()
    return Recipe("bert", "bert", model, DataConfig(), ObjectiveConfig("masked"), ADAMW)


def llama(layers: int, width: int, heads: tuple[int, int], inner: int, vocabulary: int, context: int) -> Recipe:
    """A Llama; heads are those of queries, and of keys and values."""
    sizes = {"n_layers": layers, "d_model": width, "n_heads": heads[0], "n_kv_heads": heads[1], "d_ff": inner}
    like = {"position_embedding": "rotary", "rotary_base": 1e5, "norm": "rms", "norm_eps": 1e-5, "activation": "swiglu"}
    like |= {"bias": False, "vocab_size": vocabulary, "context_length": context, "scan_layers": layers > 12}
    return Recipe("llama", "gpt", TransformerConfig(**sizes, **like).resolved(), RUNNING_TEXT, optimizer=ADAMW)


FULL = {
    "smollm2": llama(30, 576, (9, 3), 1536, 49_152, 2048),
    "gpt-small": gpt(6, 384, 6, 8192, 256),
    "gpt-small-2048": gpt(6, 384, 6, 8192, 2048),
    "gpt-small-8192": gpt(6, 384, 6, 8192, 8192),
    "gpt2": gpt(12, 768, 12, 50_257, 1024),
    "bert-base": bert(12, 768, 12, 30_522, 512),
    "minilm": bert(6, 384, 12, 30_522, 512),
}
TINY = {
    "smollm2": llama(2, 32, (4, 2), 48, 300, 64),
    "gpt-small": gpt(2, 32, 2, 300, 64),
    "gpt2": gpt(2, 32, 2, 300, 64),
    "bert-base": bert(2, 32, 2, 300, 64),
}
TINY["minilm"] = TINY["bert-base"]
TINY["gpt-small-2048"] = TINY["gpt-small-8192"] = TINY["gpt-small"]


def in_bfloat16(models: dict[str, Recipe], *names: str) -> dict[str, Recipe]:
    """The same models with products of bfloat16."""
    typed = {name: dataclasses.replace(models[name].model, dtype="bfloat16") for name in names}
    return {f"{name}-bfloat16": dataclasses.replace(models[name], model=model) for name, model in typed.items()}


for sizes in (FULL, TINY):
    sizes |= in_bfloat16(sizes, "smollm2", "minilm", "gpt-small", "gpt2", "bert-base")


def model_of(setting: Setting, name: str) -> tuple[Recipe, Path]:
    """A recipe of FULL or TINY, and a run of it with random weights."""
    recipe = (TINY if setting.tiny else FULL)[name]
    return recipe, make_run(recipe, setting.home / name)


def made_up_tokenizer(family: str, size: int) -> Tokenizer:
    """A vocabulary of so many tokens that nobody trained: byte pairs for a GPT, short words for a BERT."""
    if family == "gpt":
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        merges = list(itertools.islice(itertools.product(alphabet, alphabet), size - len(alphabet) - 1))
        pieces = [END_OF_TEXT, *alphabet, *(a + b for a, b in merges)]
        fast = tokenizers.Tokenizer(tokenizers.models.BPE({p: i for i, p in enumerate(pieces)}, merges))
        fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        fast.decoder, roles = tokenizers.decoders.ByteLevel(), dict.fromkeys(("bos", "eos", "pad", "unk"), END_OF_TEXT)
    else:
        letters = [chr(ord("a") + i) for i in range(26)]
        words = ["".join(w) for n in (1, 2, 3) for w in itertools.product(letters, repeat=n)]
        pieces = [*BERT_ROLES.values(), *words, *("##" + w for w in words)][:size]
        fast = tokenizers.Tokenizer(tokenizers.models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
        fast.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        fast.decoder, roles = tokenizers.decoders.WordPiece(), BERT_ROLES
    fast.add_special_tokens([tokenizers.AddedToken(t, special=True) for t in dict.fromkeys(roles.values())])
    return PublishedTokenizer(fast.to_str(), roles)


def make_run(recipe: Recipe, home: Path) -> Path:
    """A run directory with random weights; what is there already is left."""
    if not (home / "recipe.json").exists():
        home.mkdir(parents=True, exist_ok=True)
        made_up_tokenizer(recipe.family, recipe.model.vocab_size).save_in(home)
        module = make_module(recipe.family, recipe.model)
        params = jax.jit(lambda: module.init(jax.random.key(0), **tiny_inputs(recipe.family))["params"])()
        save_params(home, params)
        (home / "recipe.json").write_text(recipe.to_json())
    return home


def published(run: Path) -> Path:
    """The run as `transformers` opens it. `export_run` compares their logits with ours, and fails where they differ."""
    home = run.with_name(run.name + "-published")
    if not home.exists():
        done = export_run(run, home, lambda _: None)
        assert done.max_difference is not None, "transformers and torch are not installed"
    return home


def torch_model(run: Path, kind: str, dtype: str = "float32") -> Any:
    """The published run as a PyTorch module, with `transformers`' own choice of attention."""
    import torch
    import transformers

    torch.set_num_threads(threads())
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return getattr(transformers, kind).from_pretrained(published(run), dtype=getattr(torch, dtype))


def ctranslate_model(run: Path) -> Any:
    """The published run as a ctranslate2 generator, float32."""
    import ctranslate2

    home = run.with_name(run.name + "-ctranslate2")
    if not home.exists():
        with contextlib.redirect_stdout(None):
            ctranslate2.converters.TransformersConverter(str(published(run))).convert(str(home))
    return ctranslate2.Generator(str(home), device="cpu", compute_type="float32", intra_threads=threads())


def random_tokens(recipe: Recipe, rows: int, length: int, seed: int = 0) -> np.ndarray:
    """[rows, length] ids that stand for text."""
    return np.random.default_rng(seed).integers(5, recipe.model.vocab_size, (rows, length)).astype(np.int32)
