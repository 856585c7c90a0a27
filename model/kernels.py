"""Attention kernels that never hold the scores: which masks and shapes each knows, and how the mask is passed.

short    TPU, Pallas, of ours (model/short_rows.py): rows of up to 1,024, causality, segments, and dropout; narrow heads at full width
splash   TPU, Pallas: causality, windows, blocks and segments, by tile, and soft caps of scores; what is hidden is not computed
cudnn    GPU, cuDNN's flash attention: causality and windows before it by structure, all else as a drawn mask

Both derive causality and windows from the index in the row, so a mask must be `positions_are_sequential` (model/mask.py).
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float

from bothways.model.axes import activation_sharding, platform
from bothways.model.dropout import ScoreDropout
from bothways.model.mask import Mask
from bothways.model.short_rows import LONGEST, Rows, attend_short

LANES = 128
"""Splash cuts rows into blocks of a multiple of this many positions."""

SAVED = "attended"
"""Name of what `remat="dots"` keeps of a kernel: its inputs, with bias and scaled."""
Q_AXES, K_AXES = ("batch", "length", "heads", "head"), ("batch", "keys", "kv_heads", "head")


def choose(
    wanted: str,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    dropout: ScoreDropout | None = None,
    cap: float = 0.0,
) -> str:
    """The kernel for these arguments: `wanted`, or with auto the first of the device's that knows them; else xla."""
    by_device = {"tpu": ("short", "splash"), "gpu": ("cudnn",)}
    candidates = by_device.get(platform(), ()) if wanted == "auto" else (wanted,)
    knows = {"short": _short_knows, "splash": _splash_knows, "cudnn": _cudnn_knows}
    for name in candidates:
        able = (dropout is None or name == "short") and (not cap or name == "splash")
        if name in knows and able and knows[name](q, k, v, mask):
            return name
    return "xla"


def positions_match_order(mask: Mask) -> bool:
    """Whether row index equals position for all parts of the mask; blocks go by position."""
    return (
        mask.prefix is None and mask.block is None and (mask.positions_are_sequential or not (mask.causal or mask.window))
    )


def is_sequence_sharded(q: jax.Array) -> bool:
    """Whether several devices share the queries [B, T, H, K] of a row."""
    shards = activation_sharding(q.shape, *Q_AXES)
    return shards is not None and shards.shard_shape(q.shape)[1] < q.shape[1]


# ---- short rows -------------------------------------------------------------------------------------------------


def _short_knows(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> bool:
    (T, H, K), S = q.shape[1:], k.shape[1]
    whole = positions_match_order(mask) and not mask.window and not is_sequence_sharded(q)
    rows = T % LANES == 0 and S % LANES == 0 and max(T, S) <= LONGEST
    return whole and rows and k.shape[2] == H and v.shape[3] == K and K >= 8 and LANES % K == 0


def short(
    q: Float[jax.Array, "B T H K"],
    k: Float[jax.Array, "B S H K"],
    v: Float[jax.Array, "B S H K"],
    mask: Mask,
    dropout: ScoreDropout | None = None,
) -> Float[jax.Array, "B T H K"]:
    """The kernel of model/short_rows.py; on no TPU it is interpreted, slowly. On a mesh each device has its rows and heads,
    and draws the dropout that one device would."""
    B, T, H, K = q.shape
    q_segments, k_segments = _segments(mask, B, T, k.shape[1])
    seed = jnp.zeros(2, jnp.uint32) if dropout is None else dropout.seed
    first = jnp.arange(B * H, dtype=jnp.int32).reshape(B, H)
    rows = Rows(K, H, mask.causal, 0.0 if dropout is None else dropout.rate, platform() != "tpu")

    def part(q, k, v, q_segments, k_segments, first, seed):
        def kept(x):  # as products write it
            return checkpoint_name(x.reshape(-1, x.shape[-1]), SAVED).reshape(x.shape)

        heads = q.shape
        q, k, v = (x.reshape(*x.shape[:2], -1) for x in (q, k, v))
        q, k, v = (kept(x) for x in (q * K**-0.5, k, v))
        numbers = jnp.concatenate([seed.astype(jnp.int32), first[:1, 0]])
        return attend_short(rows, q, k, v, q_segments, k_segments, numbers).reshape(heads)

    if q_at := activation_sharding(q.shape, *Q_AXES):
        k_at = activation_sharding(k.shape, *K_AXES)
        row, head = PartitionSpec(q_at.spec[0]), PartitionSpec(q_at.spec[0], q_at.spec[2])
        specs = (q_at.spec, k_at.spec, k_at.spec, row, row, head, PartitionSpec())
        part = jax.shard_map(part, mesh=q_at.mesh, in_specs=specs, out_specs=q_at.spec, check_vma=False)
    return part(q, k, v, q_segments, k_segments, first, seed)


def _segments(mask: Mask, B: int, T: int, S: int) -> tuple[jax.Array, jax.Array]:
    """Segments [B, T] of queries and [B, S] of keys so that a query sees the keys of its own."""
    q_segments, k_segments = mask.q_segments, mask.k_segments
    if k_segments is None:
        k_segments = jnp.ones((B, S), jnp.int32)
    if q_segments is None:
        q_segments, k_segments = jnp.ones((B, T), jnp.int32), (k_segments > 0).astype(jnp.int32)
    return q_segments, k_segments


# ---- splash -----------------------------------------------------------------------------------------------------


def _splash_knows(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> bool:
    T, S = _shard_lengths(q, k)
    by_blocks = mask.block_by_index > 0 and not (mask.causal or mask.window) and not is_sequence_sharded(q)
    return (positions_match_order(mask) or by_blocks) and T % LANES == 0 and S % LANES == 0


def _shard_lengths(q: jax.Array, k: jax.Array) -> tuple[int, int]:
    """T and S on one device."""
    shards = activation_sharding(q.shape, *Q_AXES)
    return (shards.shard_shape(q.shape)[1] if shards else q.shape[1]), k.shape[1]


class BlockMask(splash_attention_mask._ComputableMask):
    """Blocks by index in the row, computed inside the kernel; with two streams, of the hidden and the clean half."""

    def __init__(self, shape: tuple[int, int], block: int, streams: int):
        self.block, self.streams = block, streams
        half = shape[0] // streams

        def visible(q, k):
            q_block, k_block = q % half // block, k % half // block
            if streams == 1:
                return k_block <= q_block
            clean = (k >= half) & ((k_block < q_block) | ((q >= half) & (k_block == q_block)))
            return clean | ((k < half) & (q < half) & (k_block == q_block))

        super().__init__(shape=shape, mask_function=visible)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BlockMask) and hash(self) == hash(other)

    def __hash__(self) -> int:
        return hash((type(self), self.shape, self.block, self.streams))


@functools.cache
def _splash_kernel(
    T: int,
    S: int,
    heads: int,
    causal: bool,
    window: int,
    q_shards: int,
    interpret: bool,
    block: int = 0,
    streams: int = 1,
    narrow: bool = False,
    cap: float = 0.0,
):
    """The kernel for this structure, `q_shards` devices sharing the T queries of a row."""
    near = None if not window else window - 1
    if block:
        mask = BlockMask((T, S), block, streams)
    elif causal or window:
        mask = splash_attention_mask.LocalMask((T, S), (near, 0 if causal else near), offset=0, shard_count=q_shards)
    else:
        mask = splash_attention_mask.FullMask((T, S))
    block_q, block_k = (next(b for b in (512, 256, LANES) if n % b == 0) for n in (T // q_shards, S))
    # Heads narrower than a register's lanes leave it half empty, unless its lanes are positions.
    layout = splash_attention_kernel.QKVLayout["SEQ_MINOR" if narrow else "HEAD_DIM_MINOR"]
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block_q,
        block_kv=block_k,
        block_q_dkv=block_q,
        block_kv_dkv=block_k,
        block_q_dq=block_q,
        block_kv_dq=block_k,
        **dict.fromkeys(("q_layout", "k_layout", "v_layout"), layout),
    )
    with jax.ensure_compile_time_eval():
        return splash_attention_kernel.make_splash_mha(
            splash_attention_mask.MultiHeadMask([mask] * heads),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=q_shards,
            interpret=interpret,
            attn_logits_soft_cap=cap or None,
        )


def splash(
    q: Float[jax.Array, "B T H K"],
    k: Float[jax.Array, "B S G K"],
    v: Float[jax.Array, "B S G W"],
    mask: Mask,
    cap: float = 0.0,
) -> Float[jax.Array, "B T H W"]:
    """Pallas' splash attention; on no TPU it is interpreted, slowly. On a mesh each device has its rows, heads, queries."""
    B, T, H, K = q.shape
    S = k.shape[1]
    q_segments, k_segments = _segments(mask, B, T, S)
    q_at, k_at = activation_sharding(q.shape, *Q_AXES), activation_sharding(k.shape, *K_AXES)
    t, h = q_at.shard_shape(q.shape)[1:3] if q_at else (T, H)
    banded = mask.causal or mask.window  # else every device's queries see alike, and the kernel is that of its own
    shards = T // t if banded else 1
    blocks = mask.block_by_index, mask.streams, K < LANES, cap
    kernel = _splash_kernel(t * shards, S, h, mask.causal, mask.window, shards, platform() != "tpu", *blocks)

    def rows(kernel, q, k, v, q_segments, k_segments):
        def row(q, k, v, q_segments, k_segments):
            heads_first = (x.swapaxes(0, 1) for x in (q, k, v))
            return kernel(*heads_first, splash_attention_kernel.SegmentIds(q_segments, k_segments)).swapaxes(0, 1)

        return jax.vmap(row)(q, k, v, q_segments, k_segments)

    if q_at:
        along = q_at.spec[1]
        mesh, q_row, k_row = q_at.mesh, PartitionSpec(q_at.spec[0], along), PartitionSpec(q_at.spec[0])
        kernel_spec = kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, along if banded else None)))
        specs = (kernel_spec, q_at.spec, k_at.spec, k_at.spec, q_row, k_row)
        rows = jax.shard_map(rows, mesh=mesh, in_specs=specs, out_specs=q_at.spec, check_vma=False)
    return rows(kernel, q * K**-0.5, k, v, q_segments, k_segments)


# ---- cuDNN ------------------------------------------------------------------------------------------------------


def _cudnn_knows(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> bool:
    if platform() != "gpu":  # nothing interprets it
        return False
    T, S, K = q.shape[1], k.shape[1], q.shape[3]
    heads = v.shape[3] == K and K % 8 == 0 and K <= 128
    whole = not is_sequence_sharded(q)  # or JAX refuses
    return q.dtype in (jnp.bfloat16, jnp.float16) and heads and whole and T % 2 == 0 and S % 2 == 0


def cudnn(
    q: Float[jax.Array, "B T H K"],
    k: Float[jax.Array, "B S G K"],
    v: Float[jax.Array, "B S G K"],
    mask: Mask,
    implementation: str = "cudnn",
) -> Float[jax.Array, "B T H K"]:
    """cuDNN's flash attention. `implementation="xla"` computes the same from the same arguments, where no GPU is."""
    causal = mask.causal and positions_match_order(mask)
    window = mask.window if causal else 0
    structured = causal and mask.k_segments is None and mask.q_positions.shape == mask.k_positions.shape
    drawn = None if structured or _sees_all(mask) else mask.materialize()[:, None]
    near = (window - 1, 0) if window else None
    return jax.nn.dot_product_attention(
        q, k, v, mask=drawn, is_causal=causal, local_window_size=near, implementation=implementation
    )


def _sees_all(mask: Mask) -> bool:
    return not (mask.causal or mask.window) and mask.k_segments is None and mask.block is None


KERNELS = {"short": short, "splash": splash, "cudnn": cudnn}
