"""An embedding model from nothing: which verse of the World English Bible are these five words of the King James from?

    bothways train bible_embed --workdir runs/bible_embed
    bothways search runs/bible_embed bibles:5 --bm25

A small bidirectional stack of the shape of configs/shakespeare.py, its vectors the mean over a text. Each phrase is looked for among
the 128 verses of its batch; whole books are held out, and searched among thousands of verses.
"""

import dataclasses

from bothways.config import ObjectiveConfig, TrainConfig
from bothways.configs.shakespeare import OPTIMIZER, SMALL
from bothways.data.config import DataConfig
from bothways.model.config import TransformerConfig
from bothways.recipes import Recipe

recipes = {
    "bible_embed": Recipe(
        family="bert",
        model=TransformerConfig(**SMALL | {"context_length": 64, "n_layers": 2, "tie_embeddings": True}),
        data=DataConfig(corpus="bibles", text_fields=("kjv:5", "web"), tokenizer="unigram", vocab_size=8192),
        objective=ObjectiveConfig(kind="contrastive"),
        optimizer=dataclasses.replace(OPTIMIZER, learning_rate=0.005, adam_learning_rate=0.005),
        train=TrainConfig(steps=400, batch_size=128, eval_every=200, save_every=100, log_every=20),
    )
}
