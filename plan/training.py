"""The train step: compiled for a target topology, and the layouts in which it fits and is fastest."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from bothways import sharding
from bothways.chips import GIB, Topology, usual_shape
from bothways.compiler import other_vmem
from bothways.config import MeshConfig
from bothways.data.contrasts import Sets
from bothways.data.rng import ExampleRng
from bothways.data.tokenizer import made_up_vocabulary
from bothways.data.tokens import Tokens
from bothways.errors import InputError
from bothways.flops import executed_flops, recipe_flops_per_token, tokens_per_row
from bothways.model.config import TransformerConfig
from bothways.plan import hlo
from bothways.plan.candidates import candidates, flags
from bothways.plan.own_kernels import LANES, NARROW_SHARE, Kernel, device_flops, named, traced_kernels
from bothways.plan.profile import Operation, by_part, operations
from bothways.plan.roofline import (
    between_slices,
    bytes_per_device,
    compile_quietly,
    endless_loops,
    summed_collectives,
    text_of,
)
from bothways.recipes import Recipe
from bothways.registry import make_module, tiny_inputs
from bothways.train.objectives import objective_of
from bothways.train.optimizer import make_optimizer
from bothways.train.step import TrainState, init_state, make_train_step, state_shardings

DAY = 86_400.0
LARGEST = 12
"""Operations that a plan lists."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes, FLOPs and seconds are of one training step with the full batch at the full context."""

    recipe: str
    topology: str
    slices: int
    mesh: dict[str, int]
    chips: int
    flags: str
    """What to add to `bothways train RECIPE` to get what was compiled."""
    parameters: int
    tokens_per_step: int
    fits: bool
    memory_per_chip: float
    memory_limit: float
    memory: dict[str, float]
    """What memory_per_chip is made of."""
    flops_per_step: float
    """The model's, forward and backward (arXiv 2204.02311, appendix B)."""
    executed_flops: float
    """With what is recomputed, and with scores that the mask hides."""
    compute_seconds: float
    memory_seconds: float | None
    network_seconds: float | None
    bound_by: str
    step_seconds: float
    """The longest of the three: all that overlaps perfectly."""
    mfu_bound: float
    """The highest model FLOP utilisation to expect: flops_per_step / (step_seconds * peak of all chips)."""
    scheduled_seconds: float | None
    """The compiler's own estimate of the computation, without waiting for the network; None where it gives none. Kernels
    of one's own (attention), which it does not count, as plan/own_kernels.py does."""
    mfu_expected: float | None
    """As mfu_bound, with the longest of scheduled_seconds and the three."""
    tokens_per_second: float
    days: float
    """To the recipe's end, at step_seconds; shorter rows and smaller batches count by their FLOPs."""
    collectives: tuple[dict[str, Any], ...]
    parts: dict[str, float]
    """Clock cycles of each part of the model, the dearest first; together those of scheduled_seconds. Empty where the
    compiler gives none."""
    operations: tuple[dict[str, Any], ...]
    """The largest, as plan.profile.Operation."""
    compile_seconds: float
    notes: tuple[str, ...]


def plan(recipe: Recipe, topology: Topology, before: Recipe | None = None) -> Plan:
    """Compile a recipe's train step for a topology with the recipe's own mesh.

    Args:
      before: the recipe as a person named it, for `Plan.flags`.

    Raises:
      InputError: the recipe cannot run on so many chips, the mesh cannot hold it, or libtpu is missing.
    """
    recipe = with_vocabulary(recipe)
    recipe.check(topology.devices_count)
    mesh = sharding.make_mesh(recipe.mesh, topology.devices())
    step, state, batch, placed = abstract_step(recipe, mesh)
    began = time.monotonic()
    traced = step.trace(state, batch, 0)
    (executed, in_kernels), known = executed_flops(traced.jaxpr.jaxpr), traced_kernels(traced.jaxpr.jaxpr)
    kernels = as_if = in_kernels / mesh.size
    parts = {
        "parameters": bytes_per_device(state.weights, placed.weights),
        "optimizer": bytes_per_device(state.opt_state, placed.opt_state),
    }
    compiled, used, notes = compile_quietly(traced.lower())
    text, messages = text_of(compiled) if compiled else ("", [])
    traffic, found = hlo.read(text, mesh.size) if text else None, []
    if traffic is not None:
        messages += endless_loops(traffic)
        kernels, as_if = device_flops(traffic.kernels, known)
        found = operations(text, 1, lambda scope: _cycles(named(scope, known), topology))
    notes += messages
    if compiled:
        stats = compiled.memory_analysis()
        parts["batch"] = max(0.0, stats.argument_size_in_bytes - sum(parts.values()))
        parts["activations, gradients and temporaries"] = float(stats.temp_size_in_bytes)
        parts["program"] = float(stats.generated_code_size_in_bytes)
        used = sum(parts.values())
    elif used:
        parts["activations, gradients and temporaries"] = max(0.0, used - sum(parts.values()))
    each = topology.chip.devices
    parts = {name: each * size for name, size in parts.items()}
    used *= each
    if used > topology.chip.memory and compiled:
        notes.append("it compiled, but with more memory than a chip has")
    return _roofline(
        recipe,
        topology,
        mesh,
        flags=flags(with_vocabulary(before or recipe), recipe),
        notes=notes,
        memory=parts,
        memory_per_chip=used,
        fits=compiled is not None and used <= topology.chip.memory,
        executed=executed - in_kernels + kernels * mesh.size,
        kernels=(kernels, as_if),
        traffic=traffic,
        operations=found,
        parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.weights)),
        compile_seconds=time.monotonic() - began,
    )


def abstract_step(recipe: Recipe, mesh: Mesh) -> tuple[Any, TrainState, dict[str, Any], TrainState]:
    """The jitted train step, the shapes of its arguments, and the shardings of the state."""
    model = planned_model(recipe.model, mesh.devices.flat[0].platform)
    recipe = dataclasses.replace(recipe, model=model)
    vocabulary = made_up_vocabulary(model.vocab_size)
    objective = objective_of(recipe, vocabulary)
    module, optimizer = make_module(recipe.family, model), make_optimizer(recipe.optimizer, recipe.train.steps)
    state = jax.eval_shape(lambda: init_state(module, tiny_inputs(recipe.family), optimizer, 0))
    placed = state_shardings(mesh, state)
    how = {"accumulate": recipe.train.grad_accum_steps, "vmem_kib": recipe.mesh.vmem_kib}
    step = make_train_step(module, objective, optimizer, mesh, placed, **how)
    length, rows = model.context_length, recipe.train.batch_size
    document = length // 2 if recipe.objective.kind == "pairs" else 2 * length
    text = made_up_tokens(document, model.vocab_size, bool(recipe.data.messages_field), len(recipe.data.text_fields))
    source, example = objective.source(text, length, False)
    one = example(source[np.arange(1)], ExampleRng(0, np.arange(1)))
    batch = {name: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for name, x in one.items()}
    return step, state, batch, placed


def with_vocabulary(recipe: Recipe) -> Recipe:
    """A model that follows its tokenizer takes the size that the tokenizer will have."""
    size = recipe.model.vocab_size or recipe.data.vocab_size
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, vocab_size=size))


def planned_model(model: TransformerConfig, platform: str) -> TransformerConfig:
    """As it will be on the chips: `auto` is what they take it for, and not what this machine does."""
    dtype = ("float32" if platform == "cpu" else "bfloat16") if model.dtype == "auto" else model.dtype
    return dataclasses.replace(model.resolved(), dtype=dtype)


def made_up_tokens(length: int, vocab_size: int, conversations: bool = False, sides: int = 0) -> Tokens:
    """Four documents of `length` made-up tokens, or conversations that are all answers, or a set of texts to be told apart."""
    documents, size = sides or 4, length + 2
    ids = 5 + np.arange(documents * size) % (vocab_size - 5)
    scored = np.ones(len(ids), bool) if conversations else None
    sets = Sets(sides, ([2], [3]), np.zeros(1, np.float32)) if sides else None
    return Tokens(ids.astype(np.int32), np.arange(0, len(ids), size), len(ids), scored=scored, sets=sets)


def _roofline(
    recipe: Recipe,
    topology: Topology,
    mesh: Mesh,
    *,
    executed: float,
    kernels: tuple[float, float],
    operations: Iterable[Operation],
    traffic: hlo.Traffic | None,
    **known: Any,
) -> Plan:
    chip = topology.chip
    tokens = recipe.train.batch_size * tokens_per_row(recipe)
    flops = recipe_flops_per_token(recipe) * tokens
    times: dict[str, float | None] = {"compute": executed / (topology.chips * chip.flops)}
    collectives: tuple[dict[str, Any], ...] = ()
    if traffic is not None:
        collectives = summed_collectives(traffic, topology, mesh)
        if topology.slices > 1 and not any("data" in row["axes"] for row in collectives):
            collectives = (between_slices(topology, known["memory"]["parameters"]), *collectives)
            known["notes"].append("what goes between slices is counted as one all-reduce of the gradients in float32")
        times["memory"] = traffic.memory / (chip.bandwidth / chip.devices)
        times["network"] = sum(row["seconds"] for row in collectives)
    bound_by = max(times, key=lambda name: times[name] or 0.0)
    longest = times[bound_by] or 0.0
    peak = topology.chips * chip.flops
    scheduled, found = None, list(operations)
    if traffic and traffic.cycles and chip.clock:
        at_peak, scheduled = (traffic.cycles / chip.clock + n * chip.devices / chip.flops for n in kernels)
        if kernels[1] > kernels[0]:
            known["notes"].append(
                f"attention kernels with heads narrower than {LANES} are counted at {NARROW_SHARE:.0%} of the chip's peak; "
                f"at all of it {flops / (max(at_peak, longest) * peak):.0%} would be expected"
            )
    return Plan(
        recipe=recipe.name,
        topology=topology.name,
        slices=topology.slices,
        mesh=dict(mesh.shape),
        chips=topology.chips,
        tokens_per_step=tokens,
        memory_limit=chip.memory,
        flops_per_step=flops,
        executed_flops=executed,
        compute_seconds=longest if bound_by == "compute" else times["compute"] or 0.0,
        memory_seconds=times.get("memory"),
        network_seconds=times.get("network"),
        bound_by=bound_by,
        step_seconds=longest,
        mfu_bound=flops / (longest * peak),
        scheduled_seconds=scheduled,
        mfu_expected=flops / (max(scheduled, longest) * peak) if scheduled else None,
        tokens_per_second=tokens / longest,
        days=_full_steps(recipe) * longest / DAY,
        collectives=collectives,
        parts=by_part(found),
        operations=tuple(dataclasses.asdict(o) for o in sorted(found, key=lambda o: -o.cycles)[:LARGEST]),
        notes=tuple(known.pop("notes")),
        **known,
    )


def _cycles(kernel: Kernel | None, topology: Topology) -> float:
    """Of one call."""
    chip = topology.chip
    if kernel is None:
        return 0.0
    return kernel.flops / (NARROW_SHARE if kernel.narrow else 1.0) * chip.devices / chip.flops * chip.clock


def _full_steps(recipe: Recipe) -> float:
    """How many steps of the full batch at the full context the recipe amounts to, by FLOPs."""
    cfg, whole = recipe.train, recipe_flops_per_token(recipe) * recipe.model.context_length
    rows = cfg.batch_at(cfg.steps)[0] / cfg.batch_size
    if not cfg.short_length:
        return rows
    short = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, context_length=cfg.short_length))
    early = cfg.batch_at(min(cfg.short_steps, cfg.steps))[0] / cfg.batch_size
    return rows - early + early * recipe_flops_per_token(short) * cfg.short_length / whole


TRIES = 5
ENOUGH = 300.0
"""Seconds after which a search that has found a layout begins no other."""


def search(recipe: Recipe, topology: Topology, log: Callable[[str], None], *, tries: int = TRIES) -> list[Plan]:
    """Compile the layouts that promise most, and the best of them with more VMEM for an operation where the chip has it; the
    best first: those that fit, then the fastest as expected.

    Args:
      tries: how many; with 1 only as many as it takes to find one that fits, at most 3.

    Raises:
      InputError: the recipe cannot run on any layout, none is possible, or none fits; says which topology would do.
    """
    recipe = with_vocabulary(recipe)
    whole = dataclasses.replace(recipe.train, grad_accum_steps=1)
    dataclasses.replace(recipe, train=whole, mesh=MeshConfig()).check(1)  # what is wrong whatever the layout
    ranked = candidates(recipe, topology)
    if not ranked:
        raise InputError(
            f"{recipe.name} cannot be laid out on {topology.devices_count} devices: a batch of "
            f"{recipe.train.batch_size} rows must divide by data*fsdp, and the widths by fsdp and tensor; set "
            f"--train.batch-size to a multiple of {topology.devices_count}, or take fewer chips"
        )
    least = min(guess.memory for guess in ranked)
    if least > 3 * topology.chip.memory:
        raise InputError(too_small(recipe, topology, least))
    topology.devices()  # says what is missing, before it is missing for every layout
    plans: list[Plan] = []
    tried: dict[int, Recipe] = {}  # by the plan made of each
    last: Exception | None = None
    seen: list[tuple] = []
    began = time.monotonic()
    for guess in ranked:
        if any(p.fits for p in plans) and time.monotonic() - began > ENOUGH:
            log(f"  stopping here, after {time.monotonic() - began:.0f} s")
            break
        mesh, ways = guess.recipe.mesh, (guess.recipe.mesh, guess.recipe.model.remat)
        if ways in seen or sum(w[0] == mesh for w in seen) > 1:
            continue
        if tries == 1 and plans and guess.memory > 0.6 * min(p.memory_per_chip for p in plans):
            continue  # that one did not fit
        seen.append(ways)
        try:
            log(f"compiling {flags(recipe, guess.recipe) or 'the recipe as it is'}")
            plans.append(plan(guess.recipe, topology, recipe))
            tried[id(plans[-1])] = guess.recipe
        except (InputError, NotImplementedError) as e:  # a mesh that this torus cannot be cut into
            log(f"  not possible: {str(e).splitlines()[0][:120]}")
            last = e
            continue
        log(f"  {one_line(plans[-1])}")
        if len(plans) >= (tries if tries > 1 else 3) or (tries == 1 and plans[-1].fits):
            break
    if not plans:
        raise InputError(f"no layout of {recipe.name} on {topology.name} can be compiled: {last}") from last
    plans.sort(key=_by_time)
    if not plans[0].fits:
        raise InputError(too_small(recipe, topology, min(p.memory_per_chip for p in plans)))
    best = tried[id(plans[0])]
    for kib in other_vmem(topology.chip, best) if tries > 1 and time.monotonic() - began < ENOUGH else ():
        changed = dataclasses.replace(best, mesh=dataclasses.replace(best.mesh, vmem_kib=kib))
        log(f"compiling {flags(recipe, changed)}")
        plans.append(plan(changed, topology, recipe))
        log(f"  {one_line(plans[-1])}")
    return sorted(plans, key=_by_time)


def _by_time(p: Plan) -> tuple[bool, float]:
    return not p.fits, max(p.step_seconds, p.scheduled_seconds or 0.0)


def one_line(p: Plan) -> str:
    """A plan in one line."""
    if not p.fits:
        return f"does not fit: {p.memory_per_chip / GIB:.1f} of {p.memory_limit / GIB:.1f} GiB per chip"
    expected = f", expected {p.mfu_expected:.0%}" if p.mfu_expected else ""
    return f"{p.memory_per_chip / GIB:.1f} GiB per chip, {p.step_seconds:.3g} s a step, MFU at most {p.mfu_bound:.0%}{expected}"


def too_small(recipe: Recipe, topology: Topology, memory: float) -> str:
    """That a recipe does not fit, and the smallest slice of the same chip that should hold it, by a guess."""
    refusal = (
        f"{recipe.name} does not fit on {topology.name}: the least it was found to need is {memory / GIB:.1f} GiB per chip, "
        f"and there are {topology.chip.memory / GIB:.1f}"
    )
    free = dataclasses.replace(recipe, mesh=MeshConfig())
    chips = topology.chips
    while chips <= 8192:
        chips *= 2
        shape = usual_shape(topology.chip_name, chips // topology.slices)
        if shape is None:
            break
        larger = dataclasses.replace(topology, shape=shape)
        ranked = candidates(free, larger)
        if ranked and ranked[0].memory < 0.9 * topology.chip.memory:
            return f"{refusal}; plan --topology {larger.name} with {flags(recipe, ranked[0].recipe)} should"
    return f"{refusal}; take a chip with more memory, such as v5p, or a smaller model"
