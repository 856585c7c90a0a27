"""The training loop: one for every family, objective, mesh and number of hosts."""

import contextlib
import dataclasses
import functools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bothways import rundir, sharding
from bothways.compiler import once_options
from bothways.data import mixture, pipeline
from bothways.data.metrics import Ratio
from bothways.data.tokenizer import Tokenizer
from bothways.embedding import write_embedding
from bothways.errors import Busy, InputError
from bothways.files import write_whole
from bothways.flops import recipe_flops_per_token
from bothways.log import log
from bothways.recipes import Recipe
from bothways.registry import make_module, tiny_inputs
from bothways.train import hosts
from bothways.train.objectives import PREDICT_NO_TOKENS, objective_of
from bothways.train.optimizer import longer, make_optimizer
from bothways.train.start import check_start, load_base, start_from
from bothways.train.step import TrainState, init_state, make_eval_step, make_train_step, state_shardings
from bothways.train.steps import Job, Throughput, run_steps
from bothways.train.trackers import check_tracker


@dataclasses.dataclass(frozen=True)
class Result:
    run: str
    steps: int
    loss: float
    """Held-out, nats per predicted token."""
    bits_per_byte: float | None
    seconds: float
    tokens_per_second: float


def resolve(recipe: Recipe, tokenizer: Tokenizer) -> Recipe:
    """The recipe with all derived sizes filled in, as it is kept with the run."""
    size = recipe.model.vocab_size or len(tokenizer)
    if size < len(tokenizer):
        raise InputError(
            f"model.vocab_size={size} is smaller than the tokenizer's {len(tokenizer)} pieces; "
            "set --model.vocab-size 0 to follow the tokenizer, or a smaller --data.vocab-size"
        )
    model = dataclasses.replace(recipe.model.resolved(), vocab_size=size)
    if recipe.objective.kind in PREDICT_NO_TOKENS:
        model = dataclasses.replace(model, masked_head=False, next_sentence=False)
    return dataclasses.replace(recipe, model=model)


def train(recipe: Recipe, workdir: str | Path, profile: int = 0) -> Result:
    """Train a recipe into a run directory, or resume the run that is there.

    Where weights come from is decided, and logged, under "weights" below.

    Args:
      profile: steps of which a trace is written to RUN/profile, once everything is compiled; see train/profile.py.

    Raises:
      InputError: the recipe cannot run here, or the directory holds another run.
      Stopped: SIGTERM came; everything is saved.
      Diverged: the loss was not finite for train.max_nonfinite_steps steps in a row.
      Busy: another process trains in this directory.
    """
    with contextlib.ExitStack() as held:
        return _train(recipe, workdir, held, profile)


def _train(recipe: Recipe, workdir: str | Path, held: contextlib.ExitStack, profile: int) -> Result:
    home, cfg, writes = rundir.directory(workdir), recipe.train, jax.process_index() == 0
    report = log if writes else lambda _: None
    began = time.monotonic()
    recipe.check(jax.device_count())
    check_tracker(cfg.tracker)
    if profile < 0:
        raise InputError(f"--profile is {profile}; it must be a number of steps, or 0 for no trace")
    if recipe.model.attention == "cudnn" and jax.default_backend() != "gpu":
        raise InputError(f"model.attention=cudnn is for GPUs, and this is a {jax.default_backend()}; set auto")
    existing = rundir.read_recipe(home) if (home / "recipe.json").exists() else None

    if existing is None and cfg.init_from:
        rundir.read_recipe(rundir.directory(cfg.init_from))  # else corpus and vocabulary would be prepared in vain

    # ---- data -------------------------------------------------------------------------------------------------
    with hosts.process_zero_first():
        corpus = mixture.load(recipe.data)
        if existing is not None:
            if not rundir.trained_on(home, corpus.fingerprint, *corpus.earlier):
                raise InputError(
                    f"data.corpus={recipe.data.named} is not the text that {home} was trained on; put that back, "
                    "or train into another directory with --workdir DIR"
                )
            tokenizer = Tokenizer.load(home)
        else:
            report(f"reading {recipe.data.named}, preparing its tokenizer and token rows in {recipe.data.cache}")
            tokenizer = mixture.obtain_tokenizer(recipe.data, corpus)
        text, held_text = (corpus.prepare(s, tokenizer, recipe.data.cache) for s in ("train", "validation"))
    recipe = resolve(recipe, tokenizer)
    hosts.assert_equal_across_hosts(
        {"recipe": recipe.to_json(), "text": corpus.fingerprint, "tokenizer": tokenizer.fingerprint}
    )
    if existing is None and cfg.init_from:
        check_start(recipe, tokenizer)
    if existing is not None and existing.train.steps != cfg.steps:
        if cfg.steps < (done := rundir.newest_step(home)):
            raise InputError(f"train.steps={cfg.steps}, and {home} has made {done} steps already; set that or more")
        report(f"train.steps: {existing.train.steps} -> {cfg.steps}; {longer(recipe.optimizer)}")
    if existing is not None and (changed := existing.differences(recipe)):
        raise InputError(
            f"{home} holds a run of another recipe; its recipe -> yours:\n"
            + "\n".join(f"  - {c}" for c in changed)
            + f"\ntrain into another directory with --workdir DIR; `bothways train {home} --workdir DIR` starts from its weights"
        )
    objective = objective_of(recipe, tokenizer.vocabulary())
    lengths = {recipe.model.context_length, cfg.short_length} - {0}
    with hosts.process_zero_first():  # how pairs are packed into rows is kept too
        each = {n: corpus.each(lambda part, n=n: objective.source(part, n, False), text) for n in lengths}
        held_out = corpus.each(lambda part: objective.source(part, recipe.model.context_length, True), held_text)
    sources = {n: mixture.source_of(of, corpus, lambda step: cfg.batch_at(step)[0]) for n, of in each.items()}

    # ---- model, optimizer, mesh -------------------------------------------------------------------------------
    mesh = sharding.make_mesh(recipe.mesh)
    module = make_module(recipe.family, recipe.model)
    optimizer = make_optimizer(recipe.optimizer, cfg.steps)

    def fresh(seed: Any) -> TrainState:
        return init_state(module, tiny_inputs(recipe.family), optimizer, seed)

    shapes = jax.eval_shape(fresh, 0)
    shardings = state_shardings(mesh, shapes, recipe.mesh.max_replicated_fraction)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes.params))
    whole = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes.frozen))
    if writes:
        held.enter_context(rundir.one_writer(home))
        if existing is None and (home / "recipe.json").exists():
            raise Busy(f"another process has begun a run in {home} meanwhile; run the same command again")
    if writes and existing is None:
        home.mkdir(parents=True, exist_ok=True)
        tokenizer.save_in(home)
        write_whole(home / "corpus.json", json.dumps({"fingerprint": corpus.fingerprint}))
        if objective.embedding:
            write_embedding(home, objective.embedding(recipe))
        if recipe.model.lora.rank:
            rundir.write_base(home, rundir.directory(cfg.init_from))
    if writes and existing != recipe:  # of a run that goes on: what it may change, readers must see
        write_whole(home / "recipe.json", recipe.to_json())

    # ---- weights ----------------------------------------------------------------------------------------------
    # The first of these that there is:
    # 1. the newest whole checkpoint of this run: resume (train/steps.py);
    # 2. another run, named by train.init_from: its body if it was fine-tuned;
    # 3. a published checkpoint, which `bothways import` made a run, named likewise: so 2 and 3 are one line;
    # 4. scratch.
    # Adapters are the run's own, from scratch or resumed; what they are for is 2 or 3, frozen, each time anew.
    def begin() -> TrainState:
        own = shardings.replace(frozen=None)
        made = jax.jit(
            lambda seed: fresh(seed).replace(frozen=None), out_shardings=own, compiler_options=once_options(mesh)
        )
        state = made(cfg.seed)  # not a constant: seeds share their programs
        if not cfg.init_from or recipe.model.lora.rank:
            return state
        place = functools.partial(sharding.parameter_shardings, mesh)
        return state.replace(params=start_from(rundir.directory(cfg.init_from), recipe, state.params, place))

    def batches(step: int) -> Iterator[dict[str, np.ndarray]]:
        row, size = cfg.batch_at(step)
        length = cfg.short_length if step < cfg.short_steps else recipe.model.context_length
        rows, example = sources[length]
        mine = sharding.local_rows(mesh, size)
        return pipeline.training_batches(rows, example, batch_size=size, seed=cfg.seed, position=row, mine=mine)

    def announce(start: int) -> None:
        kept = f" in adapters, {whole:,} frozen" if whole else ""
        report(
            f"{count:,} parameters{kept}, {sum(len(part.ids) for part in text):,} tokens of text, rows of "
            f"{recipe.model.context_length}, "
            f"{jax.device_count()} {jax.devices()[0].device_kind} device(s)"
            + (f", resumed at step {start}" if start else "")
        )
        if note := getattr(sources[recipe.model.context_length][0], "note", ""):
            report(note)
        if isinstance(rows := sources[recipe.model.context_length][0], mixture.MixedRows):
            report(rows.shown(corpus.names, cfg.batch_at(cfg.steps)[0]))

    def frozen() -> Any:
        return load_base(home, shapes.frozen, shardings.frozen) if recipe.model.lora.rank else None

    shares = corpus.shares([len(rows) for rows, _ in each[recipe.model.context_length]], last=True)
    of = dict(zip(corpus.names, held_out, strict=True))
    meter = Throughput(recipe_flops_per_token(recipe))
    job = Job(
        home=home,
        cfg=cfg,
        mesh=mesh,
        shapes=shapes,
        shardings=shardings,
        begin=begin,
        frozen=frozen,
        batches=batches,
        step=make_train_step(
            module,
            objective,
            optimizer,
            mesh,
            shardings,
            accumulate=cfg.grad_accum_steps,
            vmem_kib=recipe.mesh.vmem_kib,
        ),
        evaluate=Evaluator(recipe, objective, module, tokenizer, of, mesh, shardings.weights, shares),
        meter=meter,
        announce=announce,
        profile=profile,
    )
    figures = run_steps(job)
    bpb = figures.get("bits_per_byte")
    made = rundir.newest_step(home)  # fewer than train.steps where train.patience ended it
    return Result(str(home), made, figures["loss"], bpb, time.monotonic() - began, meter.tokens_per_second)


class Evaluator:
    """Held-out loss: parameters -> {"loss", "<term>", "<term>_accuracy", "bits_per_byte"}, and of a mixture each of them
    once more as "loss/NAME" for each corpus, whose mean by their shares the former are.

    Args:
      sources: of each corpus, by name.
      shares: of each, in a whole of 1.
    """

    def __init__(self, recipe, objective, module, tokenizer, sources, mesh, param_shardings, shares=(1.0,)):
        self.recipe, self.sources, self.shares, self.mesh = recipe, sources, shares, mesh
        self.step, self.likelihood = make_eval_step(module, objective, mesh, param_shardings), objective.likelihood
        lengths = tokenizer.byte_lengths()
        self.count_bytes = jax.jit(
            lambda targets, weights: jnp.sum(jnp.where(weights > 0, jnp.asarray(lengths)[targets], 0))
        )

    def __call__(self, params: Any) -> dict[str, float]:
        return mixture.averaged({name: self.held(params, of) for name, of in self.sources.items()}, self.shares)

    def held(self, params: Any, source: mixture.Source) -> dict[str, float]:
        """The figures of one corpus; of train.eval_rows each has an equal part."""
        cfg = self.recipe.train
        batch_size = cfg.batch_size // cfg.grad_accum_steps  # no more at once than training has
        sums: dict[str, np.ndarray] = {}
        bits_per_byte = Ratio()  # of what is a likelihood, or a bound on it, by batch
        mine = sharding.local_rows(self.mesh, batch_size)
        limit = -(-cfg.eval_rows // len(self.sources))
        options = {"batch_size": batch_size, "seed": cfg.seed, "limit": limit, "mine": mine}
        for rows in pipeline.evaluation_batches(*source, **options):
            batch = sharding.to_global(self.mesh, rows)
            for name, term in self.step(params, batch).items():
                sums[name] = sums.get(name, 0) + np.array([float(x) for x in term])
                if name == self.likelihood:
                    size = int(self.count_bytes(batch["targets"], batch.get("scored", batch["weights"])))
                    bits_per_byte.add(np.array([float(term[0]) / math.log(2)]), np.array([size]))
        held = {name: nats / weight for name, (nats, _, weight) in sums.items()}
        held["loss"] = sum(held.values())
        held |= {f"{name}_accuracy": correct / weight for name, (_, correct, weight) in sums.items()}
        if bits_per_byte.below:
            held["bits_per_byte"] = bits_per_byte.value
            if bits_per_byte.n > 1:
                held["bits_per_byte_low"], held["bits_per_byte_high"] = bits_per_byte.interval()
        return {name: float(value) for name, value in held.items()}
