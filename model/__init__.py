"""Pure functions of (params, tokens, mask, positions, cache). Knows nothing of data or training.

Shape letters, used in names and comments throughout: B batch, T query length, S key length, D model width,
H query heads, G key-value heads, K head width, F feed-forward width, V vocabulary, L layers.
"""
