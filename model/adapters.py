"""Low-rank adapters (LoRA, arXiv 2106.09685): y = W x + alpha / r B A x, of which only A and B are trained."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bothways.model.config import TransformerConfig
from bothways.model.dropout import Dropout
from bothways.model.products import project

NAME = "lora"
"""Of the module beside a kernel that holds `a` [*in, r] and `b` [r, *features]."""
TRAINED = (NAME, "task_head")
"""Modules that are trained where the rest is frozen: adapters, and a task's head, which no base has."""


Make = Callable[[str, tuple[int, ...], Callable[[slice], jax.Array]], Any]
"""How a kernel is made: its path, its shape [L, ...], and what gives some of its layers."""


class LowRank(nn.Module):
    """alpha / r x A B over the last `n_in` axes of x, to `features` (arXiv 2106.09685, section 4.1). A is uniform in
    +-1/sqrt(fan in) and B zero, as PEFT begins, so that an adapter begins as nothing; dropout is on x, in training alone."""

    cfg: TransformerConfig
    features: Sequence[int]
    n_in: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        lora, inputs = self.cfg.lora, x.shape[x.ndim - self.n_in :]
        bound = float(np.prod(inputs)) ** -0.5
        init = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)  # noqa: E731
        a = self.param("a", init, (*inputs, lora.rank), jnp.float32)
        b = self.param("b", nn.initializers.zeros, (lora.rank, *self.features), jnp.float32)
        x = Dropout(lora.dropout, deterministic=not self.has_rng("dropout"))(x)
        y = project(project(x, a.astype(x.dtype), self.n_in), b.astype(x.dtype), 1)
        return y * jnp.asarray(lora.scale, x.dtype)


def split(params: dict) -> tuple[dict, dict]:
    """(what is TRAINED, all other parameters) of a tree; either may be empty."""
    adapters, rest = {}, {}
    for name, inner in params.items():
        if name in TRAINED:
            adapters[name] = inner
        elif isinstance(inner, dict):
            mine, others = split(inner)
            adapters |= {name: mine} if mine else {}
            rest |= {name: others} if others else {}
        else:
            rest[name] = inner
    return adapters, rest


def join(params: dict, frozen: dict | None) -> dict:
    """The tree that `split` took apart; `params` itself where nothing is frozen. Layers may be stacked, or a tuple
    (`unstack_layers`)."""
    if frozen is None:
        return params
    if isinstance(frozen, tuple):
        return tuple(join(of_layer, rest) for of_layer, rest in zip(params or [{}] * len(frozen), frozen, strict=True))
    return {
        name: join(params.get(name, {}), frozen.get(name, {}))
        if isinstance(params.get(name, frozen.get(name)), dict | tuple)
        else params.get(name, frozen.get(name))
        for name in {**frozen, **params}
    }


def frozen_types(shapes: dict, cfg: TransformerConfig) -> dict:
    """Shapes of frozen parameters in the type that they are kept in: kernels and tables in lora.frozen, the rest float32."""

    def typed(path: tuple, leaf: Any) -> jax.ShapeDtypeStruct:
        wide = str(getattr(path[-1], "key", "")) not in ("kernel", "embedding")
        dtype = leaf.dtype if wide else cfg.lora.frozen
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=getattr(leaf, "sharding", None))

    return jax.tree_util.tree_map_with_path(typed, shapes)


def of_base(base: dict, shapes: dict) -> dict:
    """A base's parameters where adapters want them: heads that they do not use left out, learned positions cut.

    Raises:
      KeyError: the base has no such parameter, or one of another shape; says which.
    """
    found = {}
    for name, wanted in shapes.items():
        if isinstance(wanted, dict):
            found[name] = of_base(base.get(name, {}), wanted)
            continue
        leaf = base.get(name)
        leaf = leaf[: wanted.shape[0]] if leaf is not None and name == "embedding" else leaf
        if leaf is None or leaf.shape != wanted.shape:
            raise KeyError(f"{name} {wanted.shape}")
        found[name] = leaf
    return found


def merge(params: dict, cfg: TransformerConfig, make: Make = lambda _, __, of: of(slice(None)), path: str = "") -> dict:
    """Kernels with what their adapters add, and the adapters gone: the same function in a plain model's parameters.

    Args:
      path: of `params`.
    """

    def merged(inner: dict, path: str) -> dict:
        if NAME not in inner:
            return merge(inner, cfg, make, f"{path}/")
        a, b, kernel, r = inner[NAME]["a"], inner[NAME]["b"], inner["kernel"], cfg.lora.rank

        def of(layers: slice) -> jax.Array:
            A, B, whole = a[layers], b[layers], kernel[layers]
            L = len(A)
            product = jnp.einsum("lir,lro->lio", A.reshape(L, -1, r), B.reshape(L, r, -1), precision="highest")
            return whole.astype(jnp.float32) + cfg.lora.scale * product.reshape(whole.shape)

        rest = {name: leaf for name, leaf in inner.items() if name != NAME}
        return rest | {"kernel": make(f"{path}/kernel", kernel.shape, of)}

    return {name: merged(inner, path + name) if isinstance(inner, dict) else inner for name, inner in params.items()}
