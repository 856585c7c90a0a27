"""The verbs that take a recipe beyond this machine: `plan`, before any chip is rented, and `launch`."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from common.errors import InputError
from common.recipe import Recipe
from configs import find
from verbs_shared import emit, say

GIB = 2**30


def _parse(verb: str, argv: list[str], options: type, example: str) -> tuple[Recipe, Any]:
    """The recipe with the fields that were set, and the verb's own options."""
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        raise InputError(f"{verb} wants a recipe first: {example}")
    if argv[0] in ("-h", "--help"):
        print(f"usage: bothways {verb} RECIPE ... [--SECTION.FIELD VALUE ...]\n\n{options.__doc__}\n\n{example}")
        raise SystemExit(0)
    base = find(argv[0])
    fields: list[Any] = [("recipe", Annotated[Recipe, tyro.conf.arg(name="")], dataclasses.field(default=base))]
    arguments = dataclasses.make_dataclass(
        "Arguments", fields, bases=(options,), frozen=True, kw_only=True, namespace={"__doc__": options.__doc__}
    )
    given = tyro.cli(arguments, prog=f"bothways {verb} {argv[0]}", args=argv[1:])
    return given.recipe, given


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What a recipe would need on chips that are not here: memory, what travels, and how fast it can be at best."""

    topology: str
    """Chips, such as v5e:16x16, v4:2x2x4, v5p:4x4x8, v6e:8x8, 7x:4x4x4; or an accelerator type, such as v5e-256."""
    slices: int = 1
    """So many slices, joined by the data-centre network."""
    search: bool = False
    """Compile several layouts (mesh, pieces of a batch, what is recomputed) and recommend the best."""
    decode: bool = True
    """Plan sampling too: the decoding step, or the reading of a masked model, on as few of these chips as hold it."""
    rows: int = 16
    """Rows that are decoded together, each as long as the context."""
    json: bool = False
    """Print one JSON object, the decoding step's under `decode`; with --search one per layout, the best first."""


def plan(argv: list[str]) -> None:
    """Compile a recipe's train step and its decoding step for a topology, and tell what they would need."""
    recipe, options = _parse("plan", argv, PlanOptions, "bothways plan gpt2_xl --topology v5e:16x16 [--search]")
    from common.config import MeshConfig
    from plan import training as planning
    from plan.decoding import plan_decoding
    from train.chips import Topology

    if options.rows < 1:
        raise InputError(f"--rows is {options.rows}; at least 1 row is decoded")
    topology = Topology.parse(options.topology, options.slices)
    if options.search:
        plans = planning.search(recipe, topology, say)
    elif recipe.mesh == MeshConfig():
        plans = planning.search(recipe, topology, say, tries=1)
    else:
        plans = [planning.plan(recipe, topology)]
        if not plans[0].fits:
            say("it does not fit; looking for a layout that does")
            free = dataclasses.replace(recipe, mesh=MeshConfig())
            try:
                fitting = planning.search(free, topology, say, tries=1)[0].flags
                plans[0] = dataclasses.replace(plans[0], notes=(*plans[0].notes, f"this fits: {fitting}"))
            except InputError as e:
                plans[0] = dataclasses.replace(plans[0], notes=(*plans[0].notes, str(e)))
    decoded = None
    if options.decode:
        say("compiling the step that samples")
        try:
            decoded = plan_decoding(recipe, topology, options.rows)
        except InputError as e:
            say(str(e))
    for p in plans if options.json else plans[:1]:
        both = dataclasses.asdict(p) | {"decode": decoded and dataclasses.asdict(decoded)}
        emit(both, options.json, shown(p) + (f"\n{shown_decoding(decoded)}" if decoded else ""))


def shown(p: Any) -> str:
    """A plan for people."""
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
        told = f"{seconds:9.4f} s" if seconds is not None else "  not known"
        lines.append(f"  {name:8s} {told}" + ("   <- holds it back" if name == p.bound_by else ""))
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


def shown_decoding(d: Any) -> str:
    """The plan of a step that samples, for people."""
    mesh = " x ".join(f"{name} {size}" for name, size in d.mesh.items() if size > 1)
    what = "decoding step" if d.step == "decode" else "reading"
    lines = [
        f"{what} of {d.rows} rows of {d.context}: {d.chips} chip{'s' if d.chips > 1 else ''}{f', {mesh}' if mesh else ''}",
        f"  memory per chip   {d.memory_per_chip / GIB:7.2f} GiB of {d.memory_limit / GIB:.2f}: "
        + ("it fits" if d.fits else "IT DOES NOT FIT"),
    ]
    lines += [f"    {size / GIB:21.2f} GiB {name}" for name, size in d.memory.items() if size > 0.005 * GIB]
    for name in ("weights", "compute", "memory", "network"):
        seconds = getattr(d, f"{name}_seconds")
        told = f"{1e3 * seconds:9.3f} ms" if seconds is not None else "  not known"
        lines.append(f"  {name:8s} {told}" + ("   <- holds it back" if name == d.bound_by else ""))
    lines.append(f"  at most           {d.tokens_per_second:,.0f} tokens/s, {d.tokens_per_second / d.rows:,.0f} a row")
    return "\n".join([*lines, *(f"  note: {note}" for note in d.notes)])


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """Start a recipe elsewhere through a launcher that is there already; it resumes by itself when it is preempted."""

    on: Literal["tpu", "gke", "sky", "slurm"]
    """tpu: a queued resource of Cloud TPU; gke: a JobSet; sky: a managed job of SkyPilot; slurm: sbatch."""
    topology: str
    """TPUs, such as v5e-256 or v5p:4x4x8; with sky and slurm also GPUs, such as h100:4x8, 4 nodes of 8."""
    bucket: str = ""
    """gs://BUCKET[/PATH], or for slurm a shared directory: code, recipe and run directory go to NAME in it."""
    slices: int = 1
    """So many TPU slices."""
    job: str = ""
    """Name of the job; the recipe's by default. The same name goes on with the same run."""
    spot: bool = False
    """Cheaper machines that may be taken away."""
    project: str = ""
    """Google Cloud project (tpu)."""
    zone: str = ""
    """Google Cloud zone (tpu, sky)."""
    partition: str = ""
    """Slurm partition."""
    hours: int = 24
    """Slurm time limit, after which the job goes back into the queue."""
    dry_run: bool = False
    """Print files and commands; write and run nothing."""
    json: bool = False
    """Print one JSON object."""


def launch(argv: list[str]) -> None:
    """Start a recipe on a slice or a cluster."""
    example = "bothways launch gpt2_small --on tpu --topology v5e-16 --bucket gs://NAME --project P --zone Z [--dry-run]"
    recipe, o = _parse("launch", argv, LaunchOptions, example)
    from launch.start import prepare, start

    names = ("bucket", "slices", "spot", "project", "zone", "partition", "hours")
    job, ready = prepare(recipe, o.on, o.topology, name=o.job, **{name: getattr(o, name) for name in names})
    folder = Path("launches") / job.name
    done = start(o.on, job, ready, folder, dry_run=o.dry_run)
    if o.dry_run and not o.json:
        for name, text in done.files.items():
            print(f"# ---- {folder}/{name}\n{text.rstrip()}\n")
        print(f"# ---- in {folder}, which also holds {job.code_name}, this tree")
        print("\n".join(done.commands))
    emit(done, o.json, f"# the run: {done.workdir}\n# to stop: {done.stop}")
