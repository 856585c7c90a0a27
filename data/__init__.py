"""Corpora, tokenizers, example construction, the input pipeline. Knows nothing of models."""
