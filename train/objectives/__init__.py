"""Objectives: what an example is, and what the loss predicts. GPT and BERT part here and in model/mask.py.

causal   each output predicts the next token    the decoder's mask hides what comes after
chat     as causal, of the answers in conversations alone
masked   masked tokens are the targets          the encoder's mask hides nothing
hybrid   some rows as causal; in the others a hidden token is predicted at the position before it, and every token sees the whole row
diffusion  hidden tokens of a block are the targets, given all blocks before it: causal at blocks of 1, masked at the row
contrastive  the text that belongs to another, by their vectors  the body's own mask
pairs    as causal, after a source              the decoder sees all of what the encoder made of it
spans    as pairs, with hidden spans of a text for targets
"""

from collections.abc import Callable

from bothways.config import ObjectiveConfig
from bothways.data.tokenizer import Vocabulary
from bothways.errors import InputError
from bothways.recipes import Recipe
from bothways.registry import predicts
from bothways.train.objectives.after_source import pairs, spans
from bothways.train.objectives.causal import causal
from bothways.train.objectives.chat import chat
from bothways.train.objectives.contrastive import contrastive
from bothways.train.objectives.core import Batch, Objective, Setting, Sums, class_loss
from bothways.train.objectives.diffusion import diffusion
from bothways.train.objectives.hybrid import hybrid
from bothways.train.objectives.masked import masked

__all__ = ["OBJECTIVES", "Batch", "Objective", "Setting", "Sums", "class_loss", "make_objective", "objective_of"]

OBJECTIVES: dict[str, Callable[[ObjectiveConfig, Setting], Objective]] = {
    "causal": causal,
    "chat": chat,
    "masked": masked,
    "hybrid": hybrid,
    "diffusion": diffusion,
    "contrastive": contrastive,
    "pairs": pairs,
    "spans": spans,
}
"""An objective is a function in a file of its own and a line here."""

HIDES = ("masked", "hybrid", "diffusion", "spans")
"""Objectives that need a mask token."""

PREDICT_NO_TOKENS = ("contrastive",)
"""Objectives whose models need no output layer."""


def make_objective(
    cfg: ObjectiveConfig, vocabulary: Vocabulary, separate: bool = True, predicts: str = "next"
) -> Objective:
    """The objective of a configuration; `separate` keeps documents in one row from seeing each other, `predicts` is the
    model's (model/config.py).

    Raises:
      InputError: it hides tokens, and the vocabulary has no mask to hide them with.
    """
    if vocabulary.mask is None and cfg.kind in HIDES:
        raise InputError(
            f"objective.kind={cfg.kind} hides tokens behind a mask, and this tokenizer has no mask token; take another "
            "with --data.tokenizer, or another --objective.kind"
        )
    return OBJECTIVES[cfg.kind](cfg, Setting(vocabulary, separate, predicts))


def objective_of(recipe: Recipe, vocabulary: Vocabulary) -> Objective:
    """The objective of a recipe. Raises InputError as `make_objective` does."""
    contract = predicts(recipe.family, recipe.model)
    return make_objective(recipe.objective, vocabulary, recipe.data.separate_documents, contract)
