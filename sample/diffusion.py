"""A run trained by masked diffusion in blocks, open for inference: it writes a block at a time, and fills where it was
trained on whole rows."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from bothways.errors import InputError
from bothways.model.gpt import MaskedNextToken
from bothways.model.loss import MAX_LOGITS
from bothways.rundir import Run
from bothways.sample.batching import rows_that_decode
from bothways.sample.blocks import BlockDecoder, block_decoder, usual_block
from bothways.sample.bound import DRAWS, bound_logprobs
from bothways.sample.denoise import Denoising
from bothways.sample.masked import Filled, MaskedModel
from bothways.sample.sampling_params import SamplingParams
from bothways.sample.text import PerPrompt, Sample, Score, TextModel, check_limits, for_each, never_drawn


class DiffusionModel(TextModel):
    """A decoder trained by `objective.kind=diffusion`: `sample`, and `fill` where whole rows were among its blocks. Made by
    `bothways.load`."""

    def __init__(self, run: Run):
        super().__init__(run)
        self.block_sizes = run.recipe.objective.block_sizes
        """What it was trained on; 0 is the whole row."""
        self.both_ways = MaskedModel(dataclasses.replace(run, module=MaskedNextToken(run.module.cfg)))
        # Vectors are features in the tokens' own places: moved to the token that each predicts, a text's first would be
        # what stands before it in the row.
        own = MaskedNextToken(dataclasses.replace(run.module.cfg, predicts="own"))
        self.reader = MaskedModel(dataclasses.replace(run, module=own))
        self.block_decoder = functools.cache(self._block_decoder)

    def _block_decoder(self, block: int) -> BlockDecoder:
        never = np.zeros(self.run.recipe.model.table_rows, bool)
        never[[self.tokenizer.mask, self.tokenizer.pad]] = True
        never[len(self.tokenizer) :] = True
        never[self.tokenizer.eos] = False  # where a published vocabulary has no padding of its own, they are one token
        return block_decoder(self.run.module, never, self.tokenizer.eos, self.tokenizer.mask, block)

    def room(self, block: int | None = None) -> int:
        """Tokens of the context that blocks of this size fill, which a prompt may have; of whole rows, all. None: as `sample`."""
        context = self.recipe.model.context_length
        block = usual_block(self.block_sizes, context) if block is None else block
        return context // block * block if block and block in self.block_sizes else context

    def rows_in_blocks(self, block: int, max_tokens: int) -> Callable[[int], int]:
        """Length of a prompt -> rows that are written together."""
        fitting, most = rows_that_decode(self.recipe.model, max_tokens + block), block * self.recipe.model.table_rows
        return lambda length: max(1, min(fitting(length), MAX_LOGITS // most))

    def sample(
        self,
        prompts: Sequence[str],
        *,
        max_tokens: PerPrompt | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        greedy: bool = False,
        num: int = 1,
        seed: PerPrompt = 0,
        stop: Sequence[str] = (),
        stream: Callable[[int, str], None] | None = None,
        block: int | None = None,
        steps: int | None = None,
        threshold: float = 0.0,
        remask: bool = False,
        any_order: bool = False,
        sweeps: int = 0,
    ) -> list[Sample]:
        """Continue every prompt `num` times, a block at a time.

        Args:
          seed: one for all prompts, or one for each.
          max_tokens: per continuation, one for all prompts or one for each; None: 256. Beyond the context, the text goes on
            from the last half of it.
          stream: called with (index of the result, new piece of text) after every block.
          block: tokens of a block, one of those that the run was trained on. With a cache of the blocks before; or any
            number, where it was trained on whole rows: then all before the block is read anew in every pass.
          steps: denoising steps for a block, the most confident tokens first; None: one a token.
          threshold: tokens of at least this probability are kept in whatever step; 0: off (arXiv 2505.22618).
          remask: whether tokens of the open block may be hidden again.
          any_order: tokens are kept in a random order instead; one a pass, that draws from the model's own distribution.
          sweeps: times that each token of a block is drawn again afterwards; of whole rows only.

        Returns:
          prompts x num results, in the order of the prompts; `logprob` sums what each token had when it was kept.

        Raises:
          InputError: numbers out of range, a block that the run was not trained on, or a prompt longer than the context, or
            than the blocks that fit into it.
        """
        check_limits(max_tokens, num, stop)
        block = usual_block(self.block_sizes, self.recipe.model.context_length) if block is None else block
        how = Denoising.make(steps or 0, threshold, remask, any_order)
        method = SamplingParams.make(temperature, top_k, top_p, min_p, greedy, never=never_drawn(self.tokenizer))
        if block not in self.block_sizes or block == 0:
            if block < 1:
                raise InputError(f"block is {block}; give how many tokens are written together, 1 or more")
            if 0 not in self.block_sizes:
                raise self._untrained(block)
            draw = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "greedy": greedy}
            canvas = {"block": block, "steps": steps or block, "threshold": threshold, "remask": remask}
            canvas |= {"any_order": any_order, "sweeps": sweeps}
            ends = {"max_tokens": max_tokens or 256, "num": num, "seed": seed, "stop": stop, "stream": stream}
            return self.both_ways.sample(prompts, **draw, **canvas, **ends)
        if sweeps:
            raise InputError(f"sweeps is {sweeps}: blocks with a cache are not drawn again; leave --sweeps out")
        encoded, room = [self.encode_prompt(p) for p in prompts], self.room(block)
        for prompt, ids in zip(prompts, encoded, strict=True):
            if len(ids) > room:
                raise InputError(
                    f"the prompt has {len(ids)} tokens, and blocks of {block} fill {room} of the model's context of "
                    f"{self.recipe.model.context_length}; shorten it: {prompt[:40]!r}..."
                )
        decoder, fitting = (
            self.block_decoder(block).filling(how),
            self.rows_in_blocks(block, max(for_each(max_tokens or 256, 1))),
        )
        return self._continued(prompts, encoded, decoder, method, fitting, max_tokens, num, seed, stop, stream)

    def fill(self, texts: Sequence[str], *, top: int = 5, steps: int = 1) -> list[Filled]:
        """As MaskedModel.fill.

        Raises:
          InputError: also where the run was not trained on whole rows, and never saw what follows a block.
        """
        if 0 not in self.block_sizes:
            raise InputError(
                f"{self.run.home} was trained on blocks of {', '.join(map(str, self.block_sizes))} and never saw what follows "
                "them, so it cannot fill; train with 0, the whole row, among --objective.block-sizes"
            )
        return self.both_ways.fill(texts, top=top, steps=steps)

    @property
    def forward(self) -> bool:
        """Whether it was trained to read forward too: a GPT, exactly."""
        return 1 in self.block_sizes and self.run.module.predicts == "next"

    @property
    def tightest_block(self) -> int:
        """The smallest block that it was trained on; 0 is the whole row."""
        return min(set(self.block_sizes) - {0}, default=0)

    def score(
        self, texts: Sequence[str], rule: str = "bound", draws: int = DRAWS, block: int | None = None
    ) -> list[Score]:
        """How likely each text is, as a document of its own.

        bound: a lower bound on the log-likelihood in blocks of `block` (see sample/bound.py); None: the smallest trained
          on; 0: the whole row. Exact at 1.
        causal: as TextModel.score, where blocks of 1 were trained on. pll, pll_word: as MaskedModel.score, where whole rows
          were.

        Raises:
          InputError: an empty text, a rule or a block that the run was not trained for.
        """
        rules = ["bound", *(["causal"] if self.forward else []), *(["pll", "pll_word"] if 0 in self.block_sizes else [])]
        if rule not in rules:
            raise InputError(f"rule {rule!r} is not for {self.run.home}, which scores by: {', '.join(rules)}")
        if rule == "causal":
            return super().score(texts)
        if rule != "bound":
            return self.both_ways.score(texts, rule)
        for i, text in enumerate(texts):
            if not text:
                raise InputError(f"text {i + 1} is empty; there is nothing to score")
        sequences = [[self.tokenizer.bos, *self.tokenizer.encode(text)] for text in texts]
        logprobs = self.bound_rows(sequences, None, draws, block)
        return [Score.of(t, lp, len(ids) - 1, rule) for t, lp, ids in zip(texts, logprobs, sequences, strict=True)]

    def bound_rows(
        self, rows: Sequence[list[int]], first: Sequence[int] | None = None, draws: int = DRAWS, block: int | None = None
    ) -> np.ndarray:
        """[rows] a lower bound on log p(tokens `first` .. | those before them), in nats, of rows that begin with [CLS].

        Raises:
          InputError: a block that the run was not trained on.
        """
        block = self.tightest_block if block is None else block
        if block not in self.block_sizes:
            raise self._untrained(block)
        context, mask = self.recipe.model.context_length, self.tokenizer.mask
        return bound_logprobs(self.run.module, self.run.params, rows, context, block, mask, draws, first)

    def _untrained(self, block: int) -> InputError:
        known = ", ".join(str(size) if size else "the whole row (0)" for size in self.block_sizes)
        return InputError(f"block is {block}, and {self.run.home} was trained on blocks of {known}: give one of those")

    def embed(self, texts: Sequence[str], pool: str = "", prompt: str = "") -> np.ndarray:
        """As MaskedModel.embed, read both ways, where whole rows were trained on; else as TextModel.embed."""
        return self.reader.embed(texts, pool, prompt) if 0 in self.block_sizes else super().embed(texts, pool, prompt)
