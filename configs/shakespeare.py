"""Small models on Shakespeare's plays, for a laptop: six plays held out whole, three for validation, three for test.

    bothways train shakespeare_gpt       # 2 CPU cores: about 5 minutes
    bothways train shakespeare_bert      # 2 CPU cores: about 5 minutes
    bothways train shakespeare_chars --data.corpus FILE    # characters of any text
    bothways train shakespeare_hybrid    # 2 CPU cores: about 5 minutes; continues, fills and scores in both directions
    bothways train shakespeare_chat      # conversations made from the plays: `bothways chat runs/shakespeare_chat`
    bothways train shakespeare_dial      # blocks of 1 to the whole row in one set of weights: `sample --block 4`

The same 3 blocks of width 128 for all: what differs is `family` and `objective`. What made the difference against a
plain small transformer is in the README.
"""

import dataclasses

from bothways.config import ObjectiveConfig, OptimizerConfig, TrainConfig
from bothways.data.config import DataConfig
from bothways.model.config import TransformerConfig
from bothways.recipes import Recipe

SMALL = {
    "context_length": 128,
    "n_layers": 3,
    "d_model": 128,
    "n_heads": 4,
    "position_embedding": "rotary",
    "norm": "rms",
    "activation": "relu2",
    "bias": False,
    "init_residual": "zero",
    "tie_embeddings": False,
}
DATA = DataConfig(corpus="shakespeare", tokenizer="unigram", vocab_size=4096)
OPTIMIZER = OptimizerConfig(
    name="muon", learning_rate=0.01, adam_learning_rate=0.01, schedule="linear", warmup_steps=20, weight_decay=0.01
)

recipes = {
    "shakespeare_gpt": Recipe(
        family="gpt",
        model=TransformerConfig(**SMALL),
        data=DATA,
        objective=ObjectiveConfig(kind="causal"),
        optimizer=OPTIMIZER,
        train=TrainConfig(steps=2000, batch_size=8, eval_every=1000, save_every=500, log_every=20),
    ),
    "shakespeare_chat": Recipe(
        family="gpt",
        model=TransformerConfig(**SMALL | {"context_length": 256}),
        data=dataclasses.replace(DATA, messages_field="messages"),
        objective=ObjectiveConfig(kind="chat"),
        optimizer=OPTIMIZER,
        train=TrainConfig(steps=2000, batch_size=4, eval_every=1000, save_every=500, log_every=20),
    ),
    "shakespeare_chars": Recipe(
        family="gpt",
        model=TransformerConfig(**SMALL | {"context_length": 64, "n_layers": 2}),
        data=DataConfig(corpus="shakespeare", tokenizer="char"),
        objective=ObjectiveConfig(kind="causal"),
        optimizer=dataclasses.replace(OPTIMIZER, learning_rate=0.02, adam_learning_rate=0.02, warmup_steps=10),
        train=TrainConfig(steps=400, batch_size=12, eval_every=1000, save_every=500, log_every=20),
    ),
    "shakespeare_hybrid": Recipe(
        family="gpt",
        model=TransformerConfig(**SMALL),
        data=DATA,
        objective=ObjectiveConfig(kind="hybrid", causal_share=0.5, mask_rate=0.3),
        optimizer=OPTIMIZER,
        train=TrainConfig(steps=2000, batch_size=8, eval_every=1000, save_every=500, log_every=20),
    ),
    "shakespeare_dial": Recipe(
        family="gpt",
        model=TransformerConfig(**SMALL),
        data=DATA,
        objective=ObjectiveConfig(kind="diffusion", block_sizes=(1, 2, 4, 8, 16, 32, 0)),
        optimizer=OPTIMIZER,
        train=TrainConfig(steps=2000, batch_size=8, eval_every=1000, save_every=500, log_every=20),
    ),
    "shakespeare_bert": Recipe(
        family="bert",
        # Tied: the predictions at 38 masked positions a row teach the table more than the inputs do.
        model=TransformerConfig(**SMALL | {"tie_embeddings": True}, segment_types=2, next_sentence=True),
        data=DATA,
        objective=ObjectiveConfig(kind="masked", mask_rate=0.3, next_sentence=True),
        optimizer=OPTIMIZER,
        train=TrainConfig(steps=1400, batch_size=16, eval_every=700, save_every=350, log_every=20),
    ),
}
