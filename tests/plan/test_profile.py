"""Where cycles go: the parts add up to the compiler's own total, and kernels are those that the compiled program calls."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from bothways.plan import hlo
from bothways.plan.own_kernels import NARROW_SHARE, device_flops, named, traced_kernels
from bothways.plan.profile import by_part, operations

PROGRAM = """HloModule made_up

FileNames
1 "/somewhere/model/layers.py"
2 "/somewhere/model/stack.py"

FunctionNames
1 "Norm.__call__"

FileLocations
1 {file_name_id=2 function_name_id=1 line=91 end_line=91 column=19 end_column=19}
2 {file_name_id=1 function_name_id=1 line=31 end_line=31 column=19 end_column=19}

StackFrames
3 {file_location_id=2 parent_frame_id=1}

%inner (p.0: f32[7,11]) -> f32[7,11] {
  %p.0 = f32[7,11]{1,0} parameter(0)
  ROOT %sum = f32[7,11]{1,0} add(%p.0, %p.0), metadata={op_name="jit(f)/blocks/mlp/up/add" stack_frame_id=3}
}

%body (state: (s32[], f32[7,11])) -> (s32[], f32[7,11]) {
  %state = (s32[], f32[7,11]{1,0}) parameter(0)
  %all = f32[7,11]{1,0} get-tuple-element(%state), index=1
  %up = f32[7,11]{1,0} fusion(%all), kind=kLoop, calls=%inner, backend_config={"estimated_cycles":"100"}
  %normed = f32[7,11]{1,0} multiply(%up, %up), metadata={op_name="jit(f)/blocks/mlp_norm/mul"}, backend_config={"estimated_cycles":"30"}
  %attended = f32[7,11] custom-call(%normed), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/blocks/attention/splash_mha_fwd_residuals"}
  %moved = f32[7,11]{1,0} copy(%attended), backend_config={"estimated_cycles":"2"}
  ROOT %next = (s32[], f32[7,11]{1,0}) tuple(%state, %moved)
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
  %rows = f32[7,11]{1,0} copy(%out), metadata={op_name="jit(f)/transpose(jvp(GPT))/embed/token/scatter-add"}, backend_config={"estimated_cycles":"3"}
  ROOT %total = f32[7,11]{1,0} add(%rows, %rows), metadata={op_name="jit(f)/add"}, backend_config={"estimated_cycles":"5"}
}
"""


def test_parts_add_up_to_the_compilers_own_count_and_the_kernels():
    found = list(operations(PROGRAM, 1, lambda scope: 1000.0 * ("splash" in scope)))
    parts = by_part(found)
    assert parts == {
        "attention": 7000,
        "MLP": 700,
        "norms": 210,
        "copies": 14,
        "optimizer and the rest": 5,
        "embedding": 3,
    }
    assert list(parts) == sorted(parts, key=parts.get, reverse=True)
    assert sum(parts.values()) == hlo.read(PROGRAM, 1).cycles + 7000
    up = next(o for o in found if o.name == "up")
    assert (up.times, up.source, up.scope) == (7, "model/layers.py:31", "jit(f)/blocks/mlp/up/add")
    assert up.memory == 7 * 2 * 7 * 11 * 4


@pytest.mark.parametrize("width", [64, 128])
def test_kernels_are_counted_as_the_compiled_program_calls_them(width):
    """A forward kernel whose result is saved stands in the trace still; heads narrower than 128 take four times as long."""
    heads, length = 2, 256
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.FullMask((length, length))] * heads)
    kernel = splash_attention_kernel.make_splash_mha(mask, head_shards=1, q_seq_shards=1)
    x = jax.ShapeDtypeStruct((heads, length, width), jnp.bfloat16)

    def loss(q, k, v):
        return jax.lax.scan(lambda y, _: (kernel(q, k, y), None), v, length=5)[0].astype(jnp.float32).sum()

    known = traced_kernels(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(x, x, x).jaxpr)
    forward = named("jit(step)/splash_mha_fwd_residuals", known)
    assert forward.calls == 5
    assert forward.flops == 2 * 2 * heads * length * length * width
    assert named("jit(step)/another", known) is None
    (scope, times), *others = hlo.read(PROGRAM, 1).kernels
    assert (others, times) == ([], 7)
    done, as_if = device_flops([(scope, times)], known)
    assert done == 7 * forward.flops
    assert as_if == done / (NARROW_SHARE if width < 128 else 1)
