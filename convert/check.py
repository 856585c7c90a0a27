"""Whether imported weights compute what they did where they come from: logits on a fixed text, side by side."""

import dataclasses
import hashlib
import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from bothways.convert.files import REFERENCE, stored_tensors, weight_files
from bothways.convert.heads import suffix_for
from bothways.data.tokenizer import Tokenizer
from bothways.errors import InputError
from bothways.model.seq2seq import Seq2Seq
from bothways.model.task import TaskModel
from bothways.one_by_one import let_go
from bothways.recipes import Recipe
from bothways.rundir import Log, TaskInfo, module_of

TEXT = "Now is the winter of our discontent\nMade glorious summer by this sun of York;"
MOST_TOKENS = 32
MOST_BYTES = 2**32
"""That the weights take in `transformers`, in float32; a larger checkpoint is held against a stored reference only."""
BY_LAYER = 2**28
"""Bytes of parameters from which on they go through the model a layer at a time, so that one layer is in memory in float32."""
TOLERANCE = 1e-4
"""Of the largest logit, or of 1 where that is larger: float32 sums in another order differ by a tenth of this."""


def fixed_tokens(tokenizer: Tokenizer, context: int, task: TaskInfo | None = None) -> np.ndarray:
    """[1, T] the fixed text, as a document of its own; or as an item of the task."""
    tokenizer = tokenizer.framing_as_published() if task and task.wrap == "vocabulary" else tokenizer
    before, _, behind = tokenizer.frame(False)
    room = min(context, MOST_TOKENS) - len(before) - len(behind)
    return np.array([[*before, *tokenizer.encode(TEXT)[:room], *behind]], np.int32)


def our_logits(recipe: Recipe, params: Any, tokens: np.ndarray, task: TaskInfo | None = None) -> np.ndarray:
    """[1, T, V] in float32; of a body without a head its features [1, T, D]; of a task's head its scores."""
    plain = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, dtype="float32", scan_layers=True))
    large = sum(x.nbytes for x in jax.tree.leaves(params)) > BY_LAYER
    with jax.default_matmul_precision("highest"):
        if large:
            found = np.asarray(_logits(module_of(plain, task), _by_layer(params), tokens))
            jax.tree.map(lambda x: let_go(np.asarray(x)), params)
            return found
        return np.asarray(jax.jit(_logits, static_argnums=0)(module_of(plain, task), params, tokens))


class _Layers:
    """A stack's layers, each read when it is its turn and let go behind it."""

    def __init__(self, blocks: Any):
        self.blocks = jax.tree.map(np.asarray, blocks)

    def __iter__(self) -> Iterator[Any]:
        for layer in range(len(jax.tree.leaves(self.blocks)[0])):
            yield jax.tree.map(lambda x: x[layer], self.blocks)  # noqa: B023
            jax.tree.map(let_go, self.blocks)


def _by_layer(params: Any) -> Any:
    """The parameters with `_Layers` instead of stacked ones."""
    return {
        name: _Layers(inner)
        if name == "blocks" and isinstance(inner, Mapping)
        else _by_layer(inner)
        if isinstance(inner, Mapping)
        else jax.tree.map(jnp.asarray, inner)  # the layers of a run that is ready to decode are apart already
        for name, inner in params.items()
    }


def _logits(module: nn.Module, params: Any, tokens: jax.Array) -> jax.Array:
    def run(bound: nn.Module) -> jax.Array:
        if isinstance(bound, TaskModel):
            return bound(tokens, jnp.ones_like(tokens), jnp.zeros_like(tokens))
        features = bound(tokens, **({"source": tokens} if isinstance(bound, Seq2Seq) else {}))
        features = features[0] if isinstance(features, tuple) else features  # a decoder gives its cache too
        return bound.logits(features) if bound.cfg.masked_head else features

    return module.apply({"params": params}, method=run)


def digest(home: Path) -> str:
    """SHA-256 of the weights in a directory: of the file, or of those of its shards."""
    found = []
    for path in weight_files(home):
        with path.open("rb") as f:
            found.append(hashlib.file_digest(f, "sha256").hexdigest())
    return found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()


def save_reference(home: Path, tokens: np.ndarray, logits: np.ndarray) -> None:
    """Logits beside the weights that they are of."""
    save_file({"tokens": tokens, "logits": logits}, home / REFERENCE, {"weights": digest(home)})


def stored_reference(home: Path, log: Log) -> tuple[np.ndarray, np.ndarray] | None:
    """(tokens, logits) that an export left beside the weights; None where they are of other weights than those there."""
    path = home / REFERENCE
    if not path.is_file():
        return None
    with safe_open(path, "np") as f:
        weights = (f.metadata() or {}).get("weights", "")
    if weights and weights != digest(home):
        log(f"the weights beside {REFERENCE} have changed since it was written, so they are not compared with it")
        return None
    found = stored_tensors(path)
    return np.asarray(found["tokens"], np.int32), np.asarray(found["logits"], np.float32)


def published_class(recipe: Recipe, task: TaskInfo | None = None) -> str:
    """The class of `transformers` that opens a run in a published family."""
    if task is not None:
        return f"AutoModelFor{suffix_for(task)}"
    if recipe.family == "seq2seq":
        return "AutoModelForSeq2SeqLM"
    masked = "AutoModelForMaskedLM" if recipe.model.masked_head else "AutoModel"
    return "AutoModelForCausalLM" if recipe.family == "gpt" else masked


def numbers_in(path: Path) -> int:
    """How many numbers the tensors of a directory, or of a GGUF file, hold."""
    if path.suffix == ".gguf":
        import gguf

        return sum(int(tensor.n_elements) for tensor in gguf.GGUFReader(path).tensors)
    return sum(stored.size for file in path.glob("*.safetensors") for stored in stored_tensors(file).values())


def transformers_logits(
    path: Path, recipe: Recipe, tokens: np.ndarray, task: TaskInfo | None = None, own: str = ""
) -> tuple[np.ndarray | None, str]:
    """What `transformers` makes of the same files; None where it is not installed or would need more than MOST_BYTES, and why.

    Args:
      own: file and class of our modelling files to open them with; empty: a class of `transformers`. Code that lies
        beside weights is never run.

    Raises:
      InputError: it cannot open them.
    """
    wanted = ("transformers", "torch", *(("accelerate",) if path.suffix == ".gguf" else ()))
    absent = [name for name in wanted if importlib.util.find_spec(name) is None]
    if absent:
        return None, f"{', '.join(absent)} not installed"
    needs = 4 * numbers_in(path)
    if needs > MOST_BYTES:
        return None, f"transformers would hold {needs:,} bytes in float32, and at most {MOST_BYTES:,} are taken for it"
    import torch
    import transformers

    module, _, kind = own.rpartition(".")
    opens = importlib.import_module(f"bothways.convert.{module}") if own else transformers
    kind = kind or published_class(recipe, task)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    where = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    home = path.parent if where else path
    how = {"local_files_only": True, "dtype": torch.float32}
    how |= {} if own else {"attn_implementation": "eager"}
    try:
        model = getattr(opens, kind).from_pretrained(home, **how, **where).eval()
        with torch.no_grad():
            ids = torch.from_numpy(tokens.astype(np.int64))
            ids = ids[:, None] if kind.endswith("MultipleChoice") else ids
            out = model(ids, **({"decoder_input_ids": ids} if recipe.family == "seq2seq" else {}))
    except Exception as e:  # of many kinds; a version that does not know the model, most likely
        reason = str(e).strip().split("\n")[0][:200]
        raise InputError(
            f"transformers {transformers.__version__} cannot open {path} to compare its logits ({reason}); "
            "upgrade it, or import where it is not installed"
        ) from e
    if hasattr(out, "start_logits"):
        return torch.stack([out.start_logits, out.end_logits], dim=-1).numpy(), ""
    return (out.logits if hasattr(out, "logits") else out.last_hidden_state).numpy(), ""


def against_reference(
    recipe: Recipe,
    params: Any,
    tokenizer: Tokenizer,
    path: Path,
    log: Log,
    task: TaskInfo | None = None,
    may_run: bool = True,
    dtype: str = "float32",
) -> tuple[float | None, str]:
    """`difference` from the stored reference, else from `transformers`; None where there is neither, and why.

    Args:
      dtype: what the parameters were rounded to.
      may_run: `transformers` itself knows the family; False: it would run code from the checkpoint, which is never done.
    """
    stored = stored_reference(path, log) if path.is_dir() else None
    tokens, wanted = stored or (fixed_tokens(tokenizer, recipe.model.context_length, task), None)
    why = "there is no stored reference"
    if wanted is None and may_run:
        wanted, missing = transformers_logits(path, recipe, tokens, task)
        why = f"{why}, and {missing}"
    return (None, why) if wanted is None else (difference(our_logits(recipe, params, tokens, task), wanted, dtype), "")


def difference(got: np.ndarray, wanted: np.ndarray, dtype: str = "float32") -> float:
    """The largest difference of logits. Raises InputError if it is beyond the tolerance."""
    if got.shape != wanted.shape:
        raise InputError(f"the reference has logits of shape {list(wanted.shape)}, and this model {list(got.shape)}")
    largest, allowed = float(np.abs(got - wanted).max()), TOLERANCE * max(1.0, float(np.abs(wanted).max()))
    if not largest <= allowed:
        why = "the weights or config.json are not what they say"
        if dtype != "float32":
            why += f", or lost something where they were rounded to {dtype}; --dtype float32 tells which"
        raise InputError(
            f"the logits differ from the reference by {largest:.3g}, and {allowed:.3g} is allowed: {why}; nothing was written"
        )
    return largest
