"""GPT-2: "Language Models are Unsupervised Multitask Learners" (Radford et al. 2019), table 2.

Pre-norm with a norm after the last block, residual projections initialised with 1/sqrt(2L) of the rest, context
1024, vocabulary 50,257, batch 512. Exact parameter counts: 124,439,808; 354,823,168; 774,030,080; 1,557,611,200.
The paper gives no schedule; these are 491,520 to 524,288 tokens a step, cosine to a tenth, 2,000 warm-up steps,
weight decay 0.1, and learning rates that fall with size as GPT-3's do (arXiv 2005.14165, table 2.1). WebText
was never published; C4 stands in.

    bothways train gpt2_small                                     # 8 x A100: about 4 days for 300B tokens
    bothways train gpt2_small --data.corpus 'books/*.txt' --train.steps 5000
"""

from bothways.config import OptimizerConfig, TrainConfig
from bothways.data.config import DataConfig
from bothways.model.config import TransformerConfig
from bothways.recipes import Recipe

SIZES = {  # name: layers, width, heads, learning rate
    "small": (12, 768, 12, 6e-4),
    "medium": (24, 1024, 16, 3e-4),
    "large": (36, 1280, 20, 2.5e-4),
    "xl": (48, 1600, 25, 2e-4),
}


def gpt2(layers: int, width: int, heads: int, rate: float) -> Recipe:
    return Recipe(
        family="gpt",
        model=TransformerConfig(vocab_size=50_257, context_length=1024, n_layers=layers, d_model=width, n_heads=heads),
        data=DataConfig(corpus="c4/en", tokenizer="bpe", vocab_size=50_257),
        optimizer=OptimizerConfig(learning_rate=rate, warmup_steps=2_000, final_lr_ratio=0.1),
        train=TrainConfig(
            steps=600_000, batch_size=512, eval_every=2_000, eval_rows=4_096, save_every=2_000, log_every=50
        ),
    )


recipes = {f"gpt2_{name}": gpt2(*size) for name, size in SIZES.items()}
