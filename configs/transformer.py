"""The Transformer of "Attention Is All You Need" (arXiv 1706.03762), a modern one, T5's objective, and two small ones.

    bothways train transformer_base        # WMT14 English to German; 8 P100: 12 hours, BLEU 27.3
    bothways train transformer_big         # 8 P100: 3.5 days, BLEU 28.4
    bothways train bible                   # King James into modern English; 2 CPU cores: about 10 minutes

Every row of the paper's table 3 is `transformer_base` and a flag or two: (A) --model.n-heads 1; (B) --model.d-head 16
--model.d-value 64; (C) --model.n-layers 2, --model.d-model 256, --model.d-ff 1024; (D) --model.dropout-embed 0
--model.dropout-residual 0, --objective.label-smoothing 0.2; (E) --model.position-embedding learned.
"""

import dataclasses

from bothways.config import ObjectiveConfig, OptimizerConfig, TrainConfig
from bothways.data.config import DataConfig
from bothways.model.config import TransformerConfig
from bothways.recipes import Recipe


def published(d_model: int, d_ff: int, n_heads: int, dropout: float, steps: int, average: int) -> Recipe:
    """Table 3's base and big. 96 rows of 256 are about 25,000 source and 25,000 target tokens (section 5.1)."""
    warmup = 4000
    return Recipe(
        family="seq2seq",
        model=TransformerConfig(
            vocab_size=37_000,
            context_length=256,
            n_layers=6,
            d_model=d_model,
            n_heads=n_heads,
            d_ff=d_ff,
            position_embedding="sinusoidal",
            norm_position="post",
            norm_eps=1e-6,
            activation="relu",
            embed_scale=True,
            dropout_embed=dropout,
            dropout_residual=dropout,
            init="xavier",
            init_std=d_model**-0.5,
            init_residual="same",
        ),
        data=DataConfig(
            corpus="wmt14_translate/de-en", source_field="en", target_field="de", tokenizer="bpe", vocab_size=37_000
        ),
        objective=ObjectiveConfig(kind="pairs", label_smoothing=0.1),
        optimizer=OptimizerConfig(
            name="adamw",
            learning_rate=d_model**-0.5 * warmup**-0.5,
            schedule="rsqrt",
            warmup_steps=warmup,
            b2=0.98,
            eps=1e-9,
            weight_decay=0.0,
            clip_norm=0.0,
        ),
        train=TrainConfig(
            steps=steps,
            batch_size=96,
            eval_every=4500,  # every third checkpoint is evaluated
            save_every=1500,
            max_to_keep=average,
            average_last_checkpoints=average,
        ),
    )


base = published(512, 2048, 8, 0.1, steps=100_000, average=5)
modern = dataclasses.replace(
    base,
    model=dataclasses.replace(
        base.model,
        d_ff=1408,  # three matrices of about as many parameters as two of 2048
        position_embedding="rotary",
        norm="rms",
        norm_position="pre",
        activation="swiglu",
        bias=False,
        embed_scale=False,
        init="normal",
        init_std=0.02,
        init_residual="depth",
    ),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=4000, b2=0.98, weight_decay=0.1),
)
SMALL = TransformerConfig(
    context_length=128,
    n_layers=2,
    d_model=192,
    n_heads=4,
    position_embedding="rotary",
    norm="rms",
    activation="relu2",
    bias=False,
    init_residual="zero",
)
MUON = OptimizerConfig(
    name="muon", learning_rate=0.01, adam_learning_rate=0.005, schedule="linear", warmup_steps=50, weight_decay=0.01
)

recipes = {
    "transformer_base": base,
    "transformer_big": published(1024, 4096, 16, 0.3, steps=300_000, average=20),
    "transformer_modern": modern,
    "spans_base": dataclasses.replace(
        modern,
        model=dataclasses.replace(modern.model, vocab_size=32_000, context_length=512),
        data=DataConfig(corpus="c4", tokenizer="unigram", vocab_size=32_000),
        objective=ObjectiveConfig(kind="spans"),
        train=TrainConfig(steps=2**19, batch_size=128, eval_every=10_000, save_every=10_000),
    ),
    "bible": Recipe(
        family="seq2seq",
        model=SMALL,
        data=DataConfig(corpus="bibles", source_field="kjv", target_field="web", vocab_size=4096),
        objective=ObjectiveConfig(kind="pairs"),
        optimizer=MUON,
        train=TrainConfig(steps=1000, batch_size=16, eval_every=500, save_every=500, log_every=20),
    ),
    "shakespeare_spans": Recipe(
        family="seq2seq",
        model=SMALL,
        data=DataConfig(corpus="shakespeare", vocab_size=4096),
        objective=ObjectiveConfig(kind="spans"),
        optimizer=MUON,
        train=TrainConfig(steps=1000, batch_size=8, eval_every=500, save_every=500, log_every=20),
    ),
}
