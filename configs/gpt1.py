"""GPT-1: "Improving Language Understanding by Generative Pre-Training" (Radford et al. 2018), section 4.1.

12 layers, 768 wide, 12 heads, post-norm, learned positions, context 512: 116,534,784 parameters. Adam with
learning rate 2.5e-4, 2,000 warm-up steps, cosine to 0; 100 epochs of BooksCorpus in batches of 64 rows; token
perplexity 18.4. BooksCorpus (7,000 books) is not public: `pg19`, books of the same kind, stands in for it, and
100 epochs become 1,000,000 steps of 32,768 tokens.

    bothways train gpt1
"""

from bothways.config import OptimizerConfig, TrainConfig
from bothways.data.config import DataConfig
from bothways.model.config import TransformerConfig
from bothways.recipes import Recipe

recipes = {
    "gpt1": Recipe(
        family="gpt",
        model=TransformerConfig(
            vocab_size=40_478,
            context_length=512,
            n_layers=12,
            d_model=768,
            n_heads=12,
            norm_position="post",
            init_residual="same",
            dropout_embed=0.1,
            dropout_attention=0.1,
            dropout_residual=0.1,
        ),
        data=DataConfig(corpus="pg19", text_field="book_text", tokenizer="bpe", vocab_size=40_478),
        optimizer=OptimizerConfig(learning_rate=2.5e-4, warmup_steps=2_000, b2=0.999, weight_decay=0.01, clip_norm=0.0),
        train=TrainConfig(steps=1_000_000, batch_size=64, eval_every=5_000, save_every=5_000, log_every=100),
    )
}
