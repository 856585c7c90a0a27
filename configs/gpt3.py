"""GPT-3: "Language Models are Few-Shot Learners" (arXiv 2005.14165), table 2.1, section 2 and appendix B.

The GPT-2 architecture with dense and locally banded layers in turn, context 2048, 300B tokens, rows packed to the
full context with nothing hidden between documents. Adam 0.9 / 0.95, clipping at 1, weight decay 0.1; warm-up over
375M tokens, cosine to a tenth at 260B tokens, then flat; the batch grows from 32k tokens to its full size.

What was chosen where the paper is silent or contradicts itself:
  - XL is printed with 24 heads of 128 in a width of 2048, which would be 1.517B parameters; 16 heads give the
    printed 1.3B and are what is here.
  - 13B is printed 5140 wide with 40 heads of 128; 5120 = 40 * 128 is what is here (12.85B).
  - The width of the band is not given; 256 is what is here.
  - The ramp lasts "4-12 billion tokens, depending on the model size": 4B up to 760M parameters, 8B up to 6.7B,
    12B above.
  - Batches are given in round numbers of tokens; here they are rows of 2048: 256, 512, 1024, 1600.
  - The mixture is that of table 2.2, by the shares of the training mix: they are rounded, and sum to 1.01. Its texts are
    not public; MIXTURE says which sets of TFDS stand in. They have other sizes than the paper's, so these shares make other
    epochs of them; the first lines of a run say how many.

    bothways plan gpt3_13b --topology v5p:4x4x8
    bothways train gpt3_small
"""

import dataclasses

from bothways.config import OptimizerConfig, TrainConfig
from bothways.data.config import DataConfig
from bothways.model.config import TransformerConfig
from bothways.recipes import Recipe

CONTEXT = 2048
SIZES = {  # name: layers, width, heads, head width, batch in rows, learning rate, ramp in billions of tokens
    "small": (12, 768, 12, 64, 256, 6.0e-4, 4),
    "medium": (24, 1024, 16, 64, 256, 3.0e-4, 4),
    "large": (24, 1536, 16, 96, 256, 2.5e-4, 4),
    "xl": (24, 2048, 16, 128, 512, 2.0e-4, 8),
    "2.7b": (32, 2560, 32, 80, 512, 1.6e-4, 8),
    "6.7b": (32, 4096, 32, 128, 1024, 1.2e-4, 8),
    "13b": (40, 5120, 40, 128, 1024, 1.0e-4, 12),
    "175b": (96, 12288, 96, 128, 1600, 0.6e-4, 12),
}

MIXTURE = (
    "c4/en=0.60",  # for Common Crawl, filtered: 410B tokens, 60 %, 0.44 epochs in 300B tokens
    "c4/webtextlike=0.22",  # for WebText2: 19B, 22 %, 2.9 epochs; pages of OpenWebText's links
    "pg19=0.16,book_text",  # for Books1: 12B, 8 %, 1.9 epochs, and Books2: 55B, 8 %, 0.43; books of Project Gutenberg
    "wikipedia/20230601.en=0.03",  # for Wikipedia: 3B, 3 %, 3.4 epochs
)


def gpt3(layers: int, width: int, heads: int, head: int, batch: int, rate: float, ramp: int) -> Recipe:
    train = TrainConfig(
        batch_size=batch,
        batch_size_start=16,
        batch_size_ramp_rows=int(ramp * 1e9) // CONTEXT,
        eval_every=2_000,
        eval_rows=4_096,
        save_every=2_000,
        log_every=50,
    )

    def steps(tokens: float) -> int:
        return train.steps_for(int(tokens) // CONTEXT)

    return Recipe(
        family="gpt",
        model=TransformerConfig(
            vocab_size=50_257,
            context_length=CONTEXT,
            n_layers=layers,
            d_model=width,
            n_heads=heads,
            d_head=head,
            layer_pattern=("global", "local"),
            window=256,
            scan_layers=True,
            remat="dots",
        ),
        data=DataConfig(corpus="", mixture=MIXTURE, tokenizer="bpe", vocab_size=50_257, separate_documents=False),
        optimizer=OptimizerConfig(
            learning_rate=rate, warmup_steps=steps(375e6), decay_steps=steps(260e9), final_lr_ratio=0.1, b2=0.95
        ),
        train=dataclasses.replace(train, steps=steps(300e9)),
    )


recipes = {f"gpt3_{name}": gpt3(*size) for name, size in SIZES.items()}
