"""Import: a published checkpoint becomes a run directory. Export: a run becomes one that `transformers` opens."""

import contextlib
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from safetensors.numpy import save_file

from bothways import rundir
from bothways.config import ObjectiveConfig, OptimizerConfig, TrainConfig
from bothways.convert import check, files
from bothways.convert.families import family_for, family_of
from bothways.convert.layout import shapes_of
from bothways.convert.vocabulary import save_vocabulary
from bothways.data.config import DataConfig
from bothways.data.published import PublishedTokenizer
from bothways.data.tokenizer import Tokenizer
from bothways.errors import InputError
from bothways.recipes import Recipe

Log = Callable[[str], None]
GENERATION = "generation_config.json"
"""How a model likes to be sampled, by the names of `transformers`; kept in the run, and given back."""
ORIGIN = "imported.json"
"""The family that a run was imported from, since several may compute the same: it goes out as what it came."""
SPARE_ROWS = 1024
"""Tables are made larger than a vocabulary to divide well, but not by more than this."""


@dataclasses.dataclass(frozen=True)
class Converted:
    run: str
    """The directory that was written."""
    family: str
    parameters: int
    max_difference: float | None
    """Of logits on a fixed text from those of the other side; None where there was nothing to compare with."""


@contextlib.contextmanager
def whole_directory(home: Path) -> Iterator[Path]:
    """A directory to write into, which becomes `home` at the end: all of it or nothing.

    Raises:
      InputError: there is something at `home` already.
    """
    if home.exists() and (not home.is_dir() or any(home.iterdir())):
        raise InputError(f"{home} exists already; give another directory, or delete this one")
    home.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{home.name}-", dir=home.parent))
    try:
        yield partial
        partial.chmod(0o755)
        partial.replace(home)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def import_run(source: str, home: Path, corpus: str, log: Log) -> Converted:
    """Read a published checkpoint into a new run directory.

    Args:
      source: a Hugging Face directory, a .gguf file, or a name on the hub.
      corpus: what the run's recipe names as its text, for `evaluate` and `train`.

    Raises:
      InputError: the checkpoint is none that we compute, is damaged, does not fit together, or its logits differ from
        the reference's; or there is something at `home`. Nothing is written then.
    """
    with whole_directory(home) as partial:
        found = files.read(source)
        family = family_of(found.config)
        tensors = family.canonical_names(found.tensors, family.tied(found.config))
        model = family.config(found.config, tensors)
        model = dataclasses.replace(model, scan_layers=model.n_layers > 12)  # deep ones would compile for minutes
        tokenizer = _fitting(found.tokenizer, model.vocab_size, source, log)
        tokenizer.save_in(partial)
        if (found.path / GENERATION).is_file():
            shutil.copyfile(found.path / GENERATION, partial / GENERATION)
        vocabulary = next(p.name for p in partial.iterdir() if p.name in ("tokenizer.json", "tokenizer.model"))
        recipe = Recipe(
            name=home.name,
            family=family.ours,
            model=model,
            data=DataConfig(corpus=corpus, tokenizer=str(home.absolute() / vocabulary)),
            objective=ObjectiveConfig("masked" if family.ours == "bert" else "causal"),
            optimizer=OptimizerConfig(
                learning_rate=5e-5, schedule="linear", warmup_steps=100, b2=0.999, weight_decay=0.01
            ),
            train=TrainConfig(),
        )
        params = family.layout.from_checkpoint(tensors, shapes_of(rundir.param_shapes(recipe)), family.absent(model))
        difference = check.against_reference(recipe, params, tokenizer, found.path)
        save_params(partial, params)
        (partial / ORIGIN).write_text(json.dumps({"family": family.name}))
        (partial / "recipe.json").write_text(recipe.to_json())
    if difference is None:
        log(
            "logits were not checked: there is no stored reference, and transformers and torch are not installed "
            "(nor accelerate, which transformers wants for GGUF)"
        )
    return Converted(str(home), family.name, sum(t.size for t in tensors.values()), difference)


def save_params(home: Path, params) -> None:
    """The parameters as checkpoint 0 of a run."""
    with rundir.checkpoint_manager(home, keep=1) as manager:
        items = {
            "params": ocp.args.StandardSave(jax.tree.map(np.asarray, params)),
            "meta": ocp.args.JsonSave({"step": 0}),
        }
        manager.save(0, args=ocp.args.Composite(**items))
        manager.wait_until_finished()


def _fitting(tokenizer: Tokenizer, rows: int, source: str, log: Log) -> Tokenizer:
    """The vocabulary as a table of so many rows has it: without tokens that were added and got no row."""
    if isinstance(tokenizer, PublishedTokenizer) and len(tokenizer) > rows:
        tokenizer, gone = tokenizer.fitting(rows)
        if gone:
            log(f"left out of the vocabulary, since the model has no vector for them: {', '.join(gone)}")
    if not len(tokenizer) <= rows <= len(tokenizer) + SPARE_ROWS:
        raise InputError(
            f"the vocabulary of {source} has {len(tokenizer)} tokens, and its config.json says vocab_size={rows}; "
            "they are not of one model"
        )
    return tokenizer


def export_run(home: Path, destination: Path, log: Log) -> Converted:
    """Write a run as a Hugging Face directory: config.json, model.safetensors, tokenizer, reference logits.

    Raises:
      InputError: no run, a fine-tuned one, one that no published family computes; or there is something at the
        destination. Nothing is written then.
    """
    with whole_directory(destination) as partial:
        run = rundir.load_run(home, log)
        if run.task is not None:
            raise InputError(f"{home} is fine-tuned for {run.task.name}; export the run it came from")
        model, tokenizer = run.recipe.model.resolved(), run.tokenizer
        origin = home / ORIGIN
        preferred = json.loads(origin.read_text())["family"] if origin.exists() else ""
        family = family_for(model, run.recipe.family, tokenizer.pad, preferred)
        params = jax.device_get(run.params)
        tensors = family.layout.to_checkpoint(params, family.absent(model))
        ids = {f"{role}_token_id": token for role, token in tokenizer.role_ids().items()}
        config = ids | family.config_json(model)
        (partial / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        save_file(tensors, partial / "model.safetensors", {"format": "pt"})
        save_vocabulary(tokenizer, partial, run.recipe.family)
        if (home / GENERATION).exists():
            (partial / GENERATION).write_bytes((home / GENERATION).read_bytes())
        tokens = check.fixed_tokens(tokenizer, model.context_length)
        logits = check.our_logits(run.recipe, params, tokens)
        wanted = check.transformers_logits(partial, run.recipe, tokens)
        difference = None if wanted is None else check.difference(logits, wanted)
        save_file({"tokens": tokens, "logits": logits}, partial / files.REFERENCE)
    if difference is None:
        log("transformers and torch are not installed: that they read the same logits was not checked")
    return Converted(str(destination), family.name, sum(t.size for t in tensors.values()), difference)
