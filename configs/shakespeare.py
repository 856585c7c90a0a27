"""Small models on Shakespeare's plays, for a laptop: six plays held out whole.

bothways train shakespeare_gpt
"""

from common.config import ObjectiveConfig, OptimizerConfig, TrainConfig
from common.recipe import Recipe
from data.config import DataConfig
from model.config import TransformerConfig

recipes = {
    "shakespeare_gpt": Recipe(
        family="gpt",
        model=TransformerConfig(
            context=128,
            n_layers=3,
            d_model=128,
            n_heads=4,
            positions="rotary",
            norm="rms",
            activation="relu2",
            bias=False,
            init_residual="zero",
            tie_embeddings=False,
        ),
        data=DataConfig(corpus="shakespeare", tokenizer="unigram", vocab_size=4096),
        objective=ObjectiveConfig(kind="causal"),
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=0.02,
            adam_learning_rate=4e-3,
            schedule="linear",
            warmup_steps=20,
            weight_decay=0.01,
        ),
        train=TrainConfig(steps=2000, batch_size=8, eval_every=1000, save_every=500, log_every=20),
    ),
    "shakespeare_bert": Recipe(
        family="bert",
        model=TransformerConfig(
            context=128,
            n_layers=3,
            d_model=128,
            n_heads=4,
            positions="rotary",
            norm="rms",
            activation="relu2",
            bias=False,
            init_residual="zero",
            tie_embeddings=False,
            segment_types=2,
            next_sentence=True,
        ),
        data=DataConfig(corpus="shakespeare", tokenizer="unigram", vocab_size=4096),
        objective=ObjectiveConfig(kind="masked", next_sentence=True),
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=0.01,
            adam_learning_rate=0.01,
            schedule="linear",
            warmup_steps=20,
            weight_decay=0.01,
        ),
        train=TrainConfig(steps=1500, batch_size=16, eval_every=750, save_every=500, log_every=20),
    ),
}
