"""Ways to lay a recipe out on so many chips, and a guess from the shapes at what each would need.

The guesses only rank; what is reported comes from the compiler (plan/training.py).
"""

import dataclasses
import math

import jax

from bothways.chips import Topology
from bothways.config import MeshConfig
from bothways.flops import layer_multiplies, recipe_flops_per_token, tokens_per_row
from bothways.model.adapters import split
from bothways.model.axes import logical_axes, path_names
from bothways.model.short_rows import LANES, LONGEST
from bothways.recipes import Recipe
from bothways.rundir import param_shapes
from bothways.sharding import PARAMETERS

REMAT = ("none", "dots", "full")
PAD_VOCABULARY = 128


@dataclasses.dataclass(frozen=True)
class Guess:
    recipe: Recipe
    memory: float
    """Bytes per chip."""
    seconds: float


def parameter_axes(recipe: Recipe) -> list[tuple[tuple[int, ...], tuple[str, ...]]]:
    """Shape and logical axes of every parameter."""
    leaves = jax.tree_util.tree_leaves_with_path(param_shapes(recipe))
    return [(leaf.shape, logical_axes(path_names(path))) for path, leaf in leaves]


def held(parameters: list[tuple[tuple[int, ...], tuple[str, ...]]], sizes: dict[str, int]) -> float | None:
    """Parameters that one device holds on such a mesh; None if an axis does not divide."""
    total = 0.0
    for shape, axes in parameters:
        share = 1
        for size, axis in zip(shape, axes, strict=True):
            spread = PARAMETERS.get(axis, ())
            parts = math.prod(sizes[a] for a in ((spread,) if isinstance(spread, str) else spread))
            if size % parts:
                return None
            share *= parts
        total += math.prod(shape) / share
    return total


def meshes(topology: Topology) -> list[dict[str, int]]:
    """Every way to factor the devices into data, fsdp and tensor; slices are joined by `data` only.

    `context` is left to whoever has rows so long that nothing else helps.
    """
    n, found = topology.devices_count, []
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    for tensor in (d for d in divisors if d <= 64):
        for fsdp in (d for d in divisors if n % (tensor * d) == 0):
            if n // (tensor * fsdp) % topology.slices == 0:
                found.append({"data": n // (tensor * fsdp), "fsdp": fsdp, "tensor": tensor})
    return found


def rate(topology: Topology, group: int) -> float:
    """Bytes per second at which a device gathers from a group of so many; infinite from itself alone.

    A group of all has every axis of the torus, a smaller one as few as hold it.
    """
    if group == 1:
        return math.inf
    links = [2 if topology.wraps(i) else 1 for i, side in enumerate(topology.shape) if side > 1] or [1]
    axes = len(links) if group == topology.devices_count else min(len(links), 1 + (group > max(topology.shape)))
    return topology.chip.link / topology.chip.devices * axes * sum(links) / len(links) * group / (group - 1)


def trained_share(recipe: Recipe) -> float:
    """Of the parameters, how many are trained: with adapters few of them."""
    if not recipe.model.lora.rank:
        return 1.0
    adapters, rest = (sum(math.prod(x.shape) for x in jax.tree.leaves(part)) for part in split(param_shapes(recipe)))
    return adapters / (adapters + rest)


def guess(recipe: Recipe, topology: Topology, sizes: dict[str, int], mine: float, trained: float = 1.0) -> Guess:
    """Memory and time of one step, from the shapes alone.

    Args:
      mine: parameters that one device holds.
      trained: share of them that has a gradient and an optimizer's state.
    """
    cfg, chip = recipe.model.resolved(), topology.chip
    pieces = recipe.train.grad_accum_steps
    tensor, shards = sizes["tensor"], sizes["data"] * sizes["fsdp"]
    rows = recipe.train.batch_size / shards / pieces
    tokens = rows * tokens_per_row(recipe)
    more = (4 if recipe.optimizer.name in ("lion", "adafactor") else 8) + (8 if pieces > 1 else 4)
    kept_in = 2 if cfg.lora.rank and cfg.lora.frozen == "bfloat16" else 4
    state = mine * (kept_in * (1 - trained) + (4 + more) * trained)
    wide = (2 * cfg.n_heads + 2 * cfg.n_kv_heads) * cfg.d_head + cfg.d_ff * (3 if cfg.gated else 2)
    dropout = cfg.dropout_attention and (cfg.context_length > LONGEST or LANES % cfg.d_head)
    kernel = chip.dimensions > 1 and not dropout and cfg.context_length % LANES == 0  # model/kernels.py holds no scores
    scores = 0.0 if kernel else rows * cfg.n_heads / tensor * cfg.context_length**2
    kept = {"full": 2 * cfg.d_model, "dots": 6 * cfg.d_model + 2 * wide / tensor}
    kept["none"] = kept["dots"] + 45 * cfg.d_model + 2 * wide / tensor + 6 * scores / tokens
    working = tokens * (12 * cfg.d_model + 6 * wide / tensor) + 14 * scores
    whole = 2 * (2 * layer_multiplies(cfg)) / tensor
    logits = 6 * min(2.0**27, tokens * cfg.vocab_size / tensor)
    memory = state + cfg.n_layers * tokens * kept[cfg.remat] + working + whole + logits
    # ---- time: the longest of computing, sending and moving weights within the chip
    flops = recipe_flops_per_token(recipe) * recipe.train.batch_size * tokens_per_row(recipe)
    again = {"none": 1.0, "dots": 1.02, "full": 4 / 3}[cfg.remat]
    compute = flops * again / (topology.devices_count * chip.flops / chip.devices)
    gathered = 2 * mine * sizes["fsdp"]  # bfloat16, of all that one device gathers
    passes = (3 if cfg.remat == "full" else 2) * pieces
    moved = 28 * mine + pieces * ((12 * mine if pieces > 1 else 0) + 3 * gathered)  # state; gradients added up; weights
    network = gathered * (passes + 2 * pieces) / rate(topology, sizes["fsdp"])
    network += 2 * 4 * mine / rate(topology, sizes["data"])
    if topology.slices > 1:
        network += 2 * 4 * mine / (chip.network / chip.devices)
    around = (6 if cfg.remat == "full" else 4) * 2 * 2 * tokens * cfg.d_model * pieces * cfg.n_layers
    network += around * (1.25 if recipe.family == "seq2seq" else 1) / rate(topology, sizes["tensor"])
    times = sorted([compute, network, moved / (chip.bandwidth / chip.devices)])
    seconds = times[2] + 0.1 * (times[0] + times[1])  # what overlaps does so not quite
    # Of two that are as fast, the one with fewer ways to split comes first.
    return Guess(recipe, memory * chip.devices, seconds * (1 + 0.02 * (tensor > 1) + 0.01 * (pieces > 1)))


def candidates(recipe: Recipe, topology: Topology) -> list[Guess]:
    """Layouts of a recipe on a topology: those that should fit, the fastest first; then the others, the leanest first.

    A recipe that names a mesh keeps it; else every mesh is tried. What is recomputed and how many pieces a batch is
    cut into vary; the batch itself does not, but its ramp begins no lower than the mesh divides. Where only the
    vocabulary does not divide, it is padded.
    """
    found = []
    rows = recipe.train.batch_size
    given = recipe.mesh.axes() != MeshConfig().axes()
    wanted = [dict(recipe.mesh.sizes(topology.devices_count))] if given else meshes(topology)
    plain, trained = parameter_axes(recipe), trained_share(recipe)
    padded_recipe = dataclasses.replace(
        recipe, model=dataclasses.replace(recipe.model, pad_vocab_to_multiple_of=PAD_VOCABULARY)
    )
    padded = parameter_axes(padded_recipe)
    for sizes in wanted:
        shards = sizes["data"] * sizes["fsdp"]
        base, mine = recipe, held(plain, sizes)
        if mine is None and (mine := held(padded, sizes)) is not None:
            base = padded_recipe
        if mine is None or rows % shards:
            continue
        pieces = [a for a in range(1, rows // shards + 1) if rows // shards % a == 0 and rows // shards // a < 64]
        for accumulate in pieces:
            for remat in REMAT:
                model = dataclasses.replace(base.model, remat=remat, scan_layers=base.model.n_layers > 4)
                train = dataclasses.replace(base.train, grad_accum_steps=accumulate)
                changed = dataclasses.replace(
                    base, model=model, train=train, mesh=dataclasses.replace(recipe.mesh, **sizes)
                )
                found.append(guess(with_ramp(changed, shards * accumulate), topology, sizes, mine, trained))

    def order(g: Guess) -> tuple[bool, float, float]:
        over = g.memory > 0.9 * topology.chip.memory
        return (over, g.memory, g.seconds) if over else (over, g.seconds, g.memory)

    return sorted(found, key=order)


def with_ramp(recipe: Recipe, least: int) -> Recipe:
    """The same recipe with a batch ramp that begins at `least` rows or more.

    Steps, warm-up and decay are counted anew so that they come after as many rows as before.
    """
    old, optimizer = recipe.train, recipe.optimizer
    if all(size % least == 0 for _, _, size in old.stages()):
        return recipe
    none = least * 2 > old.batch_size
    new = dataclasses.replace(
        old, batch_size_start=0 if none else least, batch_size_ramp_rows=0 if none else old.batch_size_ramp_rows
    )

    def at(step: int) -> int:
        return new.steps_for(old.batch_at(step)[0]) if step else 0

    rates = dataclasses.replace(optimizer, warmup_steps=at(optimizer.warmup_steps), decay_steps=at(optimizer.decay_steps))
    return dataclasses.replace(recipe, train=dataclasses.replace(new, steps=at(old.steps)), optimizer=rates)


def flags(before: Recipe, after: Recipe) -> str:
    """What to add to the command line to get from one recipe to the other."""
    chosen = []
    for section in ("model", "optimizer", "train", "mesh"):
        old, new = getattr(before, section), getattr(after, section)
        for field in dataclasses.fields(new):
            value = getattr(new, field.name)
            name = field.name.replace("_", "-")
            if value != getattr(old, field.name):
                switch = f"--{section}.{'' if value else 'no-'}{name}"
                chosen.append(switch if isinstance(value, bool) else f"--{section}.{name} {value}")
    return " ".join(chosen)
