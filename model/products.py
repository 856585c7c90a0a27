"""Matrix products as each backend runs them fastest: the one place, beside kernels.py, that knows the device.

cpu  One plain product of two matrices: XLA copies and transposes where it sees more axes. Of few rows a product takes as
     long as reading the matrix, and XLA reads it faster in a batch of parts. In bfloat16 its sums are float32, and only one
     form of a product is fast.
tpu  Heads as wide as the matrix unit are written and read in the order [B, H, T, K] that kernels want: a product that
     goes by [B, T, H K] is copied into it and out of it. Norms take one pass over x.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Float

from bothways.model.axes import devices_in_use, platform

CPU_SPLITS = 8
"""Of a matrix that few rows go through, on a CPU."""
LANES = 128
"""Columns of a TPU's matrix unit."""


def _is_memory_bound(x: jax.Array, most: int) -> bool:
    """Whether rows [..., D] lie on a CPU and are so few that their product takes as long as reading the matrix."""
    return 0 < math.prod(x.shape[:-1]) <= most and x.dtype == jnp.float32 and platform() == "cpu"


def product(x: Float[jax.Array, "N D"], kernel: Float[jax.Array, "D F"]) -> Float[jax.Array, "N F"]:
    """x @ kernel."""
    if x.shape[1] % CPU_SPLITS or not _is_memory_bound(x, 1):
        return contract("nd,df->nf", x, kernel)
    return jnp.einsum("pd,pdf->pf", x.reshape(CPU_SPLITS, -1), kernel.reshape(CPU_SPLITS, -1, kernel.shape[1])).sum(
        0, keepdims=True
    )


def contract(equation: str, a: jax.Array, b: jax.Array, result: Any = None) -> jax.Array:
    """einsum of two arrays; of bfloat16 on a CPU summed in float32, and so are its gradients.

    Args:
      equation: without an ellipsis; every index of one array is one of the other's or of the result's.
      result: type of the result; None: that of the two.
    """
    if a.dtype == b.dtype == jnp.bfloat16 and platform() == "cpu":
        return _summed_in_float32(equation, a, b).astype(result or a.dtype)
    return jnp.einsum(equation, a, b, preferred_element_type=result)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed_in_float32(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """A product of bfloat16 that gives float32; its gradients are such products too. Autodiff would multiply a gradient in
    float32 with a bfloat16, which is a product in float32."""
    return _matrix_product(equation, a, b)


def _gradients(equation: str, kept: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    (of_a, of_b), of_y = equation.split("->")[0].split(","), equation.split("->")[1]
    a, b = kept
    dy = dy.astype(a.dtype)
    d_a = _matrix_product(f"{of_y},{of_b}->{of_a}", dy, b)
    d_b = _matrix_product(f"{of_a},{of_y}->{of_b}", a, dy)
    return d_a.astype(a.dtype), d_b.astype(b.dtype)


_summed_in_float32.defvjp(lambda equation, a, b: (_summed_in_float32(equation, a, b), (a, b)), _gradients)


def _matrix_product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """einsum of two bfloat16 arrays on a CPU, in float32."""
    if devices_in_use() > 1:
        return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
    return _ordered_product(equation, a, b)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _ordered_product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """The same on one device, in the one form in which XLA's CPU kernels multiply bfloat16: [B, M, C] by [B, C, N] or [B, N, C],
    each in memory in the order of its indices. Everything else, gradients of weights among them, XLA converts to float32 and
    multiplies in twice the time. Of two operands that are both in the way, the smaller one is transposed."""
    (of_a, of_b), of_y = equation.split("->")[0].split(","), equation.split("->")[1]
    batch = [i for i in of_a if i in of_b and i in of_y]
    summed = [i for i in of_a if i in of_b and i not in of_y]
    if of_a[-1] not in summed and (of_b[-1] in summed or a.size > b.size):
        a, b, of_a, of_b = b, a, of_b, of_a
    rows, columns = ([i for i in one if i not in (*batch, *summed)] for one in (of_a, of_b))
    size = dict(zip((*of_a, *of_b), (*a.shape, *b.shape), strict=True))
    inner, outer = (summed, columns) if of_b[-1] not in summed else (columns, summed)

    def ordered(x: jax.Array, now: str, *groups: list[str]) -> jax.Array:
        x = x.transpose([now.index(i) for group in groups for i in group])
        return _row_major(x.reshape([math.prod(size[i] for i in group) for group in groups]))

    left, right = ordered(a, of_a, batch, rows, summed), ordered(b, of_b, batch, inner, outer)
    dims = (((2,), (1 if inner is summed else 2,)), ((0,), (0,)))
    y = _row_major(jax.lax.dot_general(left, right, dims, preferred_element_type=jnp.float32))
    found = [*batch, *rows, *columns]
    return y.reshape([size[i] for i in found]).transpose([found.index(i) for i in of_y])


def _row_major(x: jax.Array) -> jax.Array:
    """x in memory in the order of its indices. XLA decides whether it can multiply by the order it sees, which `transpose` only notes
    down; the barrier keeps it from taking the transpose into the product."""
    return jax.lax.optimization_barrier(with_layout_constraint(x, Layout(tuple(range(x.ndim)))))


def add_bias(y: Float[jax.Array, "..."], bias: Float[jax.Array, "..."]) -> Float[jax.Array, "..."]:
    """y + bias in y's type. On a CPU they are added in float32, so that the bias's gradient is summed in it: in bfloat16 those sums took a
    fifth of a small GPT's step. On a TPU that would cost GPT-2 XL four points of its expected MFU; there the biases of narrow heads are added
    before the heads are taken apart, and their gradients are products."""
    if platform() == "cpu":
        return (y.astype(jnp.float32) + bias).astype(y.dtype)
    if platform() == "tpu" and bias.ndim == 2 and bias.shape[-1] % LANES:
        flat = y.reshape(*y.shape[:-2], -1)
        return _biased(flat, bias.reshape(-1)).reshape(y.shape)
    return y + bias.astype(y.dtype)


@jax.custom_vjp
def _biased(y: Float[jax.Array, "B T F"], bias: Float[jax.Array, " F"]) -> Float[jax.Array, "B T F"]:
    """y + bias in y's type; the bias's gradient is summed by the matrix unit, in float32."""
    return y + bias.astype(y.dtype)


def _sums(_: None, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    ones = jnp.ones((8, *dy.shape[:-1]), dy.dtype)  # of one row alone XLA would make a sum again
    axes = tuple(range(dy.ndim - 1))
    sums = jax.lax.dot_general(
        ones, dy, ((tuple(a + 1 for a in axes), axes), ((), ())), preferred_element_type=jnp.float32
    )
    return dy, sums[0]


_biased.defvjp(lambda y, bias: (_biased(y, bias), None), _sums)


def elementwise(fn: Callable[..., jax.Array], *x: jax.Array) -> jax.Array:
    """fn(*x), arrays of one type, in that type. bfloat16 on a CPU is computed in float32, since there every operation of bfloat16 converts
    to it and back; the backward pass keeps x alone, and computes the rest again."""
    if x[0].dtype != jnp.bfloat16 or platform() != "cpu":
        return fn(*x)
    return jax.checkpoint(lambda *x: fn(*(one.astype(jnp.float32) for one in x)).astype(jnp.bfloat16))(*x)


def gelu(x: jax.Array) -> jax.Array:
    """x Phi(x), Phi the normal distribution's (arXiv 1606.08415). Of a bfloat16 on a TPU as `_gelu_of_exp`: erfc, which XLA computes as
    two rational functions and a choice between them, took 15 % of the cycles of BERT-large's MLP."""
    if x.dtype == jnp.bfloat16 and platform() == "tpu":
        return _gelu_of_exp(x.astype(jnp.float32)).astype(jnp.bfloat16)
    return jax.nn.gelu(x, approximate=False)


def _normal(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Phi(x) and exp(-x^2 / 2), of a float32: Abramowitz and Stegun, formula 7.1.26, within 1e-7."""
    t = 1 / (1 + 0.3275911 * 0.5**0.5 * jnp.abs(x))
    density = jnp.exp(-0.5 * jnp.square(x))
    polynomial = functools.reduce(
        lambda sum, c: (sum + c) * t, (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592), 0.0
    )
    tail = 0.5 * polynomial * density
    return jnp.where(x < 0, tail, 1 - tail), density


@jax.custom_jvp
def _gelu_of_exp(x: Float[jax.Array, "..."]) -> Float[jax.Array, "..."]:
    """GELU of a float32, within 5e-7 and, above -5, within 0.2 % of itself, which is half of a bfloat16's last bit."""
    return x * _normal(x)[0]


@_gelu_of_exp.defjvp
def _gelu_tangent(x: tuple[jax.Array], dx: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    below, density = _normal(x[0])
    return x[0] * below, (below + x[0] * density * (2 * math.pi) ** -0.5) * dx[0]


def project(x: Float[jax.Array, "..."], kernel: Float[jax.Array, "..."], n_in: int) -> Float[jax.Array, "..."]:
    """x [B, T, *in] through a kernel [*in, *features], over the last `n_in` axes of x: [B, T, *features]."""
    heads = kernel.shape[:-1] if n_in == 2 else kernel.shape[1:]
    if platform() == "tpu" and len(heads) == 2 and heads[1] % LANES == 0 and x.ndim == n_in + 2:
        if n_in == 2:
            return jnp.einsum("bhtk,hkd->btd", x.swapaxes(1, 2), kernel)
        return jnp.einsum("btd,dhk->bhtk", x, kernel).swapaxes(1, 2)
    outer, width = x.shape[: x.ndim - n_in], math.prod(kernel.shape[:n_in])
    flat = kernel.reshape(width, -1)
    if platform() == "tpu" and kernel.ndim == 3:  # or its gradient is written as narrow heads, in twice the time
        flat = jax.lax.optimization_barrier(flat)
    y = product(x.reshape(-1, width), flat)
    return y.reshape(*outer, *kernel.shape[n_in:])


def transpose_kernels(params: dict) -> dict:
    """Parameters that `unstack_layers` joined, for batches of few rows on one CPU: the float32 matrices of its layers as
    `kernel_t` [F, D], of which a product of 8 rows takes half as long as of [D, F]. Everything else stays as it is."""

    def layer(name: str, inner: Any) -> Any:
        if not isinstance(inner, dict):
            return inner
        kernel = inner.get("kernel")
        if name not in ("qkv", "out", "up", "gate", "down") or kernel is None or kernel.dtype != jnp.float32:
            return {name: layer(name, one) for name, one in inner.items()}
        flat = kernel.reshape(-1, kernel.shape[-1])  # `out` has two axes of inputs, the others one of each
        return {"kernel_t": flat.T} | {name: x for name, x in inner.items() if name != "kernel"}

    def ready(name: str, inner: Any) -> Any:
        if name == "blocks" and isinstance(inner, tuple):
            return tuple(layer("", one) for one in inner)
        return {name: ready(name, one) for name, one in inner.items()} if isinstance(inner, dict) else inner

    return ready("", params)


def project_transposed(
    x: Float[jax.Array, "..."], kernel_t: Float[jax.Array, "F D"], n_in: int, features: tuple[int, ...]
) -> Float[jax.Array, "..."]:
    """As `project`, with the matrix as `transpose_kernels` made it."""
    outer, (F, D) = x.shape[: x.ndim - n_in], kernel_t.shape
    rows = x.reshape(-1, D)
    if F % CPU_SPLITS or not _is_memory_bound(rows, 32):
        y = jnp.einsum("nd,fd->nf", rows, kernel_t)
    else:
        each = jnp.broadcast_to(rows, (CPU_SPLITS, *rows.shape))
        y = jnp.einsum("pnd,pfd->npf", each, kernel_t.reshape(CPU_SPLITS, -1, D))
    return y.reshape(*outer, *features)


def table_product(x: Float[jax.Array, "... D"], table: Float[jax.Array, "V D"]) -> Float[jax.Array, "... V"]:
    """x @ table.T in float32."""
    V, D = table.shape
    # Each part has its own copy of the rows; they stay smaller than what is made of them.
    parts = next((n for n in range(CPU_SPLITS, V // D + 1) if V % n == 0), 1)
    if parts == 1 or not _is_memory_bound(x, 32):
        return jnp.einsum("...d,vd->...v", x, table, preferred_element_type=jnp.float32)
    rows = jnp.broadcast_to(x, (parts, *x.shape))
    y = jnp.einsum("p...d,pvd->...pv", rows, table.reshape(parts, -1, D))
    return y.reshape(*x.shape[:-1], -1)


def standardized(x: Float[jax.Array, "... D"], eps: float, centred: bool = True) -> Float[jax.Array, "... D"]:
    """(x - mean) / sqrt(variance + eps) over the last axis of a float32 x; not `centred`: x / sqrt(mean of x^2 + eps).

    On a TPU the variance is E[x^2] - E[x]^2, in one pass over x. In float32 that is off by about 1e-7 mean^2 / variance of
    the variance, which is less than what x lost when it was a bfloat16.
    """
    if centred and platform() != "tpu":
        x = x - jnp.mean(x, axis=-1, keepdims=True)
    square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    if centred and platform() == "tpu":
        mean = jnp.mean(x, axis=-1, keepdims=True)
        x, square = x - mean, jnp.maximum(square - jnp.square(mean), 0.0)
    return x * jax.lax.rsqrt(square + eps)
