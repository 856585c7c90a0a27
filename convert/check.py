"""Whether imported weights compute what they did where they come from: logits on a fixed text, side by side."""

import dataclasses
import functools
import importlib.util
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from bothways.convert.files import REFERENCE, read_tensors
from bothways.data.tokenizer import Tokenizer
from bothways.errors import InputError
from bothways.recipes import Recipe
from bothways.registry import make_module

TEXT = "Now is the winter of our discontent\nMade glorious summer by this sun of York;"
MOST_TOKENS = 32
TOLERANCE = 1e-4
"""Of the largest logit, or of 1 where that is larger: float32 sums in another order differ by a tenth of this."""


def fixed_tokens(tokenizer: Tokenizer, context: int) -> np.ndarray:
    """[1, T] the fixed text, as a document of its own."""
    ids = [tokenizer.bos, *tokenizer.encode(TEXT)[: min(context, MOST_TOKENS) - 2], tokenizer.eos]
    return np.array([ids], np.int32)


def our_logits(recipe: Recipe, params: Any, tokens: np.ndarray) -> np.ndarray:
    """[1, T, V] in float32; of a body without a head its features [1, T, D]."""
    module = make_module(recipe.family, dataclasses.replace(recipe.model, dtype="float32", scan_layers=True))
    with jax.default_matmul_precision("highest"):
        return np.asarray(_logits(module, params, tokens))


@functools.partial(jax.jit, static_argnums=0)
def _logits(module: nn.Module, params: Any, tokens: jax.Array) -> jax.Array:
    def run(bound: nn.Module) -> jax.Array:
        features = bound(tokens)
        features = features[0] if isinstance(features, tuple) else features  # a decoder gives its cache too
        return bound.logits(features) if bound.cfg.masked_head else features

    return module.apply({"params": params}, method=run)


def stored_reference(home: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """(tokens, logits) that an export left beside the weights."""
    path = home / REFERENCE
    if not path.is_file():
        return None
    found = read_tensors(path)
    return found["tokens"].astype(np.int32), found["logits"]


def transformers_logits(path: Path, recipe: Recipe, tokens: np.ndarray) -> np.ndarray | None:
    """What `transformers` makes of the same files; None where it is not installed.

    Raises:
      InputError: it cannot open them.
    """
    wanted = ("transformers", "torch", *(("accelerate",) if path.suffix == ".gguf" else ()))
    if any(importlib.util.find_spec(name) is None for name in wanted):
        return None
    import torch
    import transformers

    masked = "AutoModelForMaskedLM" if recipe.model.masked_head else "AutoModel"
    kind = "AutoModelForCausalLM" if recipe.family == "gpt" else masked
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    where = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    home = path.parent if where else path
    how = {"attn_implementation": "eager", "local_files_only": True, "dtype": torch.float32}
    try:
        model = getattr(transformers, kind).from_pretrained(home, **how, **where).eval()
        with torch.no_grad():
            out = model(torch.from_numpy(tokens.astype(np.int64)))
    except Exception as e:  # of many kinds; a version that does not know the model, most likely
        reason = str(e).strip().split("\n")[0][:200]
        raise InputError(
            f"transformers {transformers.__version__} cannot open {path} to compare its logits ({reason}); "
            "upgrade it, or import where it is not installed"
        ) from e
    return (out.logits if hasattr(out, "logits") else out.last_hidden_state).numpy()


def against_reference(recipe: Recipe, params: Any, tokenizer: Tokenizer, path: Path) -> float | None:
    """`difference` from the stored reference, else from `transformers`; None where there is neither."""
    stored = stored_reference(path) if path.is_dir() else None
    tokens, wanted = stored or (fixed_tokens(tokenizer, recipe.model.context_length), None)
    if wanted is None:
        wanted = transformers_logits(path, recipe, tokens)
    return None if wanted is None else difference(our_logits(recipe, params, tokens), wanted)


def difference(got: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference of logits. Raises InputError if it is beyond the tolerance."""
    if got.shape != wanted.shape:
        raise InputError(f"the reference has logits of shape {list(wanted.shape)}, and this model {list(got.shape)}")
    largest, allowed = float(np.abs(got - wanted).max()), TOLERANCE * max(1.0, float(np.abs(wanted).max()))
    if not largest <= allowed:
        raise InputError(
            f"the logits differ from the reference by {largest:.3g}, and {allowed:.3g} is allowed: "
            "the weights or config.json are not what they say; nothing was written"
        )
    return largest
