"""BERT and those who followed: arXiv 1810.04805, 1908.08962 (the small ones), 1907.11692, 2412.13663.

BERT: post-norm, exact GELU, learned positions, segment types, pooler, next-sentence prediction; 15 % of tokens
chosen, of those 80 % [MASK], 10 % random, 10 % left; batch 256, 1,000,000 steps, the first 90 % at length 128, the
rest at 512; Adam 1e-4, 10,000 warm-up steps, then linear. With both heads 110,106,428 parameters (base) and
336,226,108 (large). GLUE test averages 79.6 and 82.1; for tiny, mini, small, medium 64.2, 65.8, 71.2, 73.5.

RoBERTa: no next sentences, full documents, batch 8,000 for 500,000 steps, vocabulary 50,265.
ModernBERT: rotary positions, GeGLU, pre-norm, no biases, every third layer global and the others local within 64
positions on either side, rotary base 160,000 and 10,000, masking rate 30 %, rows packed without padding.

The papers' corpora (BooksCorpus, Wikipedia, CC-News, Stories) are only in part public; Wikipedia stands in.

    bothways train bert_base                 # 4 Cloud TPUs (16 chips) took 4 days in 2018
    bothways train bert_tiny --data.corpus 'books/*.txt' --train.steps 20000 --train.short-steps 18000
"""

import dataclasses

from bothways.config import ObjectiveConfig, OptimizerConfig, TrainConfig
from bothways.data.config import DataConfig
from bothways.model.config import TransformerConfig
from bothways.recipes import Recipe

SIZES = {  # name: layers, width, heads
    "tiny": (2, 128, 2),
    "mini": (4, 256, 4),
    "small": (4, 512, 8),
    "medium": (8, 512, 8),
    "base": (12, 768, 12),
    "large": (24, 1024, 16),
}
CORPUS = DataConfig(corpus="wikipedia/20230601.en", tokenizer="bpe", vocab_size=30_522)


def bert(layers: int, width: int, heads: int) -> Recipe:
    return Recipe(
        family="bert",
        model=TransformerConfig(
            vocab_size=30_522,
            context_length=512,
            n_layers=layers,
            d_model=width,
            n_heads=heads,
            norm_position="post",
            norm_eps=1e-12,
            activation="gelu",
            segment_types=2,
            embed_norm=True,
            next_sentence=True,
            init_residual="same",
            dropout_embed=0.1,
            dropout_attention=0.1,
            dropout_residual=0.1,
        ),
        data=CORPUS,
        objective=ObjectiveConfig(kind="masked", next_sentence=True),
        optimizer=OptimizerConfig(
            learning_rate=1e-4, schedule="linear", warmup_steps=10_000, b2=0.999, eps=1e-6, weight_decay=0.01
        ),
        train=TrainConfig(
            steps=1_000_000,
            batch_size=256,
            short_length=128,
            short_steps=900_000,
            eval_every=10_000,
            eval_rows=4_096,
            save_every=10_000,
            log_every=100,
        ),
    )


base = bert(*SIZES["base"])
recipes = {f"bert_{name}": bert(*size) for name, size in SIZES.items()}

recipes["roberta_base"] = dataclasses.replace(
    base,
    model=dataclasses.replace(base.model, vocab_size=50_265, segment_types=0, next_sentence=False, norm_eps=1e-5),
    data=dataclasses.replace(CORPUS, vocab_size=50_265),
    objective=ObjectiveConfig(kind="masked"),
    optimizer=OptimizerConfig(
        learning_rate=6e-4, schedule="linear", warmup_steps=24_000, b2=0.98, eps=1e-6, weight_decay=0.01, clip_norm=0.0
    ),
    train=dataclasses.replace(base.train, steps=500_000, batch_size=8_000, short_length=0, short_steps=0),
)

recipes["modernbert_base"] = Recipe(
    family="bert",
    model=TransformerConfig(
        vocab_size=50_368,
        context_length=1024,
        n_layers=22,
        d_model=768,
        n_heads=12,
        d_ff=1152,
        position_embedding="rotary",
        rotary_base=160_000.0,
        rotary_base_local=10_000.0,
        layer_pattern=("global", "local", "local"),
        window=65,
        activation="geglu",
        bias=False,
        embed_norm=True,
        first_norm=False,
    ),
    data=dataclasses.replace(CORPUS, vocab_size=50_368),
    objective=ObjectiveConfig(kind="masked", mask_rate=0.3, mask_token_prob=1.0, random_token_prob=0.0),
    optimizer=OptimizerConfig(
        learning_rate=8e-4, schedule="wsd", warmup_steps=3_000, b2=0.98, eps=1e-6, weight_decay=1e-5, clip_norm=0.0
    ),
    train=TrainConfig(
        steps=400_000, batch_size=4_608, eval_every=5_000, eval_rows=4_096, save_every=5_000, log_every=100
    ),
)
