"""Blocks in sequence: unrolled or scanned, rematerialised or not. The parameters are the same in all cases."""

import itertools
from collections.abc import Iterable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from bothways.model.attention import Attention, fuse_qkv
from bothways.model.block import Block
from bothways.model.cache import Cache, LayerCache
from bothways.model.config import TransformerConfig
from bothways.model.kernels import SAVED
from bothways.model.mask import Mask
from bothways.model.score_bias import ScoreBias

REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, jax.checkpoint_policies.save_only_these_names(SAVED)
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def split_layers(blocks: dict | Iterable[dict]) -> Iterable[dict]:
    """Stacked parameters [L, ...] as one tree per layer. lax.split, since its gradient is one concatenation."""
    if not isinstance(blocks, Mapping):
        return blocks
    leaves, treedef = jax.tree.flatten(blocks)
    n_layers = leaves[0].shape[0]
    columns = [jax.lax.split(leaf, (1,) * n_layers) for leaf in leaves]
    return tuple(treedef.unflatten([column[i][0] for column in columns]) for i in range(n_layers))


def unstack_layers(params: dict, join: bool = False) -> dict:
    """The same parameters as a decode step reads them: a tree per layer instead of stacked ones, of which a step would
    first copy each layer's part. Modules take either.

    Args:
      join: with the projections of self-attention side by side (`fuse_qkv`); for a single device, since their parts
        of several would not lie together.
    """

    def ready(name: str, inner: dict) -> dict | tuple[dict, ...]:
        if name != "blocks":
            return unstack_layers(inner, join)
        layers = split_layers(inner)
        return tuple({**layer, "attention": fuse_qkv(layer["attention"])} for layer in layers) if join else layers

    return {name: ready(name, inner) if isinstance(inner, dict) else inner for name, inner in params.items()}


class Stack(nn.Module):
    """L blocks. Parameters live in `blocks`, each with a leading axis of layers; or as `unstack_layers` made them; or are an
    iterable that reads those of one layer when it is their turn.

    With a cache the layers are always unrolled: decoding wants each layer's cache by itself, and layers may
    keep caches of different sizes.
    """

    cfg: TransformerConfig
    cross: bool = False

    def setup(self):
        self.block = Block(self.cfg, cross=self.cross, parent=None)
        given = self.has_variable("params", "blocks")  # else: initialising
        self.blocks = self.get_variable("params", "blocks") if given else self.param("blocks", self.init_blocks)

    def cross_keys_values(self, memory: Float[jax.Array, "B S D"]) -> tuple[LayerCache, ...]:
        """What every layer's cross-attention looks at, computed once per source."""
        attention = Attention(self.cfg, parent=None)
        return tuple(
            LayerCache.of(*attention.apply({"params": params["cross"]}, memory, method="keys_values"))
            for params in self.layers(self.blocks)
        )

    def layers(self, blocks: dict | Iterable[dict]) -> Iterable[dict]:
        """The parameters of each layer; one layer's again and again, where they share them."""
        found = split_layers(blocks)
        return tuple(found) * self.cfg.n_layers if self.cfg.share_layers else found

    def __call__(
        self,
        x: Float[jax.Array, "B T D"],
        mask: Mask,
        positions: Int[jax.Array, "B T"],
        cache: Cache | None = None,
        memory: Float[jax.Array, "B S D"] | None = None,
        memory_mask: Mask | None = None,
        deterministic: bool = True,
        bias: ScoreBias | None = None,
    ) -> tuple[Float[jax.Array, "B T D"], Cache | None]:
        cfg, block, blocks = self.cfg, self.block, self.blocks
        dropout_key = None if deterministic else self.make_rng("dropout")

        def run(x, params, layer, like, layer_cache=None):
            """Layer number `layer`, a traced value; window and rotary base are those of layer `like`."""
            rngs = None if deterministic else {"dropout": jax.random.fold_in(dropout_key, layer)}
            local = mask.windowed(cfg.layer_window(like))
            arguments = (local, positions, layer_cache, cache and cache.length, memory, memory_mask, deterministic)
            base, skip_norm = cfg.layer_rotary_base(like), not cfg.first_norm and layer == 0
            return block.apply({"params": params}, x, *arguments, base, skip_norm, bias, rngs=rngs)

        if cache is None and cfg.remat != "none":
            run = jax.checkpoint(run, policy=REMAT[cfg.remat], prevent_cse=not cfg.scan_layers, static_argnums=3)
        run = jax.jit(run, static_argnums=3)  # layers that are alike are traced once

        period = len(cfg.layer_pattern)
        scannable = cfg.scan_layers and cache is None and isinstance(blocks, Mapping)
        scanned = cfg.n_layers // period * period if scannable else 0
        if scanned:
            # One turn of the loop is one period of the layer pattern, so that every window stays a constant.
            shared = split_layers(blocks)[0] if cfg.share_layers else None

            def turn(x, turn_input):
                params, first = turn_input
                for j in range(period):
                    one = params if period == 1 else jax.tree.map(lambda p: p[j], params)  # noqa: B023
                    x, _ = run(x, one if shared is None else shared, first + j, j)
                return x, None

            grouped, firsts = None, jnp.arange(0, scanned, period)
            if shared is None:
                # An axis of length 1 would do, but a TPU copies the parameters for it.
                grouped = jax.tree.map(
                    lambda p: p[:scanned].reshape(-1, period, *p.shape[1:]) if period > 1 else p, blocks
                )
                blocks = jax.tree.map(lambda p: p[scanned:], blocks)
            x, _ = jax.lax.scan(turn, x, (grouped, firsts))

        new_layers = []
        rest = itertools.islice(self.layers(blocks), cfg.n_layers - scanned) if scanned < cfg.n_layers else ()
        for layer, params in enumerate(rest, start=scanned):
            layer_cache = cache.layers[layer] if cache is not None else None
            x, layer_cache = run(x, params, layer, layer % period, layer_cache)
            new_layers.append(layer_cache)
        if cache is not None:
            cache = cache.replace(layers=tuple(new_layers), length=cache.length + x.shape[1])
        return x, cache

    def init_blocks(self, rng: jax.Array) -> dict:
        cfg = self.cfg
        x, positions = jnp.zeros((1, 1, cfg.d_model)), jnp.zeros((1, 1), jnp.int32)
        mask = Mask.self_attention(positions, causal=True)

        def init(key: jax.Array) -> dict:
            memory = (x, Mask.cross(positions, positions)) if self.cross else (None, None)
            return self.block.init(key, x, mask, positions, None, None, *memory)["params"]

        return jax.vmap(init)(jax.random.split(rng, 1 if cfg.share_layers else cfg.n_layers))
