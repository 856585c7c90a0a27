"""Decoding, infilling, scoring, from checkpoints. Knows nothing of training."""
