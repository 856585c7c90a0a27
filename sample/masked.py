"""Inference with a masked language model: fill, score, generate a chunk at a time, embed."""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bothways.data.tokenizer import MASK
from bothways.errors import InputError
from bothways.model.loss import MAX_LOGITS, token_logprobs
from bothways.rundir import Run
from bothways.sample.batching import batched, rows_that_fit
from bothways.sample.blocks import usual_block
from bothways.sample.bound import DRAWS
from bothways.sample.decode import bucket, padded
from bothways.sample.denoise import Denoising, HiddenLogits, fill
from bothways.sample.embed import Embedder
from bothways.sample.sampling_params import SamplingParams
from bothways.sample.text import (
    PerPrompt,
    Sample,
    Score,
    check_limits,
    cut_at_stop,
    draw_keys,
    for_each,
    shown_so_far,
    to_sample,
)

Batch = dict[str, np.ndarray]
BATCH = 64


@dataclasses.dataclass(frozen=True)
class Filled:
    """A text with its masks filled; for every mask the most likely tokens when it was filled, best first."""

    text: str
    filled: str
    masks: list[list[dict[str, Any]]]


@functools.partial(jax.jit, static_argnums=0)
def hidden_logprobs(module: nn.Module, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
    """[B, P] log p(target) at mask_positions, in nats, of a batch {tokens, segments, positions?, types?, mask_positions, targets}."""

    def run(bound: nn.Module) -> jax.Array:
        features = bound(batch["tokens"], batch.get("positions"), batch["segments"], batch.get("types"))
        masked = jnp.take_along_axis(features, batch["mask_positions"][..., None], axis=1)
        return token_logprobs(bound.transform(masked), *bound.unembedding(), batch["targets"])

    return module.apply({"params": params}, method=run)


@functools.partial(jax.jit, static_argnums=0)
def next_sentence_right(module: nn.Module, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
    """[B] whether the next-sentence head classifies a batch of pairs correctly."""

    def run(bound: nn.Module) -> jax.Array:
        features = bound(batch["tokens"], batch["positions"], batch["segments"], batch["types"])
        return jnp.argmax(bound.next_sentence(features), axis=1) == batch["random_next"]

    return module.apply({"params": params}, method=run)


def columns(lists: Sequence[Sequence[int]], rows: int, least: int = 1) -> np.ndarray:
    """Ragged lists as [rows, P], P in its bucket, filled with 0."""
    out = np.zeros((rows, bucket(max(map(len, lists)), least)), np.int32)
    for i, values in enumerate(lists):
        out[i, : len(values)] = values
    return out


def hidden_batch(
    rows: Sequence[list[int]], positions: Sequence[list[int]], targets: Sequence[list[int]], longest: int, pad: int
) -> Batch:
    """Rows of tokens, and for each its masked positions and targets: tokens, segments [B, T]; mask_positions, targets [B, P]."""
    tokens, segments = padded(rows, longest, pad)
    masked = {"mask_positions": columns(positions, len(tokens)), "targets": columns(targets, len(tokens))}
    return {"tokens": tokens, "segments": segments, **masked}


def tail(ids: list[int], count: int) -> list[int]:
    return ids[-count:] if count else []


class MaskedModel(Embedder):
    """A masked run ready for inference: `fill`, `score`, `sample`, `embed`. Made by `bothways.load`."""

    def __init__(self, run: Run):
        super().__init__(run)
        self.vocabulary = self.tokenizer.vocabulary()
        self._barred = np.zeros(run.recipe.model.table_rows, bool)
        self._barred[self.tokenizer.special] = True
        self._barred[len(self.tokenizer) :] = True
        self.reader: Callable[..., jax.Array] = HiddenLogits(run.module)

    # ---- fill -----------------------------------------------------------------------------------------------------

    def encode_masked(self, text: str) -> list[int]:
        """A text with masks as [CLS] ... [SEP]. A mask takes the space before it along: pieces begin with their space.

        Raises:
          InputError: no mask, or longer than the context.
        """
        if MASK not in text:
            raise InputError(f"there is no {MASK} in {text[:60]!r}; put one where a word is wanted")
        ids = self._wrap(self.tokenizer.encode(text.replace(" " + MASK, MASK)))
        if len(ids) > self.context_length:
            count = ids.count(self.tokenizer.mask)
            raise InputError(
                f"the text has {len(ids)} tokens, {count} of them masks, and the model's context is "
                f"{self.context_length}; shorten it"
            )
        return ids

    def fill(self, texts: Sequence[str], *, top: int = 5, steps: int = 1) -> list[Filled]:
        """Put the most likely token in the place of every [MASK].

        Args:
          top: candidates per mask.
          steps: 1 fills all masks at once, each as if it were alone; T fills the most confident first, in T forward
            passes (Mask-Predict, arXiv 1904.09324, without going back).

        Raises:
          InputError: a text without masks or longer than the context; top or steps below 1.
        """
        for name, value in (("top", top), ("steps", steps)):
            if value < 1:
                raise InputError(f"{name} is {value}; it must be at least 1")
        rows = [self.encode_masked(text) for text in texts]
        masks = [[i for i, t in enumerate(row) if t == self.tokenizer.mask] for row in rows]
        found = self.fill_rows(rows, masks, steps, top=min(top, np.count_nonzero(~self._barred)))
        return [
            Filled(text, self._shown(text, row), [self._candidates(*mask) for mask in zip(*best, strict=True)])
            for text, row, (_, *best) in zip(texts, rows, found, strict=True)
        ]

    def _candidates(self, ids: np.ndarray, logprobs: np.ndarray) -> list[dict[str, Any]]:
        """Of one mask."""
        return [
            {"token": self.tokenizer.piece(int(t)), "p": round(float(np.exp(lp)), 4)}
            for t, lp in zip(ids, logprobs, strict=True)
        ]

    def _shown(self, text: str, row: list[int]) -> str:
        """A filled row as text. Pieces that begin a word bring a space, which the first has only if the text had."""
        filled = self.tokenizer.decode(row[1 : len(row) - len(self.closing)])
        return filled if text.startswith(" ") else filled.removeprefix(" ")

    def fill_rows(
        self,
        rows: list[list[int]],
        masks: list[list[int]],
        steps: int = 0,
        *,
        method: SamplingParams | None = None,
        keys: Sequence[jax.Array] | None = None,
        threshold: float = 0.0,
        remask: bool = False,
        any_order: bool = False,
        sweeps: int = 0,
        top: int = 0,
    ) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Replace masks in place, the most confident first, over `steps` forward passes (0: a mask a pass).

        Args:
          masks: positions of the masks of every row.
          method: how a token is drawn; None: the most likely.
          keys: a random key per row, where tokens are drawn.
          threshold, remask, any_order, sweeps, top: as in sample/denoise.py.

        Returns:
          for every row log-probabilities [masks] of its tokens, and ids and log-probabilities [masks, top] of candidates.
        """
        if not rows:
            return []
        method = method or SamplingParams.make(greedy=True)
        keys = keys if keys is not None else [jax.random.key(0)] * len(rows)
        how = Denoising.make(steps, threshold, remask, any_order)
        found: list[Any] = [None] * len(rows)
        most = bucket(max(map(len, masks)), 1) * len(self._barred)
        size, fitting = max(1, min(BATCH, MAX_LOGITS // most)), rows_that_fit(self.recipe.model)
        for some in batched(range(len(rows)), lambda i: (len(rows[i]),), lambda length: min(size, fitting(length))):
            tokens, segments = padded([rows[i] for i in some], self.context_length, self.tokenizer.pad)
            positions = columns([masks[i] for i in some], len(tokens))
            open_ = np.zeros(positions.shape, bool)
            for k, i in enumerate(some):
                open_[k, : len(masks[i])] = True
            own = jnp.stack([keys[i] for i in some] + [keys[some[0]]] * (len(tokens) - len(some)))
            args = tokens, segments, positions, open_, self._barred, own, method, how, jnp.int32(sweeps)
            got = jax.device_get(fill(self.reader, self.run.params, *args, top=top))
            for k, i in enumerate(some):
                n = len(masks[i])
                for place, token in zip(masks[i], got.tokens[k, :n].tolist(), strict=True):
                    rows[i][place] = token
                found[i] = got.logprobs[k, :n], got.candidates[k, :n], got.candidate_logprobs[k, :n]
        return found

    # ---- sample ---------------------------------------------------------------------------------------------------

    def sample(
        self,
        prompts: Sequence[str],
        *,
        max_tokens: PerPrompt = 256,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        greedy: bool = False,
        num: int = 1,
        seed: PerPrompt = 0,
        stop: Sequence[str] = (),
        block: int | None = None,
        steps: int = 16,
        threshold: float = 0.0,
        remask: bool = False,
        any_order: bool = False,
        sweeps: int = 0,
        stream: Callable[[int, str], None] | None = None,
    ) -> list[Sample]:
        """Continue every prompt by blocks of masks at its end.

        Each block is filled in `steps` forward passes, the most confident token first, and all above the probability
        `threshold` (0: off); with `remask` tokens may be hidden again, with `any_order` they are kept in a random order.
        Then each token is masked and drawn again in turn, `sweeps` times (Gibbs sampling, arXiv 1902.04094). `logprob`
        sums what each token had when it was drawn: not the likelihood of the text, which a masked model does not have.

        Args:
          max_tokens, seed: one for all prompts, or one for each.
          block: None: 16, or half of a shorter context.
          stream: called with (index of the result, new piece of text) after every block.

        Raises:
          InputError: numbers out of range, or a prompt longer than the context.
        """
        check_limits(max_tokens, num, stop)
        block = usual_block((), self.context_length) if block is None else block
        for name, value in (("block", block), ("steps", steps)):
            if value < 1:
                raise InputError(f"{name} is {value}; it must be at least 1")
        if sweeps < 0:
            raise InputError(f"sweeps is {sweeps}; it cannot be negative")
        if block > self.context_length // 2:
            raise InputError(
                f"block is {block}; at most half of the context, {self.context_length // 2}, can be filled at a time"
            )
        method = SamplingParams.make(temperature, top_k, top_p, min_p, greedy)
        encoded = [self.tokenizer.encode(p) for p in prompts]
        for prompt, ids in zip(prompts, encoded, strict=True):
            if len(self._wrap(ids)) > self.context_length:
                raise InputError(
                    f"the prompt has {len(ids)} tokens, the context is {self.context_length}: {prompt[:40]!r}..."
                )
        keys = draw_keys(prompts, num, seed)
        most = [n for n in for_each(max_tokens, len(prompts)) for _ in range(num)]
        past = [list(encoded[i // num]) for i in range(len(keys))]
        generated: list[list[int]] = [[] for _ in keys]
        logprobs: list[list[float]] = [[] for _ in keys]
        stops, shown = [""] * len(keys), [""] * len(keys)
        while going := [i for i, s in enumerate(stops) if not s]:
            sizes = [min(block, most[i] - len(generated[i])) for i in going]
            room = self.context_length - len(self._wrap([]))
            kept = [tail(past[i] + generated[i], room - n) for i, n in zip(going, sizes, strict=True)]
            rows = [self._wrap([*k, *[self.tokenizer.mask] * n]) for k, n in zip(kept, sizes, strict=True)]
            masks = [list(range(len(k) + 1, len(k) + 1 + n)) for k, n in zip(kept, sizes, strict=True)]
            here = [jax.random.fold_in(keys[i], len(generated[i])) for i in going]
            how = {"threshold": threshold, "remask": remask, "any_order": any_order, "sweeps": sweeps}
            found = self.fill_rows(rows, masks, steps, method=method, keys=here, **how)
            for j, i in enumerate(going):
                generated[i] += [rows[j][p] for p in masks[j]]
                logprobs[i] += found[j][0].tolist()
                text, stopped = cut_at_stop(self.tokenizer.decode(generated[i]), stop)
                stops[i] = "stop" if stopped else "max_tokens" if len(generated[i]) >= most[i] else ""
                ready = text if stops[i] else shown_so_far(text, stop)
                if stream and len(ready) > len(shown[i]):
                    stream(i, ready[len(shown[i]) :])
                    shown[i] = ready
        return [
            to_sample(self.tokenizer, prompts[i // num], generated[i], logprobs[i], stops[i], stop)
            for i in range(len(keys))
        ]

    # ---- score ----------------------------------------------------------------------------------------------------

    def score(self, texts: Sequence[str], rule: str = "pll_word", draws: int = DRAWS) -> list[Score]:
        """How likely each text is, by a rule of its own since a masked model has no chain rule.

        pll: every token given all others (arXiv 1910.14659).
        pll_word: the rest of its word, to the right, is hidden too (arXiv 2305.10588); pll flatters long words.
        bound: a lower bound on the log-likelihood: of L tokens k are hidden and weigh L / k, over `draws` stratified k
          (arXiv 2406.07524, equation 11; 2502.09992, equation 6). The only one on the scale of a causal model's likelihood.

        A text longer than the context is scored in pieces that do not see each other.

        Raises:
          InputError: an empty text, or another rule.
        """
        if rule not in ("pll", "pll_word", "bound"):
            raise InputError(
                f"rule {rule!r} is not for a masked run, which reads both ways; it scores by: pll, pll_word, bound"
            )
        for i, text in enumerate(texts):
            if not text:
                raise InputError(f"text {i + 1} is empty; there is nothing to score")
        sequences = [self.tokenizer.encode(text) for text in texts]
        logprobs = self.score_tokens(sequences, rule, draws)
        return [Score.of(text, lp, len(ids), rule) for text, lp, ids in zip(texts, logprobs, sequences, strict=True)]

    def score_tokens(self, sequences: Sequence[list[int]], rule: str, draws: int = DRAWS) -> np.ndarray:
        """[sequences] what `score` gives, in nats, of texts that are tokens already."""
        copies = self._copies(sequences, rule, draws)  # never all of them in memory
        return self._summed(copies, len(sequences))

    def bound_rows(self, rows: Sequence[list[int]], first: Sequence[int], draws: int = DRAWS) -> np.ndarray:
        """[rows] a lower bound on log p(tokens `first` .. | those before them), in nats, of rows that begin with [CLS]."""
        copies = (
            (i, *copy)
            for i, (row, begin) in enumerate(zip(rows, first, strict=True))
            for copy in self.bound_copies(
                [*row, *self.closing], draws, zlib.crc32(np.array(row, np.int32).tobytes()), begin
            )
        )
        return self._summed(copies, len(rows))

    def _summed(self, copies: Iterator[tuple[int, list[int], list[int], list[int], float]], count: int) -> np.ndarray:
        """[count] weighted sums of log p(target) over the copies of each text."""
        totals = np.zeros(count)
        key = lambda copy: (len(copy[1]), len(copy[2]))  # noqa: E731
        for batch in batched(copies, key, rows_that_fit(self.recipe.model)):
            texts, rows, positions, targets, weights = zip(*batch, strict=True)
            masked = hidden_batch(rows, positions, targets, self.context_length, self.tokenizer.pad)
            logprobs = np.asarray(hidden_logprobs(self.run.module, self.run.params, masked))
            for k, i in enumerate(texts):
                totals[i] += weights[k] * logprobs[k, : len(positions[k])].sum()
        return totals

    def _copies(
        self, sequences: Sequence[list[int]], rule: str, draws: int
    ) -> Iterator[tuple[int, list[int], list[int], list[int], float]]:
        """(text, row, masked positions, targets, weight) of every copy that a rule needs."""
        room = self.context_length - len(self._wrap([]))
        for i, ids in enumerate(sequences):
            seed = zlib.crc32(np.array(ids, np.int32).tobytes())
            for begin in range(0, len(ids), room):
                piece = self._wrap(ids[begin : begin + room])
                if rule == "bound":
                    yield from ((i, *copy) for copy in self.bound_copies(piece, draws, seed + begin))
                else:
                    yield from ((i, *copy, 1.0) for copy in self.pll_copies(piece, rule))

    def pll_copies(self, piece: list[int], rule: str, first: int = 1) -> Iterator[tuple[list[int], list[int], list[int]]]:
        """(row, positions, targets), a copy per token of the text from `first` on, with it hidden and, for pll_word, the
        rest of its word behind it."""
        starts, end = self.vocabulary.starts_word, len(piece) - len(self.closing)
        for place in range(first, end):
            row = list(piece)
            row[place] = self.tokenizer.mask
            after = place + 1
            while rule == "pll_word" and after < end and not starts[piece[after]]:
                row[after] = self.tokenizer.mask
                after += 1
            yield row, [place], [piece[place]]

    def bound_copies(
        self, piece: list[int], draws: int, seed: int, first: int = 1
    ) -> Iterator[tuple[list[int], list[int], list[int], float]]:
        """A copy per draw: k of the L tokens from `first` on hidden, weight L / k; k is stratified over the draws."""
        rng, end = np.random.default_rng(seed), len(piece) - len(self.closing)
        L = end - first
        for t in (np.arange(draws) + rng.random(draws)) / draws:
            k = 1 + int(t * L)
            positions = np.sort(rng.permutation(L)[:k] + first).tolist()
            row = list(piece)
            for position in positions:
                row[position] = self.tokenizer.mask
            yield row, positions, [piece[p] for p in positions], L / (k * draws)
