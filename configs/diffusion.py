"""Published diffusion language models on this stack: MDLM (arXiv 2406.07524), BD3-LM (2503.09573), LLaDA (2502.09992).

MDLM and BD3-LM on OpenWebText: 12 blocks of width 768, 12 heads, rows of 1024, dropout 0.1, output layer not tied, GPT-2's
vocabulary and a mask; Adam 3e-4 (0.9, 0.999) without decay, constant after warm-up, batch 512, 1,000,000 steps (from MDLM's
published configuration, read). Their blocks also take the noise level in, by layers of adaptive norms, which MDLM switches
off (time_conditioning: False) and which are not here: 162,150,144 parameters. No average of weights is kept (theirs: 0.9999).
BD3-LM trains whole rows first and goes on at one block size, for the last 150,000 of the steps (section 6, as remembered):

    bothways train mdlm_small --train.steps 850000
    bothways train bd3lm_small_16 --train.init-from runs/mdlm_small

LLaDA 8B: 32 blocks of width 4096, 32 heads, SwiGLU of width 12,288, RMS norms, no biases, rotary base 500,000, rows of
4096, a vocabulary of 126,464, output layer not tied: 8,015,581,184 parameters, 6.98B without the two token tables (table 5:
8.02B and 6.98B; sizes as remembered, and the sums agree). 2.3T tokens in batches of 1280; 4e-4 after 2,000 steps, held, and
lowered twice, which is one line down here; weight decay 0.1. Its outputs predict their own position.

The corpora are not public as they were used; C4 stands in.
"""

from bothways.config import ObjectiveConfig, OptimizerConfig, TrainConfig
from bothways.data.config import DataConfig
from bothways.model.config import TransformerConfig
from bothways.recipes import Recipe

SMALL = TransformerConfig(
    vocab_size=50_258,
    context_length=1024,
    n_layers=12,
    d_model=768,
    n_heads=12,
    position_embedding="rotary",
    bias=False,
    tie_embeddings=False,
    predicts="own",
    dropout_residual=0.1,
)
ADAM = OptimizerConfig(learning_rate=3e-4, schedule="constant", warmup_steps=2_500, b2=0.999, weight_decay=0.0)
OFTEN = {"eval_every": 5_000, "eval_rows": 4_096, "save_every": 5_000, "log_every": 50}


def small(block: int, steps: int) -> Recipe:
    return Recipe(
        family="gpt",
        model=SMALL,
        data=DataConfig(corpus="c4/en", tokenizer="bpe", vocab_size=50_258),
        objective=ObjectiveConfig(kind="diffusion", block_sizes=(block,)),
        optimizer=ADAM,
        train=TrainConfig(steps=steps, batch_size=512, **OFTEN),
    )


LLADA = Recipe(
    family="gpt",
    model=TransformerConfig(
        vocab_size=126_464,
        context_length=4096,
        n_layers=32,
        d_model=4096,
        n_heads=32,
        d_ff=12_288,
        position_embedding="rotary",
        rotary_base=500_000.0,
        norm="rms",
        activation="swiglu",
        bias=False,
        tie_embeddings=False,
        predicts="own",
        scan_layers=True,
        remat="full",
    ),
    data=DataConfig(corpus="c4/en", tokenizer="bpe", vocab_size=126_464),
    objective=ObjectiveConfig(kind="diffusion"),
    optimizer=OptimizerConfig(
        learning_rate=4e-4,
        schedule="wsd",
        warmup_steps=2_000,
        decay_fraction=0.13,
        final_lr_ratio=0.025,
        weight_decay=0.1,
    ),
    train=TrainConfig(steps=438_690, batch_size=1280, **OFTEN),
)

recipes = {
    "mdlm_small": small(0, 1_000_000),
    **{f"bd3lm_small_{block}": small(block, 150_000) for block in (4, 8, 16)},
    "llada_8b": LLADA,
}
