"""`bothways plan`: what a recipe needs on a target topology, before any chip is rented."""

import dataclasses
from typing import Any

from bothways.commands.shared import emit, parse_recipe
from bothways.errors import InputError
from bothways.log import log

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Print what a recipe would need on a target topology: memory, communication, and how fast it can be at best."""

    topology: str
    """Chips, such as v5e:16x16, v4:2x2x4, v5p:4x4x8, v6e:8x8, 7x:4x4x4; or an accelerator type, such as v5e-256."""
    slices: int = 1
    """Number of slices, joined by the data-centre network."""
    search: bool = False
    """Compile several layouts (mesh, micro-batches, what is recomputed) and recommend the best."""
    profile: bool = False
    """Print the compiler's cycles by part of the model, and the largest operations with their source. --json always has
    both."""
    decode: bool = True
    """Also plan sampling: the decoding step, or a masked model's forward pass, on as few of these chips as hold it."""
    rows: int = 16
    """Rows that are decoded together, each as long as the context."""
    block: int = 0
    """Tokens per block of a decoder trained by diffusion; 0: the default of `sample`."""
    json: bool = False
    """Print one JSON object, with the decoding step under `decode`; with --search one per layout, the best first."""


def plan(argv: list[str]) -> None:
    """Compile a recipe's train step and its decoding step for a topology, and print what they would need."""
    recipe, options = parse_recipe("plan", argv, PlanOptions, "bothways plan gpt2_xl --topology v5e:16x16 [--search]")
    from bothways.chips import Topology
    from bothways.config import MeshConfig
    from bothways.plan import training as planning
    from bothways.plan.decoding import plan_decoding

    if options.rows < 1:
        raise InputError(f"--rows is {options.rows}; at least 1 row is decoded")
    topology = Topology.parse(options.topology, options.slices)
    if options.search:
        plans = planning.search(recipe, topology, log)
    elif recipe.mesh.axes() == MeshConfig().axes():
        plans = planning.search(recipe, topology, log, tries=1)
    else:
        plans = [planning.plan(recipe, topology)]
        if not plans[0].fits:
            log("it does not fit; looking for a layout that does")
            free = dataclasses.replace(recipe, mesh=MeshConfig())
            try:
                fitting = planning.search(free, topology, log, tries=1)[0].flags
                plans[0] = dataclasses.replace(plans[0], notes=(*plans[0].notes, f"this fits: {fitting}"))
            except InputError as e:
                plans[0] = dataclasses.replace(plans[0], notes=(*plans[0].notes, str(e)))
    decoded = None
    if options.decode:
        log("compiling the step that samples")
        try:
            decoded = plan_decoding(recipe, topology, options.rows, options.block)
        except InputError as e:
            log(str(e))
    for p in plans if options.json and options.search else plans[:1]:
        both = dataclasses.asdict(p) | {"decode": decoded and dataclasses.asdict(decoded)}
        emit(both, options.json, shown(p, decoded, options.profile))


def shown(p: Any, decoded: Any, profile: bool) -> str:
    """A whole plan as text."""
    parts = [show_training(p), show_profile(p) if profile else "", show_decoding(decoded) if decoded else ""]
    return "\n".join(part for part in parts if part)


def show_profile(p: Any) -> str:
    """The profile as text: where the cycles go."""
    total = sum(p.parts.values())
    if not total:
        return "  the compiler gives no cycles for this chip, so there is no profile"
    lines = [f"  clock cycles of a chip in a step: {total / 1e6:,.1f} M"]
    lines += [f"    {cycles / 1e6:12,.2f} M {cycles / total:6.1%} {part}" for part, cycles in p.parts.items()]
    lines.append("  largest operations")
    for o in p.operations:
        cause = o["scope"][-90:] or o["name"]
        lines.append(
            f"    {o['cycles'] / 1e6:12,.2f} M {o['cycles'] / total:6.1%} {o['times']:5d} times {o['part']}: {cause} {o['source']}"
        )
    return "\n".join(lines)


def show_training(p: Any) -> str:
    """The plan of a train step as text."""
    mesh = " x ".join(f"{name} {size}" for name, size in p.mesh.items() if size > 1) or "one device"
    slices = f" in {p.slices} slices" if p.slices > 1 else ""
    lines = [
        f"{p.recipe} on {p.topology}{slices}: {p.chips} chips, {mesh}",
        f"  {p.parameters:,} parameters, {p.tokens_per_step:,} tokens a step",
        f"  memory per chip   {p.memory_per_chip / GIB:7.2f} GiB of {p.memory_limit / GIB:.2f}: "
        + ("it fits" if p.fits else "IT DOES NOT FIT"),
    ]
    lines += [f"    {size / GIB:21.2f} GiB {name}" for name, size in p.memory.items() if size > 0.005 * GIB]
    lines.append(f"  model FLOPs       {p.flops_per_step:.3e} a step; executed {p.executed_flops:.3e}")
    for name in ("compute", "memory", "network"):
        seconds = getattr(p, f"{name}_seconds")
        shown = f"{seconds:9.4f} s" if seconds is not None else "  not known"
        lines.append(f"  {name:8s} {shown}" + ("   <- holds it back" if name == p.bound_by else ""))
    for row in p.collectives[:8]:
        lines.append(
            f"    {row['kind']:18s} over {row['axes'] or 'pairs':12s} {row['bytes'] / 1e9:9.2f} GB in {row['times']:5d} "
            f"operations {row['seconds']:9.4f} s"
        )
    lines.append(
        f"  MFU at most       {p.mfu_bound:.0%}: {p.step_seconds:.3g} s a step, {p.tokens_per_second:,.0f} tokens/s"
    )
    if p.mfu_expected is not None:
        lines.append(f"  MFU expected      {p.mfu_expected:.0%} by the compiler's own count of cycles")
    lines.append(f"  to the end        {p.days:.1f} days at best")
    if p.flags:
        lines.append(f"  train it with     {p.flags}")
    return "\n".join([*lines, *(f"  note: {note}" for note in p.notes)])


def show_decoding(d: Any) -> str:
    """The plan of a sampling step as text."""
    mesh = " x ".join(f"{name} {size}" for name, size in d.mesh.items() if size > 1)
    what = {"decode": "decoding step", "denoise": "denoising step", "read": "forward pass"}[d.step]
    lines = [
        f"{what} of {d.rows} rows of {d.context_length}: {d.chips} chip{'s' if d.chips > 1 else ''}{f', {mesh}' if mesh else ''}",
        f"  memory per chip   {d.memory_per_chip / GIB:7.2f} GiB of {d.memory_limit / GIB:.2f}: "
        + ("it fits" if d.fits else "IT DOES NOT FIT"),
    ]
    lines += [f"    {size / GIB:21.2f} GiB {name}" for name, size in d.memory.items() if size > 0.005 * GIB]
    for name in ("weights", "compute", "memory", "network"):
        seconds = getattr(d, f"{name}_seconds")
        shown = f"{1e3 * seconds:9.3f} ms" if seconds is not None else "  not known"
        lines.append(f"  {name:8s} {shown}" + ("   <- holds it back" if name == d.bound_by else ""))
    lines.append(f"  at most           {d.tokens_per_second:,.0f} tokens/s, {d.tokens_per_second / d.rows:,.0f} a row")
    return "\n".join([*lines, *(f"  note: {note}" for note in d.notes)])
