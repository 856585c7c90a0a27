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
from bothways.convert import check, files, own
from bothways.convert.card import held_out, model_card
from bothways.convert.families import family_for, family_of
from bothways.convert.family import Family
from bothways.convert.layout import shapes_of
from bothways.convert.vocabulary import save_vocabulary
from bothways.data.published import PublishedTokenizer
from bothways.data.tokenizer import Tokenizer
from bothways.data.tokens import umask
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
        partial.chmod(0o777 & ~umask())  # mkdtemp makes it for one user only
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
        if found.config.get("model_type") == own.NAME:
            name, (begun, task) = own.NAME, own.recipe_of(found.config)
            shapes = shapes_of(rundir.param_shapes(begun, task))
            layout, tensors = own.layout_of(shapes), found.tensors
            absent = own.absent(begun, task, layout, shapes)
        else:
            family, task = family_of(found.config), None
            tensors = family.canonical_names(found.tensors, family.tied(found.config))
            model = family.config(found.config, tensors)
            model = dataclasses.replace(model, scan_layers=model.n_layers > 12)  # deep ones would compile for minutes
            objective = ObjectiveConfig("masked" if family.ours == "bert" else "causal")
            begun = Recipe(family=family.ours, model=model, objective=objective)
            name, layout, shapes = family.name, family.layout, shapes_of(rundir.param_shapes(begun))
            absent = family.absent(model)
        tokenizer = _fitting(found.tokenizer, begun.model.vocab_size, source, log)
        tokenizer.save_in(partial)
        if (found.path / GENERATION).is_file():
            shutil.copyfile(found.path / GENERATION, partial / GENERATION)
        vocabulary = next(p.name for p in partial.iterdir() if p.name in ("tokenizer.json", "tokenizer.model"))
        recipe = dataclasses.replace(
            begun,
            name=home.name,
            data=dataclasses.replace(begun.data, corpus=corpus, tokenizer=str(home.absolute() / vocabulary)),
            optimizer=OptimizerConfig(
                learning_rate=5e-5, schedule="linear", warmup_steps=100, b2=0.999, weight_decay=0.01
            ),
            train=TrainConfig(),
        )
        params = layout.from_checkpoint(tensors, shapes, absent)
        difference = check.against_reference(recipe, params, tokenizer, found.path, log, task, name != own.NAME)
        save_params(partial, params)
        (partial / ORIGIN).write_text(json.dumps({"family": name}))
        if task is not None:
            rundir.write_task(partial, task)
        (partial / "recipe.json").write_text(recipe.to_json())
    if difference is None:
        log(
            "logits were not checked: there is no stored reference, and transformers and torch are not installed "
            "(nor accelerate, which transformers wants for GGUF)"
        )
    return Converted(str(home), name, sum(t.size for t in tensors.values()), difference)


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


def export_run(home: Path, destination: Path, log: Log, license_: str = "") -> Converted:
    """Write a run as a Hugging Face directory: config.json, model.safetensors, tokenizer, reference logits; and modelling
    files of ours where it is fine-tuned, or no published family computes what it does.

    Args:
      license_: what the card states, by the hub's identifiers; empty: none.

    Raises:
      InputError: no run, or there is something at the destination. Nothing is written then.
    """
    with whole_directory(destination) as partial:
        run = rundir.load_run(home, log)
        recipe = dataclasses.replace(run.recipe, model=run.recipe.model.resolved())
        params, roles = jax.device_get(run.params), run.tokenizer.role_ids()
        family = _published(run, home, log)
        if family is None:
            shapes = shapes_of(params)
            layout = own.layout_of(shapes)
            config = own.config_json(recipe, run.task, roles)
            absent = own.absent(recipe, run.task, layout, shapes)
            own.save_modelling_files(partial, run.task)
        else:
            layout, absent = family.layout, family.absent(recipe.model)
            config = {f"{role}_token_id": token for role, token in roles.items()} | family.config_json(recipe.model)
        tensors = layout.to_checkpoint(params, absent)
        (partial / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        save_file(tensors, partial / files.WEIGHTS, {"format": "pt"})
        save_vocabulary(run.tokenizer, partial, recipe.family)
        if (home / GENERATION).exists():
            (partial / GENERATION).write_bytes((home / GENERATION).read_bytes())
        opens = check.published_class(recipe) if family else own.AUTO[own.architectures(recipe, run.task)[0]]
        card = model_card(recipe, run.task, opens, family is None, held_out(home), license_)
        (partial / "README.md").write_text(card)
        tokens = check.fixed_tokens(run.tokenizer, recipe.model.context_length)
        logits = check.our_logits(recipe, params, tokens, run.task)
        computes = "" if family else own.modelling_class(recipe, run.task)
        wanted = check.transformers_logits(partial, recipe, tokens, computes)
        difference = None if wanted is None else check.difference(logits, wanted)
        check.save_reference(partial, tokens, logits)
    if difference is None:
        log("transformers and torch are not installed: that they read the same logits was not checked")
    name = own.NAME if family is None else family.name
    return Converted(str(destination), name, sum(t.size for t in tensors.values()), difference)


def _published(run: rundir.Run, home: Path, log: Log) -> Family | None:
    """The published family that a run leaves as; None where it leaves as one of its own."""
    recipe, origin = run.recipe, home / ORIGIN
    if run.task is not None or recipe.objective.kind not in ("causal", "chat", "masked"):
        return None
    preferred = json.loads(origin.read_text())["family"] if origin.exists() else ""
    try:
        return family_for(recipe.model.resolved(), recipe.family, run.tokenizer.pad, preferred)
    except InputError as e:
        log(f"{e}\nit leaves with a modelling file of its own: open it with trust_remote_code=True")
        return None
