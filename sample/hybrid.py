"""Inference with a model that was trained in both directions: `sample` and `embed` forward, `fill` both ways, `score` in either."""

import dataclasses
from collections.abc import Sequence

from bothways.errors import InputError
from bothways.model.gpt import MaskedNextToken
from bothways.rundir import Run
from bothways.sample.bound import DRAWS
from bothways.sample.masked import Filled, MaskedModel
from bothways.sample.text import Score, TextModel


class HybridModel(TextModel):
    """A hybrid run ready for inference; `both_ways` is the same parameters as a masked model. Made by `bothways.load`."""

    def __init__(self, run: Run):
        super().__init__(run)
        self.both_ways = MaskedModel(dataclasses.replace(run, module=MaskedNextToken(run.module.cfg)))

    def fill(self, texts: Sequence[str], *, top: int = 5, steps: int = 1) -> list[Filled]:
        """As MaskedModel.fill."""
        return self.both_ways.fill(texts, top=top, steps=steps)

    def score(self, texts: Sequence[str], rule: str = "causal", draws: int = DRAWS) -> list[Score]:
        """By rule causal as TextModel.score; by pll, pll_word and bound as MaskedModel.score.

        Raises:
          InputError: an empty text, or a rule of a direction that the run was not trained in.
        """
        share = self.recipe.objective.causal_share
        rules = [*(["causal"] if share > 0 else []), *(["pll", "pll_word", "bound"] if share < 1 else [])]
        if rule not in rules:
            raise InputError(
                f"rule {rule!r} is not for {self.run.home}, of whose rows {share:.0%} were read forward; it scores by: "
                + ", ".join(rules)
            )
        return super().score(texts) if rule == "causal" else self.both_ways.score(texts, rule, draws)
