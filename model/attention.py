"""Attention: projections, rotary positions, grouped queries, and the one place where a kernel is chosen."""

import itertools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from bothways.model.axes import constrain_activation, devices_in_use, platform
from bothways.model.blockwise import HIDDEN, attend_blockwise, attend_cached, reads_cache_in_tiles, scores_of
from bothways.model.cache import LayerCache
from bothways.model.config import TransformerConfig
from bothways.model.dropout import ScoreDropout, seed_words
from bothways.model.kernels import KERNELS, LANES, choose, is_sequence_sharded, positions_match_order
from bothways.model.layers import Norm, Projection, rotate
from bothways.model.mask import Mask
from bothways.model.products import contract
from bothways.model.score_bias import ScoreBias

BLOCKS = 4
"""Of queries. More leave out more keys, and take longer to compile."""
LONG = 128
"""Queries from which on blocks of them are worth their calls."""
SCORES = 2**24
"""On one device, over all rows and heads: of more, one tile at a time is held."""


def attend(
    q: Float[jax.Array, "B T H K"],
    k: Float[jax.Array, "B S G K"],
    v: Float[jax.Array, "B S G W"],
    mask: Mask,
    dropout: ScoreDropout | None = None,
    kernel: str = "auto",
    bias: ScoreBias | None = None,
    cap: float = 0.0,
) -> Float[jax.Array, "B T H W"]:
    """Scaled dot-product attention (arXiv 1706.03762, section 3.2.1); query heads share G key-value heads.

    The kernel is chosen by device, mask and shape (model/kernels.py); dropout of probabilities is known to that of short rows
    only, a soft cap of the scores (TransformerConfig.score_cap) to splash.
    For XLA, rows whose scores are many are cut into tiles of which one is held at a time (model/blockwise.py). The
    queries of shorter ones are cut into blocks, and keys that are hidden from a whole block are left out: of causal
    scores three eighths. On a CPU a long cache is read as far as it is filled. With a bias of the scores, XLA holds all of
    them: the kernels know none.
    """
    chosen = "xla" if bias is not None else choose(kernel, q, k, v, mask, dropout, cap)
    if chosen != "xla":
        known = ({} if dropout is None else {"dropout": dropout}) | ({"cap": cap} if cap else {})
        return KERNELS[chosen](q, k, v, mask, **known)
    if dropout is None and bias is None and reads_cache_in_tiles(k, mask):
        return attend_cached(q, k, v, mask, cap)
    B, T, H, _ = q.shape
    if bias is None and T >= LONG and B * H * T * k.shape[1] > SCORES * devices_in_use():
        return attend_blockwise(q, k, v, mask, dropout, cap)
    if T < LONG or not (mask.causal or mask.window) or not positions_match_order(mask) or is_sequence_sharded(q):
        return attend_whole(q, k, v, mask, dropout, bias=bias, cap=cap)
    tile = 1 if platform() == "cpu" else LANES
    size, found = -(-T // (BLOCKS * tile)) * tile, []
    blocks = [slice(begin, min(begin + size, T)) for begin in range(0, T, size)]
    seen = [mask.visible_key_range(queries) for queries in blocks]
    k_of, v_of = pieces(k, seen), pieces(v, seen)
    for queries, keys, q_part in zip(
        blocks, seen, jax.lax.split(q, [b.stop - b.start for b in blocks], axis=1), strict=True
    ):
        part = mask.slice(queries, keys)
        at = (T, queries.start, keys.start)
        found.append(attend_whole(q_part, k_of(keys), v_of(keys), part, dropout, at, bias, cap))
    return jnp.concatenate(found, axis=1)


def pieces(x: Float[jax.Array, "B S G K"], ranges: list[slice]) -> Callable[[slice], jax.Array]:
    """x[:, range] for each of these ranges, as parts of x side by side: their gradients are added part by part, where those of slices
    would each be as long as x."""
    cuts = sorted({0, x.shape[1]} | {end for one in ranges for end in (one.start, one.stop)})
    parts = dict(zip(cuts, jax.lax.split(x, [b - a for a, b in itertools.pairwise(cuts)], axis=1), strict=False))
    return lambda one: jnp.concatenate([part for begin, part in parts.items() if one.start <= begin < one.stop], axis=1)


def attend_whole(
    q: Float[jax.Array, "B T H K"],
    k: Float[jax.Array, "B S G K"],
    v: Float[jax.Array, "B S G W"],
    mask: Mask,
    dropout: ScoreDropout | None = None,
    part: tuple[int, int, int] | None = None,
    bias: ScoreBias | None = None,
    cap: float = 0.0,
) -> Float[jax.Array, "B T H W"]:
    """Every query on every key: the reference of all kernels. The softmax is in float32. A query that may see nothing
    gets an average that no loss looks at, not NaN.

    Args:
      part: how many queries the row has, and the indices of the first of these queries and keys, where they are a part
        of a row: dropout is a function of the index. None: they are all.
      bias: what positions add to the scores.
      cap: of the scores, before the bias.
    """
    B, T, H, K = q.shape
    G = k.shape[2]
    spread = is_sequence_sharded(q)
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q * K**-0.5, k, v))  # [B, H, T, K]
    # Query groups are folded into the query axis, unless positions are spread: then k and v are repeated.
    if spread and G < H:
        k, v, G = jnp.repeat(k, H // G, axis=1), jnp.repeat(v, H // G, axis=1), H
    scores = scores_of(q.reshape(B, G, H // G * T, K), k, cap).reshape(B, H, T, -1)
    if bias is not None:
        scores = scores + bias.of(mask.q_positions, mask.k_positions)
    scores = jnp.where(mask.materialize()[:, None], scores, HIDDEN)
    probabilities = jax.nn.softmax(scores, axis=-1)
    if dropout is not None:
        row, query, key = part or (T, 0, 0)
        queries, keys = query + jnp.arange(T), key + jnp.arange(scores.shape[-1])
        probabilities = probabilities * dropout.factor(B, H, row, queries, keys)
    probabilities = probabilities.astype(v.dtype).reshape(B, G, H // G * T, -1)
    y = contract("bgns,bgsk->bgnk", probabilities, v)
    return y.reshape(B, H, T, -1).transpose(0, 2, 1, 3)


def fuse_qkv(params: dict) -> dict:
    """Self-attention's parameters with query, key and value in one projection, [D, H K + G K + G W]: a step of few rows
    takes one product of that width in less time than three."""
    parts = [params[name] for name in ("query", "key", "value")]
    columns = [jax.tree.map(lambda x: x.reshape(*x.shape[:-2], -1), part) for part in parts]
    rest = {name: inner for name, inner in params.items() if name not in ("query", "key", "value")}
    return rest | {"qkv": jax.tree.map(lambda *x: jnp.concatenate(x, axis=-1), *columns)}


class Attention(nn.Module):
    """Multi-head attention of x on itself, on a cache of its past, or on a memory.

    Args of the call:
      x: [B, T, D].
      mask: which keys each query may see.
      positions: [B, T], for rotary positions.
      cache, length: where this layer's past is kept and how much of it each row has; None in training.
      memory: for cross-attention the encoder's output [B, S, D], or what `keys_values` made of it before; None for
        self-attention.

    Returns:
      [B, T, D] and the cache with T more positions, or None.
    """

    cfg: TransformerConfig

    def setup(self):
        cfg = self.cfg
        bias = (cfg.bias and cfg.attention_bias) or cfg.qkv_bias
        self.query = Projection(cfg, (cfg.n_heads, cfg.d_head), bias=bias)
        self.key = Projection(cfg, (cfg.n_kv_heads, cfg.d_head), bias=bias)
        self.value = Projection(cfg, (cfg.n_kv_heads, cfg.d_value), bias=bias)
        self.widths = (cfg.n_heads * cfg.d_head, cfg.n_kv_heads * cfg.d_head, cfg.n_kv_heads * cfg.d_value)
        self.qkv = Projection(cfg, (sum(self.widths),), bias=bias)  # of parameters that `fuse_qkv` made
        if cfg.qk_norm:
            self.query_norm, self.key_norm = Norm(cfg, rms=True), Norm(cfg, rms=True)
        self.out = Projection(cfg, (cfg.d_model,), n_in=2, residual=True, bias=cfg.bias and cfg.attention_bias)

    def keys_values(
        self, source: Float[jax.Array, "B S D"]
    ) -> tuple[Float[jax.Array, "B S G K"], Float[jax.Array, "B S G W"]]:
        """What is looked at, before positions."""
        return self.keyed(self.key(source)), self.value(source)

    def keyed(self, k: jax.Array) -> jax.Array:
        return self.normed(self.key_norm, k) if self.cfg.qk_norm else k

    def normed(self, norm: Norm, x: Float[jax.Array, "B T H K"]) -> Float[jax.Array, "B T H K"]:
        if self.cfg.qk_norm_over == "head":
            return norm(x)
        return norm(x.reshape(*x.shape[:-2], -1)).reshape(x.shape)

    def __call__(
        self,
        x: Float[jax.Array, "B T D"],
        mask: Mask,
        positions: Int[jax.Array, "B T"],
        cache: LayerCache | None = None,
        length: Int[jax.Array, " B"] | None = None,
        memory: Float[jax.Array, "B S D"] | LayerCache | None = None,
        deterministic: bool = True,
        rotary_base: float | None = None,
        bias: ScoreBias | None = None,
    ) -> tuple[Float[jax.Array, "B T D"], LayerCache | None]:
        cfg = self.cfg
        if self.has_variable("params", "qkv"):
            parts = jax.lax.split(self.qkv(x), self.widths, axis=-1)
            q, k, v = (
                y.reshape(*y.shape[:-1], -1, n) for y, n in zip(parts, (cfg.d_head, cfg.d_head, cfg.d_value), strict=True)
            )
            k = self.keyed(k)
        else:
            q = self.query(x)
            remembered = isinstance(memory, LayerCache)
            k, v = memory.read() if remembered else self.keys_values(x if memory is None else memory)
        if cfg.qk_norm:
            q = self.normed(self.query_norm, q)
        if cfg.position_embedding == "rotary" and memory is None:
            base = cfg.rotary_base if rotary_base is None else rotary_base
            if base:  # 0 in a layer without positions
                q, k = (rotate(x, positions, base, cfg.rotary_scaling, cfg.rotary_width) for x in (q, k))
        if cfg.query_scale:  # every kernel divides by the square root of the head width
            q = q * (cfg.d_head / cfg.query_scale) ** 0.5
        q = constrain_activation(q, "batch", "length", "heads", "head")
        k = constrain_activation(k, "batch", "keys", "kv_heads", "head")
        v = constrain_activation(v, "batch", "keys", "kv_heads", "head")
        if cache is not None:
            cache = cache.write(k, v, length)
            k, v = cache.read()
        dropping = cfg.dropout_attention > 0 and not deterministic
        dropout = ScoreDropout(seed_words(self.make_rng("dropout")), cfg.dropout_attention) if dropping else None
        y = attend(q, k, v, mask, dropout, cfg.attention, bias, cfg.score_cap)
        return self.out(y), cache
