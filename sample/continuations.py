"""How likely a continuation of a context is, by whatever rule a run has: what choices are ranked by."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bothways.errors import InputError
from bothways.sample.batching import batched, rows_that_fit
from bothways.sample.diffusion import DiffusionModel
from bothways.sample.directions import BOTH, FORWARD, directions
from bothways.sample.masked import MaskedModel, hidden_batch

RULES = ("causal", "pll", "pll_word", "bound")


@functools.partial(jax.jit, static_argnums=0)
def logprobs_and_greedy(module: nn.Module, params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """[B, P] log p(target) at `mask_positions`, in nats, and whether the target is the most likely token."""

    def run(bound: nn.Module) -> tuple[jax.Array, jax.Array]:
        features = bound(batch["tokens"], segments=batch["segments"])
        logits = bound.logits(jnp.take_along_axis(features, batch["mask_positions"][..., None], axis=1))
        target = jnp.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
        return target - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == batch["targets"]

    return module.apply({"params": params}, method=run)


class Continuations:
    """Scores of continuations.

    Args:
      model: an open run.
      rule: causal: read forward. pll_word (the default of masked runs) and pll: each token of the continuation hidden in
        turn, all of the context and of the rest of the continuation in sight. A pseudo-log-likelihood is no probability:
        it ranks choices. bound (the default of runs trained by diffusion): a lower bound on the continuation's
        log-likelihood, with the context never hidden. Empty: the default.
      add_bos: put [CLS] before every context, as our runs were trained.

    Raises:
      InputError: a run without such scores, or a rule that it cannot be scored by.
    """

    def __init__(self, model: Any, rule: str = "", add_bos: bool = True):
        self.model, self.tokens, self.add_bos = model, model.tokenizer, add_bos
        known, in_blocks = directions(model), isinstance(model, DiffusionModel)
        fits = [r for r in RULES if (FORWARD if r == "causal" else BOTH) in known or (in_blocks and r == "bound")]
        if not fits:
            raise InputError(
                f"continuations are scored by a gpt or a bert run that predicts tokens; {model.run.home} is a "
                f"{model.recipe.family} run that does not"
            )
        diffuses = model.recipe.objective.kind == "diffusion"
        self.rule = rule or ("bound" if diffuses else "causal" if FORWARD in known else "pll_word")
        if self.rule not in fits:
            raise InputError(f"rule {self.rule!r} is not for this run; it scores by: {', '.join(fits)}")
        self.scorer: MaskedModel | DiffusionModel = (
            model if in_blocks and self.rule == "bound" else known[FORWARD if self.rule == "causal" else BOTH]
        )
        self.closing = 0 if self.scorer is model and in_blocks else len(self.scorer.closing)

    @property
    def max_length(self) -> int:
        return self.model.recipe.model.context_length

    def room(self, continuation: int) -> int:
        """Tokens of context that fit before a continuation of so many; below 0 the continuation itself does not.

        Read forward, the last token is predicted and is no input; both ways, [SEP] stands behind it.
        """
        return self.max_length + (1 if self.rule == "causal" else -self.closing) - self.add_bos - continuation

    def row(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[list[int], int]:
        """The tokens as they are read, cut from the left where they are too many; and where the continuation begins."""
        start = [self.tokens.bos] if self.add_bos or list(context) == [self.tokens.bos] else []
        before = [t for t in context if t != self.tokens.bos]
        room = self.room(len(continuation)) + self.add_bos - len(start)
        if room < 0:
            raise InputError(
                f"a continuation of {len(continuation)} tokens does not fit into a context of {self.max_length}"
            )
        row = [*start, *before[len(before) - min(room, len(before)) :]]
        return [*row, *continuation], len(row)

    def _copies(self, row: list[int], begin: int) -> list[tuple[list[int], list[int], list[int]]]:
        """(row, positions, targets) to score: one for a causal model, one for each masked token else."""
        if self.rule == "causal":
            return [(row, list(range(begin, len(row))), row[begin:])]
        return list(self.scorer.pll_copies([*row, *self.scorer.closing], self.rule, begin))

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
        """Of every (context, continuation) in tokens the continuation's score in nats, and whether it is the most likely one,
        token for token (by the bound nobody knows: no).

        Raises:
          InputError: a continuation longer than the model's context.
        """
        if self.rule == "bound":
            rows, begins = zip(*(self.row(*pair) for pair in pairs), strict=True)
            return [(float(nats), False) for nats in self.scorer.bound_rows(rows, begins)]
        copies = ((i, *copy) for i, pair in enumerate(pairs) for copy in self._copies(*self.row(*pair)))
        nats, greedy = np.zeros(len(pairs)), np.ones(len(pairs), bool)
        key = lambda copy: (len(copy[1]), len(copy[2]))  # noqa: E731
        for some in batched(copies, key, rows_that_fit(self.model.recipe.model, logits=True)):
            _, rows, positions, targets = zip(*some, strict=True)
            batch = hidden_batch(rows, positions, targets, self.max_length + 1, self.tokens.pad)
            logprobs, best = map(np.asarray, logprobs_and_greedy(self.scorer.run.module, self.scorer.run.params, batch))
            for k, (i, _, positions, _) in enumerate(some):
                nats[i] += logprobs[k, : len(positions)].sum()
                greedy[i] &= best[k, : len(positions)].all()
        return [(float(n), bool(g)) for n, g in zip(nats, greedy, strict=True)]
