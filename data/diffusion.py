"""Examples for masked diffusion in blocks: which tokens of each block are hidden, and what they weigh.

Of a block's L tokens exactly k are hidden, k drawn evenly from 1 ... L, and each weighs L / k: with t = k / L that is
"hide with probability t, weigh by 1/t" (arXiv 2406.07524, equation 11; 2502.09992, appendix A), without the variance of
how many are hidden. At L = 1 the token is always hidden and weighs 1: the next token, exactly.
"""

import numpy as np

from bothways.data.examples import Example, segment_positions
from bothways.data.rng import ExampleRng
from bothways.data.tokenizer import Vocabulary


def hide_in_blocks(
    positions: np.ndarray,
    scored: np.ndarray,
    block: np.ndarray,
    level: np.ndarray,
    noise: np.ndarray,
    predicts: str,
    flat: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens are hidden, and what each weighs in the bound: (hidden bool [n, T], weights float32 [n, T]).

    A model that predicts the next token knows the first one of a block from the clean block before: that token is
    scored with weight 1 and not hidden.

    Args:
      positions: [n, T], from 0 in each document.
      scored: [n, T] bool: tokens to be predicted; the others are context and never hidden.
      block: [n] tokens in a block.
      level: [n] in [0, 1), what decides how much is hidden; spread evenly over the blocks of a row.
      noise: [n, T] in [0, 1), what decides which tokens are.
      flat: every hidden token of a block weighs the same, its share of a weight of 1 per token: no bound any more.
    """
    n, T = positions.shape
    first = positions % block[:, None] == 0
    index = np.cumsum(first, axis=1) - 1  # of the block within the row
    index -= index[:, :1]
    maskable = scored & ~first if predicts == "next" else scored
    at = np.arange(n)[:, None] * T + index
    count = np.bincount(at[maskable], minlength=n * T).reshape(n, T)  # L of every block
    blocks = index[:, -1:] + 1
    t = (level[:, None] + np.arange(T) / blocks) % 1.0
    wanted = np.minimum(1 + np.floor(t * count).astype(int), count)  # k
    order = np.argsort(index + np.where(maskable, noise, 1 + noise) / 2, axis=1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.broadcast_to(np.arange(T), (n, T)), axis=1)
    size = np.bincount(at.ravel(), minlength=n * T).reshape(n, T)
    begin = np.cumsum(size, axis=1) - size
    rank -= np.take_along_axis(begin, index, axis=1)
    hidden = maskable & (rank < np.take_along_axis(wanted, index, axis=1))
    share = 2 * count / (count + 1) if flat else count / np.maximum(wanted, 1)  # E[k / L] = (L + 1) / 2 L
    share = np.take_along_axis(share, index, axis=1)
    weights = np.where(hidden, share, scored & ~maskable)
    return hidden, weights.astype(np.float32)


def diffused(
    rows: Example, draws: ExampleRng, vocabulary: Vocabulary, block_sizes: tuple[int, ...], predicts: str, flat: bool
) -> Example:
    """Packed rows [n, T] of running text with a random share of every block hidden.

    Returns:
      tokens (some hidden), targets (all clean), positions, segments, weights, scored (1 where a token is predicted at
      all), all [n, T]; block [n].
    """
    targets, segments = rows["tokens"], rows["segments"]
    positions = segment_positions(segments)
    T = targets.shape[1]
    sizes = np.array([size or T for size in block_sizes])
    block = sizes[(draws.uniform(1)[:, 0] * len(sizes)).astype(int)]
    scored = (positions > 0) & (segments > 0)
    if "scored" in rows:  # of conversations only answers are hidden, and what was asked never
        scored &= rows["scored"] > 0
    hidden, weights = hide_in_blocks(positions, scored, block, draws.stratified(), draws.uniform(T), predicts, flat)
    return {
        "tokens": np.where(hidden, vocabulary.mask, targets).astype(np.int32),
        "targets": targets,
        "positions": positions,
        "segments": segments,
        "weights": weights,
        "scored": scored.astype(np.float32),
        "block": block.astype(np.int32),
    }
