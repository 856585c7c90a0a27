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

from bothways import rundir
from bothways.config import OptimizerConfig, TrainConfig
from bothways.convert import check, files, own, sentence
from bothways.convert.card import held_out, model_card
from bothways.convert.fitting import ORIGIN, coming, going, origin_of
from bothways.convert.stored import DTYPES, room_for, save_tensors
from bothways.convert.vocabulary import save_vocabulary
from bothways.data.published import PublishedTokenizer
from bothways.data.tokenizer import Tokenizer, vocabulary_file
from bothways.data.tokens import umask
from bothways.embedding import EmbeddingInfo, read_embedding, write_embedding
from bothways.errors import InputError
from bothways.one_by_one import one_by_one, saved

Log = Callable[[str], None]
GENERATION = "generation_config.json"
"""How a model likes to be sampled, by the names of `transformers`; kept in the run, and given back."""
SPARE_ROWS, SPARE_SHARE = 1024, 0.05
"""Tables are made larger than a vocabulary to divide well, or to have room, but not by more than one of these: rows, and a
share of all rows. None of them is ever drawn."""


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


def import_run(source: str, home: Path, corpus: str, log: Log, dtype: str = "float32") -> Converted:
    """Read a published checkpoint into a new run directory. One tensor is held at a time beside the parameters, and those of
    a large checkpoint lie on the disk until they are saved.

    Args:
      source: a Hugging Face directory, a .gguf file, or a name on the hub.
      corpus: what the run's recipe names as its text, for `evaluate` and `train`.
      dtype: what matrices and tables are kept as, float32 or bfloat16.

    Raises:
      InputError: the checkpoint is none that we compute, is damaged, does not fit together, or its logits differ from
        the reference's; or there is something at `home`. Nothing is written then.
    """
    with whole_directory(home) as partial, room_for(partial, DTYPES[dtype]) as allocate:
        found = files.read(source)
        fit = coming(found, home.name)
        tokenizer = _fitting(found.tokenizer, fit.recipe.model.vocab_size, source, log)
        tokenizer.save_in(partial)
        if (found.path / GENERATION).is_file():
            shutil.copyfile(found.path / GENERATION, partial / GENERATION)
        if found.embedding is not None:
            write_embedding(partial, found.embedding)
        recipe = dataclasses.replace(
            fit.recipe,
            name=home.name,
            data=dataclasses.replace(
                fit.recipe.data, corpus=corpus, tokenizer=str(home.absolute() / vocabulary_file(partial).name)
            ),
            optimizer=OptimizerConfig(
                learning_rate=5e-5, schedule="linear", warmup_steps=100, b2=0.999, weight_decay=0.01
            ),
            train=TrainConfig(),
        )
        params, ours = fit.params(allocate), fit.name == own.NAME
        known = not ours and recipe.objective.kind != "diffusion"  # to transformers
        difference, why = check.against_reference(recipe, params, tokenizer, found.path, log, fit.task, known, dtype)
        save_params(partial, params)
        (partial / ORIGIN).write_text(json.dumps({"family": fit.name, "dtype": dtype}))
        if fit.task is not None:
            rundir.write_task(partial, fit.task)
        (partial / "recipe.json").write_text(recipe.to_json())
    if difference is None:
        log(f"logits were not checked: {why}")
    return Converted(str(home), fit.name, sum(t.size for t in fit.tensors.values()), difference)


def save_params(home: Path, params) -> None:
    """The parameters as checkpoint 0 of a run."""
    with one_by_one(), rundir.checkpoint_manager(home, keep=1) as manager:
        items = {"params": saved(jax.tree.map(np.asarray, params)), "meta": ocp.args.JsonSave({"step": 0})}
        manager.save(0, args=ocp.args.Composite(**items))
        manager.wait_until_finished()


def _fitting(tokenizer: Tokenizer, rows: int, source: str, log: Log) -> Tokenizer:
    """The vocabulary as a table of so many rows has it: without tokens that were added and got no row."""
    if isinstance(tokenizer, PublishedTokenizer) and len(tokenizer) > rows:
        tokenizer, gone = tokenizer.fitting(rows)
        if gone:
            log(f"left out of the vocabulary, since the model has no vector for them: {', '.join(gone)}")
    if not len(tokenizer) <= rows <= len(tokenizer) + max(SPARE_ROWS, int(SPARE_SHARE * rows)):
        raise InputError(
            f"the vocabulary of {source} has {len(tokenizer)} tokens, and its config.json says vocab_size={rows}; "
            "they are not of one model"
        )
    return tokenizer


def export_run(
    home: Path, destination: Path, log: Log, license_: str = "", embeds: str = "", dtype: str = ""
) -> Converted:
    """Write a run as a Hugging Face directory: config.json, safetensors, tokenizer, reference logits; and modelling files of
    ours where no published family computes what it does. Or as a .gguf file, which llama.cpp opens.

    Args:
      license_: what the card states, by the hub's identifiers; empty: none.
      embeds: mean, cls or last: the directory opens in sentence-transformers too, whose vectors are these. Empty: it does
        where the run says how it embeds.
      dtype: of matrices and tables: float32, bfloat16; of a .gguf file also float16, q8_0. Empty: as the run keeps them.

    Raises:
      InputError: no run, or there is something at the destination. Nothing is written then.
    """
    dtype = dtype or origin_of(home).get("dtype", "float32")
    if destination.suffix == ".gguf":
        if license_:
            raise InputError("--license stands on a model's card, and a .gguf file comes with none; leave it out")
        from bothways.convert.to_gguf import export_gguf

        return Converted(*export_gguf(home, destination, log, embeds, dtype))
    if dtype not in DTYPES:
        raise InputError(f"a directory holds {' or '.join(DTYPES)}, not {dtype}; give a destination that ends in .gguf")
    with whole_directory(destination) as partial, room_for(partial, DTYPES[dtype]) as allocate:
        run = rundir.load_run(home, log, dtype="" if dtype == "float32" else dtype, into=allocate)
        out, task = going(run, jax.device_get(run.params), log), run.task
        if embeds and task is not None:
            raise InputError(f"--embeds is of a body's vectors, and {home} is fine-tuned for {task.name}; leave it out")
        recipe = out.recipe
        if out.family is None:
            own.save_modelling_files(partial, task)
        (partial / "config.json").write_text(json.dumps(out.config | {"dtype": dtype}, indent=2, sort_keys=True) + "\n")
        save_tensors(partial, out.tensors, DTYPES[dtype])
        save_vocabulary(run.tokenizer, partial, recipe.family, task)
        if (home / GENERATION).exists():
            (partial / GENERATION).write_bytes((home / GENERATION).read_bytes())
        embedding = EmbeddingInfo(embeds) if embeds else read_embedding(home)
        if embedding is not None and task is None:
            sentence.write(partial, embedding, recipe.model.d_model)
        card = model_card(recipe, task, out.opened_by(task), out.family is None, held_out(home), license_)
        (partial / "README.md").write_text(card)
        tokens = check.fixed_tokens(run.tokenizer, recipe.model.context_length, task)
        logits = check.our_logits(recipe, out.params, tokens, task)
        computes = "" if out.family else own.modelling_class(recipe, task)
        wanted, why = None, "it has no class of this family"
        if out.family is None or not out.family.objective:
            wanted, why = check.transformers_logits(partial, recipe, tokens, task, computes)
        difference = None if wanted is None else check.difference(logits, wanted)
        check.save_reference(partial, tokens, logits)
    if difference is None:
        log(f"that transformers reads the same logits was not checked: {why}")
    return Converted(str(destination), out.name, sum(t.size for t in out.tensors.values()), difference)
