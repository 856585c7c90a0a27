"""The step that samples: a token for every row of a causal model or encoder-decoder, a denoising step of a diffusion model,
a forward pass of a masked model."""

import dataclasses
import functools
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bothways import sharding
from bothways.chips import Topology, usual_shape
from bothways.config import MeshConfig
from bothways.errors import InputError
from bothways.flops import executed_flops
from bothways.model.axes import activation_shardings, traced_for
from bothways.model.gpt import MaskedNextToken
from bothways.model.stack import unstack_layers
from bothways.plan import hlo
from bothways.plan.candidates import PAD_VOCABULARY, held, parameter_axes
from bothways.plan.roofline import (
    bytes_per_device,
    compile_quietly,
    summed_collectives,
    text_of,
    without_writing_to_cache,
)
from bothways.plan.training import planned_model, with_vocabulary
from bothways.recipes import Recipe
from bothways.registry import make_module, predicts
from bothways.rundir import compute_dtype_shapes, param_shapes
from bothways.sample.blocks import block_decoder, usual_block
from bothways.sample.decode import Decoder
from bothways.sample.denoise import Denoising, hidden_logits
from bothways.sample.sampling_params import SamplingParams
from bothways.sample.text import callbacks

ROWS = 16
MASKS = 16
"""Masked positions of a row: a chunk, as `sample` fills it."""


@dataclasses.dataclass(frozen=True)
class DecodePlan:
    """Bytes and seconds are of one step: a token more for every row; of masked models, a forward pass."""

    step: str
    """decode, denoise (a forward pass of the open block of every row) or read."""
    rows: int
    context_length: int
    """Slots of the cache: the prompt takes half of them, the output the rest. Of masked models, of a row."""
    chips: int
    """As few as hold it."""
    mesh: dict[str, int]
    fits: bool
    memory_per_chip: float
    memory_limit: float
    memory: dict[str, float]
    """What memory_per_chip is made of, while it decodes or while it reads the prompts: the larger of the two."""
    weights_seconds: float
    """To read every weight once. No step is faster, but of models so small that some stay
    in the memory beside the matrix units."""
    compute_seconds: float | None
    memory_seconds: float | None
    network_seconds: float | None
    bound_by: str
    step_seconds: float
    """The longest of the three, and of weights_seconds."""
    tokens_per_second: float
    """Of all rows together, at best: tokens written, those of a diffusion model one a pass; of masked models, tokens read."""
    compile_seconds: float
    notes: tuple[str, ...]


def plan_decoding(recipe: Recipe, topology: Topology, rows: int = ROWS, block: int = 0) -> DecodePlan:
    """Compile what `sample` runs, on as few chips of a topology as hold it.

    The weights are of the types, and spread, as `load` has them: over `tensor` as far as the heads divide, the rest over
    `fsdp`.

    Args:
      block: of a decoder trained by diffusion, tokens in a block; 0: what `sample` takes.

    Raises:
      InputError: a block that the recipe does not train; not even all chips of one slice hold it; or libtpu is missing.
    """
    recipe, began, found = with_vocabulary(recipe), time.monotonic(), None
    sizes = recipe.objective.block_sizes
    if block and (not _in_blocks(recipe) or block not in sizes):
        raise InputError(
            f"--block is {block}, and {recipe.name} "
            + (
                f"trains blocks of {', '.join(map(str, sizes))}"
                if _in_blocks(recipe)
                else "writes no blocks with a cache"
            )
        )
    block = block or (usual_block(sizes, recipe.model.context_length) if _in_blocks(recipe) else 0)
    for where, placed, sizes in _spreads(recipe, topology, rows):
        found = _compiled(placed, where, sizes, rows, block)
        if found.fits:
            return dataclasses.replace(found, compile_seconds=time.monotonic() - began)
    if found is None:
        raise InputError(
            f"the weights of {recipe.name} and the cache of {rows} rows do not fit on {topology.name}: sample fewer "
            "--rows, or take a larger slice"
        )
    return found


def _in_blocks(recipe: Recipe) -> bool:
    """Whether `sample` writes blocks with a cache."""
    return recipe.family == "gpt" and recipe.objective.kind == "diffusion" and set(recipe.objective.block_sizes) != {0}


def _reads_rows(recipe: Recipe) -> bool:
    """Whether `sample` reads whole rows in every pass."""
    return recipe.family == "bert" or (recipe.objective.kind == "diffusion" and not _in_blocks(recipe))


def _spreads(recipe: Recipe, topology: Topology, rows: int) -> Any:
    """(topology, recipe, mesh) from one device on, doubling, where the weights and the cache may fit."""
    chip, cfg = topology.chip, recipe.model.resolved()
    padded = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, pad_vocab_to_multiple_of=PAD_VOCABULARY))
    known = [(r, parameter_axes(r)) for r in (recipe, padded)]
    cache = 2 * rows * cfg.n_layers * cfg.context_length * cfg.n_kv_heads * (cfg.d_head + cfg.d_value)
    cache = 0 if _reads_rows(recipe) else cache * (2 if recipe.family == "seq2seq" else 1)
    devices = 1
    while devices <= math.prod(topology.shape) * chip.devices:
        for tensor in (n for n in range(devices, 0, -1) if devices % n == 0):
            sizes = {"data": 1, "fsdp": devices // tensor, "tensor": tensor, "context": 1}
            fitting = [(r, mine) for r, axes in known if (mine := held(axes, sizes)) is not None]
            if fitting and 2 * fitting[0][1] + cache / tensor < 0.9 * chip.memory / chip.devices:
                yield _slice_of(topology, devices), fitting[0][0], sizes
                break
        devices *= 2


def _slice_of(topology: Topology, devices: int) -> Topology:
    """The smallest slice of the same chip with so many devices."""
    chips = -(-devices // topology.chip.devices)
    shape = (devices,) if topology.chip_name == "cpu" else usual_shape(topology.chip_name, max(chips, 4))
    larger = shape is None or math.prod(shape) > math.prod(topology.shape)
    return dataclasses.replace(topology, shape=topology.shape if larger else shape, slices=1)


def _compiled(recipe: Recipe, topology: Topology, sizes: dict[str, int], rows: int, block: int) -> DecodePlan:
    chip, count = topology.chip, math.prod(sizes.values())
    mesh = sharding.make_mesh(MeshConfig(**sizes), topology.devices()[:count])
    model = planned_model(recipe.model, mesh.devices.flat[0].platform)
    # As load_run does. Of one device, the kernels ask the mesh what it is.
    model = dataclasses.replace(model, attention=model.attention if count == 1 else "xla")
    placed = (
        activation_shardings(sharding.activation_sharding_fn(mesh))
        if count == 1
        else traced_for(mesh.devices.flat[0].platform)
    )
    recipe = dataclasses.replace(recipe, model=model)
    shapes = compute_dtype_shapes(param_shapes(recipe), model)
    spread = sharding.parameter_shardings(mesh, shapes)
    params = jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), shapes, spread)
    if recipe.family != "bert":
        split = jax.jit(functools.partial(unstack_layers, join=count == 1)).lower(params)
        with without_writing_to_cache():
            at = split.compile().output_shardings
        params = jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), split.out_info, at)
    with placed:
        traced, before, cache, notes = (
            _reading(recipe, params, rows) if _reads_rows(recipe) else _decoding(recipe, params, rows, block)
        )
        compiled, used, messages = compile_quietly(traced.lower()) if traced else (None, before, [])
    notes += messages
    text = text_of(compiled)[0] if compiled else ""
    once, twice = [hlo.read(text, count, turns) if text else None for turns in (1, 2)]
    used = max(before, _bytes(compiled) if compiled else used)
    weights = bytes_per_device(shapes, spread)
    each = min(count, chip.devices)
    parts = {"weights": weights, "cache": cache, "temporaries, padding, program": used - weights - cache}
    share = chip.devices  # of a chip that one device is
    times: dict[str, float | None] = {"weights": weights / (chip.bandwidth / share)}
    if traced:
        times["compute"] = executed_flops(traced.jaxpr.jaxpr)[0] / (count * chip.flops / share)
    if once and twice:
        step = _turn(once, twice) if twice.endless else once
        times["memory"] = step.memory / (chip.bandwidth / share)
        times["network"] = sum(row["seconds"] for row in summed_collectives(step, topology, mesh))
    if -(-count // chip.devices) > chip.host:
        notes.append(f"`sample` uses the {chip.host} chips of one host, and cannot run on so many yet")
    slowest = max(times, key=lambda name: times[name] or 0.0)
    longest = times[slowest] or 0.0
    masked = _reads_rows(recipe)
    a_pass = block / (block + 1) if block and predicts(recipe.family, model) == "own" else 1
    if block:
        notes.append(f"blocks of {block}, a token a pass; fewer --steps, or a --threshold, write as many times more")
    return DecodePlan(
        step="read" if masked else "denoise" if block else "decode",
        rows=rows,
        context_length=model.context_length,
        chips=-(-count // chip.devices),
        mesh=dict(mesh.shape),
        fits=compiled is not None and each * used <= chip.memory,
        memory_per_chip=each * used,
        memory_limit=chip.memory,
        memory={name: each * size for name, size in parts.items() if size > 0},
        weights_seconds=times["weights"] or 0.0,
        compute_seconds=times.get("compute"),
        memory_seconds=times.get("memory"),
        network_seconds=times.get("network"),
        bound_by=slowest,
        step_seconds=longest,
        tokens_per_second=rows * (model.context_length if masked else a_pass) / longest,
        compile_seconds=0.0,
        notes=tuple(notes),
    )


def _reading(recipe: Recipe, params: Any, rows: int) -> tuple[Any, float, float, list[str]]:
    """A masked model's forward pass of full rows, traced; nothing comes before it, and it keeps no cache."""
    shape = rows, recipe.model.context_length
    tokens, positions = _integers(*shape), _integers(rows, MASKS)
    module = make_module("bert", recipe.model) if recipe.family == "bert" else MaskedNextToken(recipe.model)
    return hidden_logits.trace(module, params, tokens, tokens, positions), 0.0, 0.0, []


def _decoding(recipe: Recipe, params: Any, rows: int, block: int) -> tuple[Any, float, float, list[str]]:
    """The decoding or denoising loop, traced, after prompts of half the context; what their prefill needs, in bytes
    of a device; and the bytes of the cache. The loop is None where already the prompts do not fit."""
    cfg, module = recipe.model, make_module(recipe.family, recipe.model)
    source = (_integers(rows, cfg.context_length),) * 2 if recipe.family == "seq2seq" else None
    each, prompts = _integers(rows), _integers(rows, cfg.context_length // 2)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    method = SamplingParams.make()
    if block:
        in_blocks = block_decoder(module, np.zeros(cfg.table_rows, bool), 0, 1, block)
        size = -(-cfg.context_length // block) * block
        traced = in_blocks.block_prefill.trace(params, prompts, each, each, keys, each, method, size=size)
    else:
        decoder = Decoder(*callbacks(module, recipe, cfg.vocab_size), cfg.context_length, eos=0)
        traced = decoder.prefill.trace(params, prompts, each, each, source, size=cfg.context_length)
    compiled, used, notes = compile_quietly(traced.lower())
    if compiled is None:
        return None, used, 0.0, notes
    # The state lies where the compiler put it, as when `sample` runs.
    state = jax.tree.map(
        lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), traced.out_info, compiled.output_shardings
    )
    cache = bytes_per_device(state.cache, jax.tree.map(lambda s: s.sharding, state.cache))
    run = in_blocks.block_run if block else decoder.run
    loop = run.trace(params, state, keys, each, method, _integers(), *([Denoising.make()] if block else []))
    return loop, _bytes(compiled), cache, notes


def _integers(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _bytes(compiled: jax.stages.Compiled) -> float:
    """What a program needs on a device while it runs."""
    s = compiled.memory_analysis()
    kept = s.argument_size_in_bytes + s.output_size_in_bytes - s.alias_size_in_bytes
    return float(kept + s.temp_size_in_bytes + s.generated_code_size_in_bytes)


def _turn(once: hlo.Traffic, twice: hlo.Traffic) -> hlo.Traffic:
    """One turn of a loop of unknown length: what it adds to the traffic if it turns once more."""
    collectives = tuple(
        dataclasses.replace(a, times=b.times - a.times)
        for a, b in zip(once.collectives, twice.collectives, strict=True)
        if b.times > a.times
    )
    return hlo.Traffic(collectives, twice.memory - once.memory, twice.cycles - once.cycles, 0)
