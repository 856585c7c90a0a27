"""The directions that a model may be scored in: forward, each token from those before it; both ways, from all others."""

import dataclasses

from bothways.model.gpt import MaskedNextToken
from bothways.sample.diffusion import DiffusionModel
from bothways.sample.hybrid import HybridModel
from bothways.sample.masked import MaskedModel
from bothways.sample.text import TextModel

FORWARD, BOTH = "forward", "both ways"


def directions(model: TextModel | MaskedModel | HybridModel | DiffusionModel) -> dict[str, MaskedModel]:
    """The directions that a model was trained in, each with the interface of MaskedModel.

    Forward, the prediction at a position depends on the tokens before it only, whatever stands at it and after it.
    """
    if isinstance(model, MaskedModel):
        return {BOTH: model}
    objective, cfg = model.recipe.objective, model.run.module.cfg
    found = {}
    in_blocks = isinstance(model, DiffusionModel)
    mixed = objective.kind == "hybrid" and objective.causal_share > 0
    if objective.kind in ("causal", "chat") or mixed or (in_blocks and model.forward):
        found[FORWARD] = MaskedModel(dataclasses.replace(model.run, module=MaskedNextToken(cfg, both_ways=False)))
    if (in_blocks and 0 in model.block_sizes) or (isinstance(model, HybridModel) and objective.causal_share < 1):
        found[BOTH] = model.both_ways
    return found
