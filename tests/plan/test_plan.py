"""Planning: what travels is read off a program, the roofline is arithmetic, layouts divide, a real step compiles."""

import dataclasses
import importlib.util
import json
import math
import types

import jax
import jax.numpy as jnp
import pytest

import bothways
from bothways import sharding
from bothways.chips import CHIPS, Topology
from bothways.config import MeshConfig
from bothways.configs import find
from bothways.errors import InputError
from bothways.flops import recipe_flops_per_token
from bothways.plan import hlo
from bothways.plan.candidates import candidates, flags, guess, held, meshes, parameter_axes, rate, with_ramp
from bothways.plan.roofline import between_slices, collective_seconds
from bothways.plan.training import plan, search, with_vocabulary

pytestmark = pytest.mark.usefixtures("compiled_well")

# A loop of 7 turns that gathers 3 x 5 bfloat16 from 2 x 2 devices, and a reduction outside; written as a TPU's compiler
# writes: the gather appears again in a fusion that it overlaps with, a kernel describes itself over several lines, and
# memory space 1 is on the chip.
PROGRAM = """HloModule made_up

%overlap (p.0: bf16[3,5]) -> bf16[12,5] {
  %p.0 = bf16[3,5]{1,0} parameter(0)
  ROOT %gather.2 = bf16[12,5]{1,0} all-gather(%p.0), channel_id=3, replica_groups=[1,4]<=[4], dimensions={0}
}

%all-reduce-scatter (p.1: f32[8]) -> f32[2] {
  %p.1 = f32[8]{0} parameter(0)
  %sum.1 = f32[8]{0} all-reduce(%p.1), channel_id=4, replica_groups={{0,2},{1,3}}, to_apply=%add
  ROOT %mine = f32[4]{0} dynamic-slice(%sum.1, %p.1), dynamic_slice_sizes={4}
}

%body (state: (s32[], f32[7,11])) -> (s32[], f32[7,11]) {
  %state = (s32[], f32[7,11]{1,0}) parameter(0)
  %all = f32[7,11]{1,0} get-tuple-element(%state), index=1
  %gather.1 = bf16[12,5]{1,0} all-gather(%all), channel_id=3, replica_groups=[1,4]<=[4], dimensions={0}
  %again = bf16[12,5]{1,0} fusion(%gather.1), kind=kLoop, calls=%overlap, backend_config={"estimated_cycles":"100"}
  %kernel = f32[13]{0:T(8)S(1)} custom-call(%again), custom_call_target="tpu_custom_call", frontend_attributes={meta={
"about": "itself"
}}, metadata={op_name="kernel"}
  %scattered = f32[4]{0} fusion(%kernel), kind=kCustom, calls=%all-reduce-scatter
  %slice = f32[1,11]{1,0} dynamic-slice(%all, %again), dynamic_slice_sizes={1,11}
  ROOT %next = (s32[], f32[7,11]{1,0}) tuple(%state, %all)
}

%condition (state.1: (s32[], f32[7,11])) -> pred[] {
  %state.1 = (s32[], f32[7,11]{1,0}) parameter(0)
  %turn = s32[] get-tuple-element(%state.1), index=0
  %end = s32[] constant(7)
  ROOT %more = pred[] compare(%turn, %end), direction=LT
}

ENTRY %main (x: f32[7,11]) -> f32[7,11] {
  %x = f32[7,11]{1,0} parameter(0)
  %loop = (s32[], f32[7,11]{1,0}) while(%x), condition=%condition, body=%body
  %out = f32[7,11]{1,0} get-tuple-element(%loop), index=1
  ROOT %total = f32[7,11]{1,0} all-reduce(%out), channel_id=5, GROUPS, to_apply=%add
}
""".replace("GROUPS", "replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}")


def test_what_travels_is_counted_as_often_as_the_loop_turns():
    traffic = hlo.read(PROGRAM, 4)
    found = {(c.kind, c.bytes, c.group, c.times) for c in traffic.collectives}
    assert found == {
        ("all-gather", 12 * 5 * 2, (0, 1, 2, 3), 7),
        ("reduce-scatter", 8 * 4, (0, 2), 7),
        ("all-reduce", 7 * 11 * 4, (0, 1), 1),
    }
    assert traffic.cycles == 700
    assert traffic.endless == 0
    assert hlo.read(PROGRAM.replace("constant(7)", "constant(9)"), 4).cycles == 900


def test_memory_counts_what_leaves_the_chip():
    inside = 308 + 120  # the gather reads all, writes 12 x 5
    inside += 120 + 120 + 120  # the fusion reads and writes; the kernel reads, and writes to memory space 1
    inside += 0 + 16 + 2 * 44  # the scatter reads that and writes; the slice reads and writes one row
    assert hlo.read(PROGRAM, 4).memory == 7 * inside + 2 * 308


def test_what_is_written_in_place_is_neither_read_nor_written_whole():
    """As a cache is: one place of a large array is read, changed and put back."""
    text = """HloModule made_up

%change (p.0: f32[64,7], p.1: s32[]) -> f32[64,7] {
  %p.0 = f32[64,7]{1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %old = f32[1,7]{1,0} dynamic-slice(%p.0, %p.1), dynamic_slice_sizes={1,7}
  %new = f32[1,7]{1,0} add(%old, %old)
  ROOT %put = f32[64,7]{1,0} dynamic-update-slice(%p.0, %new, %p.1)
}

ENTRY %main (x: f32[64,7], i: s32[]) -> f32[64,7] {
  %x = f32[64,7]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %changed = f32[64,7]{1,0} fusion(%x, %i), kind=kLoop, calls=%change
}
"""
    assert hlo.read(text, 1).memory == 28 + 28 + 4
    whole = """%whole (p.2: f32[64,7], p.3: s32[]) -> f32[64,7] {
  %p.2 = f32[64,7]{1,0} parameter(0)
  %p.3 = s32[] parameter(1)
  %seen = f32[64,7]{1,0} bitcast(%p.2)
  ROOT %inner = f32[64,7]{1,0} fusion(%seen, %p.3), kind=kLoop, calls=%change
}

ENTRY"""
    nested = text.replace("ENTRY", whole).replace(
        "(%x, %i), kind=kLoop, calls=%change", "(%x, %i), kind=kLoop, calls=%whole"
    )
    room = '  %room = f32[64,7]{1,0} custom-call(), custom_call_target="AllocateBuffer"\n  ROOT %changed'
    assert hlo.read(nested.replace("  ROOT %changed", room), 1).memory == 28 + 28 + 4


def test_loops_without_an_end_are_told():
    text = PROGRAM.replace("direction=LT", "direction=NE")
    assert hlo.read(text, 4).endless == 1
    known = text.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}')
    assert (hlo.read(known, 4).endless, hlo.read(known, 4).cycles) == (0, 500)


def test_a_compiled_loop_is_read_as_it_runs(eight_devices):
    """The same on a program of this machine's own compiler: a scan that reduces over the devices 5 times."""
    mesh = jax.make_mesh((8,), ("x",), devices=eight_devices, axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.NamedSharding(mesh, jax.P("x"))

    def loop(x):
        def turn(carry, _):
            return carry + jax.lax.psum(carry, "x"), None

        return jax.lax.scan(turn, x, length=5)[0]

    mapped = jax.shard_map(loop, mesh=mesh, in_specs=jax.P("x"), out_specs=jax.P("x"), check_vma=False)
    compiled = jax.jit(mapped).lower(jax.ShapeDtypeStruct((8, 13), jnp.float32, sharding=spread)).compile()
    (found,) = hlo.read(compiled.as_text(), 8).collectives
    assert (found.kind, found.bytes, len(found.group), found.times) == ("all-reduce", 13 * 4, 8, 5)


def at(*coords, slice_index=0):
    return types.SimpleNamespace(id=0, coords=coords, slice_index=slice_index)


def test_collective_seconds():
    v5e = Topology.parse("v5e:16x16")
    link = CHIPS["v5e"].link
    ring = [at(0, y, 0) for y in range(16)]
    part = [at(0, y, 0) for y in range(4)]
    plane = [at(x, y, 0) for x in range(16) for y in range(16)]
    strided = [at(0, y, 0) for y in range(0, 16, 4)]

    def seconds(kind, devices):
        return collective_seconds(hlo.Collective(kind, 1e9, tuple(range(len(devices))), 1), v5e, devices)

    assert seconds("all-gather", ring) == pytest.approx(1e9 * 15 / 16 / (2 * link))
    assert seconds("all-reduce", ring) == pytest.approx(2 * seconds("reduce-scatter", ring))
    assert seconds("all-gather", part) == pytest.approx(1e9 * 3 / 4 / link)  # a line, not a ring
    assert seconds("all-gather", plane) == pytest.approx(1e9 * 255 / 256 / (4 * link))
    assert seconds("all-gather", strided) == pytest.approx(1e9 * 3 / 4 / (2 * link / 4))
    two = Topology.parse("v5e:4x4", slices=2)
    across = [at(0, 0, 0, slice_index=i) for i in range(2)]
    over = collective_seconds(hlo.Collective("all-reduce", 1e9, (0, 1), 1), two, across)
    assert over == pytest.approx(2 * 1e9 / 2 / CHIPS["v5e"].network)
    assert between_slices(two, 1e9)["seconds"] == pytest.approx(over)


def test_topologies():
    assert Topology.parse("v5e-256") == Topology.parse("v5litepod-256") == Topology.parse("v5e:16x16")
    assert Topology.parse("v4-32").shape == (2, 2, 4)
    assert Topology.parse("cpu-8") == Topology.parse("cpu:8")
    assert Topology.parse("v5p:8x8x8").accelerator_type == "v5p-1024"
    assert Topology.parse("7x:4x4x4").devices_count == 128
    assert Topology.parse("v6e:4x4", slices=3).chips == 48
    assert [Topology.parse("v5e:4x16").wraps(i) for i in range(2)] == [False, True]
    assert Topology.parse("v5p:4x4x8").wraps(0)
    assert not Topology.parse("v5p:2x4x4").wraps(1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("v5e", "such as v5e:16x16"),
        ("v9:4x4", "no chip 'v9'"),
        ("v5e:4x4x4", "dimensions"),
        ("v5p:3x4x4", "even"),
        ("v5e:32x32", "at most 16"),
        ("v5e-48", "no slice of 48"),
    ],
)
def test_a_topology_that_cannot_be_is_refused(text, said):
    with pytest.raises(InputError, match=said):
        Topology.parse(text)


@pytest.fixture(scope="module")
def planned(tiny_recipe):
    recipe = dataclasses.replace(tiny_recipe, model=dataclasses.replace(tiny_recipe.model, d_model=24))
    return dataclasses.replace(recipe, mesh=MeshConfig(data=2, fsdp=4))


def test_plan_of_a_real_step(planned, eight_devices):
    """On this machine's CPU: memory and FLOPs from the compiled step against the same numbers counted by hand."""
    p = plan(planned, Topology.parse("cpu:8"))
    assert p.fits
    assert {name: size for name, size in p.mesh.items() if size > 1} == {"data": 2, "fsdp": 4}
    model = dataclasses.replace(planned.model, vocab_size=planned.data.vocab_size)
    axes = parameter_axes(dataclasses.replace(planned, model=model))
    assert p.parameters == sum(math.prod(shape) for shape, _ in axes)
    mine = held(axes, {"data": 2, "fsdp": 4, "tensor": 1, "context": 1})
    assert p.memory["parameters"] == 4 * mine
    assert p.memory["optimizer"] == pytest.approx(8 * mine / 2, rel=0.02)  # two moments over `data` too, and counters
    assert p.flops_per_step == recipe_flops_per_token(dataclasses.replace(planned, model=model)) * 8 * 16
    assert p.executed_flops > 0.9 * p.flops_per_step
    assert p.step_seconds == max(p.compute_seconds, p.memory_seconds, p.network_seconds)
    assert p.mfu_bound == pytest.approx(p.flops_per_step / p.step_seconds / (8 * 1e12))
    # Every gradient is summed over the devices that share a parameter, whatever XLA calls it.
    reduced = sum(c["bytes"] for c in p.collectives if c["kind"] in ("all-reduce", "reduce-scatter"))
    assert reduced >= 4 * mine
    assert p.days == pytest.approx(planned.train.steps * p.step_seconds / 86_400)


def test_the_best_layout_is_found_and_can_be_asked_for(planned, eight_devices):
    free = dataclasses.replace(planned, mesh=MeshConfig())
    best = search(free, Topology.parse("cpu:8"), lambda _: None, tries=1)[0]
    ranked = candidates(with_vocabulary(free), Topology.parse("cpu:8"))
    assert best.fits
    assert best.flags == flags(with_vocabulary(free), ranked[0].recipe)
    assert "--mesh.data" in best.flags


def test_layouts_divide():
    recipe, topology = find("gpt2_xl"), Topology.parse("v5e:16x16")
    for found in candidates(recipe, topology):
        sizes = found.recipe.mesh.sizes(256)
        found.recipe.check(256)
        assert 1600 % sizes["fsdp"] == 0
        assert 25 % sizes["tensor"] == 0
    assert all(math.prod(sizes.values()) == 256 for sizes in meshes(topology))
    assert all(sizes["data"] % 2 == 0 for sizes in meshes(Topology.parse("v5e:4x4", slices=2)))


def test_a_vocabulary_is_padded_only_where_it_must_be_and_says_so():
    recipe = dataclasses.replace(find("gpt3_175b"), mesh=MeshConfig(data=1, fsdp=64, tensor=8))
    found = candidates(recipe, Topology.parse("v5p:8x8x8"))
    assert found
    assert all("--model.pad-vocab-to-multiple-of 128" in flags(recipe, g.recipe) for g in found)
    whole = candidates(dataclasses.replace(recipe, mesh=MeshConfig(data=8, fsdp=64)), Topology.parse("v5p:8x8x8"))
    assert all(g.recipe.model.pad_vocab_to_multiple_of == 1 for g in whole)


def test_more_pieces_and_more_recomputing_take_less_memory():
    recipe, topology = find("gpt2_xl"), Topology.parse("v5e:16x16")
    sizes = {"data": 16, "fsdp": 16, "tensor": 1}

    def memory(remat, accumulate):
        model = dataclasses.replace(recipe.model, remat=remat)
        train = dataclasses.replace(recipe.train, grad_accum_steps=accumulate)
        return guess(dataclasses.replace(recipe, model=model, train=train), topology, sizes, 1e8).memory

    assert memory("none", 1) > memory("dots", 1) > memory("full", 1) > memory("full", 2)


def test_more_pieces_take_more_time_and_a_group_of_all_has_every_link():
    recipe, topology = find("gpt2_small"), Topology.parse("v5e:2x2")
    sizes = {"data": 4, "fsdp": 1, "tensor": 1}

    def seconds(accumulate):
        train = dataclasses.replace(recipe.train, grad_accum_steps=accumulate)
        return guess(dataclasses.replace(recipe, train=train), topology, sizes, 1.2e8).seconds

    assert seconds(2) < seconds(16) < seconds(128)
    v5e, v4 = Topology.parse("v5e:16x16"), Topology.parse("v4:2x2x4")
    assert rate(v5e, 1) == math.inf
    assert rate(v5e, 256) == pytest.approx(256 / 255 * 4 * CHIPS["v5e"].link)  # two rings, both ways round each
    assert rate(v5e, 4) == pytest.approx(4 / 3 * 2 * CHIPS["v5e"].link)
    assert rate(v4, 16) == pytest.approx(16 / 15 * 3 * CHIPS["v4"].link)  # three lines


def test_the_flags_that_are_told_give_the_layout_that_was_planned():
    from bothways.commands.plan import PlanOptions
    from bothways.commands.shared import parse_recipe

    for name in ("gpt2_xl", "gpt3_175b"):
        recipe, topology = find(name), Topology.parse("v5p:8x8x8")
        best = candidates(recipe, topology)[0].recipe
        said = flags(recipe, best).split()
        assert parse_recipe("plan", [name, "--topology", "v5p:8x8x8", *said], PlanOptions, "")[0] == best
        back = flags(best, dataclasses.replace(recipe, mesh=best.mesh))
        assert "--model.no-scan-layers" in back or best.model.scan_layers == recipe.model.scan_layers


def test_a_ramp_that_begins_higher_ends_after_as_many_rows():
    recipe = find("gpt3_13b")
    with pytest.raises(InputError, match=r"a batch of 16 rows .* set --train.batch-size-start to a multiple of 128"):
        dataclasses.replace(recipe, mesh=MeshConfig(fsdp=128)).check(128)
    raised = with_ramp(recipe, 128)
    dataclasses.replace(raised, mesh=MeshConfig(fsdp=128)).check(128)
    assert all(size % 128 == 0 for _, _, size in raised.train.stages())
    for before, after in [
        (recipe.train.steps, raised.train.steps),
        (recipe.optimizer.warmup_steps, raised.optimizer.warmup_steps),
    ]:
        rows = recipe.train.batch_at(before)[0]
        assert 0 <= raised.train.batch_at(after)[0] - rows < recipe.train.batch_size


def test_a_mesh_that_cannot_hold_the_model_is_refused(planned, eight_devices):
    bad = dataclasses.replace(planned, mesh=MeshConfig(data=1, tensor=8))
    with pytest.raises(InputError, match="not divisible by mesh"):
        plan(bad, Topology.parse("cpu:8"))
    with pytest.raises(InputError, match="cannot be laid out"):
        search(dataclasses.replace(planned, mesh=MeshConfig()), Topology.parse("v5e:16x16"), lambda _: None)


@pytest.mark.parametrize(
    ("section", "field", "value", "said"),
    [
        ("optimizer", "learning_rate", -1.0, "learning_rate is -1"),
        ("model", "n_heads", 0, "n_heads is 0"),
        ("", "", 0, "libtpu, which is not installed"),
        ("", "", 0, "a torus that cannot be cut so"),
    ],
)
def test_a_search_that_finds_nothing_says_why(planned, eight_devices, monkeypatch, section, field, value, said):
    def fails(*_):
        raise NotImplementedError("a torus that cannot be cut so")

    recipe = dataclasses.replace(planned, mesh=MeshConfig())
    if section:
        recipe = dataclasses.replace(recipe, **{section: dataclasses.replace(getattr(recipe, section), **{field: value})})
    topology = Topology.parse("v5e:2x2" if "libtpu" in said else "cpu:8")
    monkeypatch.setattr("bothways.plan.training.plan", fails)
    monkeypatch.setattr("bothways.chips.importlib.util.find_spec", lambda _: None)
    output = []
    with pytest.raises(InputError, match=said):
        search(recipe, topology, output.append)
    assert bool(output) == ("torus" in said)


def test_the_command_line_plans(tmp_path, capfd, eight_devices):
    argv = ["plan", "shakespeare_gpt", "--topology", "cpu:8", "--model.n-layers", "1", "--model.context-length", "16"]
    argv += ["--data.vocab-size", "320", "--model.d-model", "16", "--optimizer.name", "adamw"]
    assert bothways.main([*argv, "--no-decode", "--json"]) == 0
    output = json.loads(capfd.readouterr().out)
    wanted = "recipe topology mesh chips fits memory_per_chip memory_limit flops_per_step step_seconds mfu_bound "
    assert set((wanted + "tokens_per_second collectives").split()) <= set(output)
    assert bothways.main(["plan", "shakespeare_gpt", "--topology", "v5e:5x5"]) == 2
    assert "even" in capfd.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install '.[plan]'")
@pytest.mark.parametrize("topology", ["v5e:2x2", "v4:2x2x1", "7x:2x2x1"])
def test_plan_for_a_tpu_that_is_not_here(planned, topology):
    where = Topology.parse(topology)
    recipe = dataclasses.replace(planned, mesh=MeshConfig(data=-1, fsdp=2))
    p = plan(recipe, where)
    assert p.fits
    assert p.memory_limit == where.chip.memory
    assert any(c["kind"] in ("all-gather", "all-reduce", "reduce-scatter") for c in p.collectives)
    assert sharding.make_mesh(recipe.mesh, where.devices()).size == where.devices_count
