"""Text in, text out: a trained run with its verbs."""

import dataclasses
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bothways.data.tokenizer import Tokenizer
from bothways.embedding import EmbeddingInfo, read_embedding
from bothways.errors import InputError
from bothways.model.cache import Cache
from bothways.recipes import Recipe
from bothways.rundir import Run
from bothways.sample import score as scoring
from bothways.sample.batching import batched, rows_that_decode
from bothways.sample.beam import make_beam_search
from bothways.sample.decode import Begin, Decoder, Forward, Logits, Row, SourceTokens, bucket
from bothways.sample.embed import prompted, published_rows, shaped, vectors
from bothways.sample.sampling_params import SamplingParams


@dataclasses.dataclass(frozen=True)
class Sample:
    """One continuation.

    `tokens` counts them, `logprob` is their log-probability in nats under the model's own distribution, `stop`
    says why it ended: eos, stop (a stop string), max_tokens.
    """

    prompt: str
    text: str
    tokens: int
    logprob: float
    stop: str


@dataclasses.dataclass(frozen=True)
class Score:
    text: str
    logprob: float | None
    """Nats; None of a text without tokens, which has no likelihood."""
    tokens: int
    """How many the sum is over."""
    rule: str

    @classmethod
    def of(cls, text: str, logprob: float, tokens: int, rule: str) -> "Score":
        return cls(text, round(float(logprob), 3) if tokens else None, tokens, rule)


def prompt_length(row: Row) -> tuple[int, ...]:
    return max(len(row.context), len(row.source)), len(row.context)


def utf8_so_far(text: str) -> str:
    """Text without the character that its last bytes have only begun."""
    return text.rstrip("\ufffd")


def cut_at_stop(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """The text before the stop string that is complete first, whatever the chunks it came in; and whether there is one."""
    found = [(at + len(s), at) for s in stop if (at := text.find(s)) >= 0]
    return (text[: min(found)[1]], True) if found else (text, False)


def shown_so_far(text: str, stop: Sequence[str]) -> str:
    """What of a text can be shown while it is being written: no half character, no beginning of a stop string."""
    text = utf8_so_far(text)
    longest = min(len(text), max(map(len, stop), default=1) - 1)
    keep = next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in stop)), 0)
    return text[: len(text) - keep] if keep else text


PerPrompt = int | Sequence[int]
"""One number for all prompts, or one for each."""


def for_each(value: PerPrompt | None, count: int) -> list[int | None]:
    """The number of each of `count` prompts."""
    return list(value) if isinstance(value, Sequence) else [value] * count


def check_limits(max_tokens: PerPrompt | None, num: int, stop: Sequence[str]) -> None:
    """Raises InputError for what no `sample` can do."""
    for name, value in (*(("max-tokens", n) for n in for_each(max_tokens, 1)), ("num", num)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}; it must be at least 1")
    if any(not s for s in stop):
        raise InputError("a stop string is empty; every text contains it")


def check_seed(seed: int) -> None:
    if not -(2**31) <= seed < 2**32:
        raise InputError(f"seed is {seed}; it must fit into 32 bits: 0 to {2**32 - 1}")


def draw_keys(prompts: Sequence[str], num: int, seed: PerPrompt) -> list[jax.Array]:
    """A random key for each of `num` draws of every prompt, which depends on its seed, prompt and draw alone.

    Raises:
      InputError: a seed that 32 bits do not hold: of a larger one JAX would drop the rest.
    """
    seeds = for_each(seed, len(prompts))
    for one in seeds:
        check_seed(one)
    bases = [
        jax.random.fold_in(jax.random.key(one), zlib.crc32(prompt.encode()))
        for one, prompt in zip(seeds, prompts, strict=True)
    ]
    return [jax.random.fold_in(base, n) for base in bases for n in range(num)]


def never_drawn(tokenizer: Tokenizer) -> int:
    """[UNK], which stands for no text; -1 where a vocabulary has none, whose role then falls to what ends a text."""
    return tokenizer.unk if tokenizer.unk != tokenizer.eos else -1


def to_sample(
    tokenizer: Tokenizer, prompt: str, ids: list[int], logprobs: list[float], ended: str, stop: Sequence[str]
) -> Sample:
    """The generated text, up to the first stop string, and the fewest tokens that hold it."""
    text, stopped = cut_at_stop(tokenizer.decode(ids), stop)
    count = len(logprobs)
    if stopped:
        count = next(n for n in range(len(ids) + 1) if tokenizer.decode(ids[:n]).startswith(text))
    return Sample(prompt, text, count, round(float(sum(logprobs[:count])), 3), ended)


def callbacks(module: nn.Module, recipe: Recipe, known: int) -> tuple[Forward, Logits, Begin]:
    """What a `Decoder` needs of a recipe's module. Rows of the token table from `known` on stand for no token."""
    cfg, reads = recipe.model, "decode" if recipe.family == "seq2seq" else None

    def forward(params: Any, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        return module.apply({"params": params}, tokens, cache=cache, method=reads)

    def logits(params: Any, features: jax.Array) -> jax.Array:
        real = module.apply({"params": params}, features, method="logits")
        return real.at[..., known:].set(-jnp.inf)

    def begin(params: Any, batch: int, size: int, source: SourceTokens | None) -> Cache:
        if source is None:
            return Cache.empty(cfg, batch, size)
        return module.apply({"params": params}, *source, size, method="init_cache")

    return forward, logits, begin


class TextModel:
    """A run ready for inference: `sample`, `score`. Made by `bothways.load`."""

    def __init__(self, run: Run):
        self.run, self.recipe, self.tokenizer = run, run.recipe, run.tokenizer
        self.has_source = run.recipe.family == "seq2seq"
        forward, logits, begin = callbacks(run.module, run.recipe, len(run.tokenizer))
        self.decoder = Decoder(forward, logits, begin, run.recipe.model.context_length, self.tokenizer.eos)
        self._beams = make_beam_search(forward, logits, self.tokenizer.eos)

    def room(self, block: int | None = None) -> int:
        """Tokens that a prompt may have."""
        return self.recipe.model.context_length

    def encode_prompt(self, prompt: str) -> list[int]:
        """What is read of a prompt: its ids, or the token that opens a document; a source's ids and the end of it.

        Raises:
          InputError: longer than the model's context; or an empty source.
        """
        before, behind = self.tokenizer.around_source() if self.has_source else (self.tokenizer.opening, ())
        if self.has_source and not prompt:
            raise InputError("a source is empty; an encoder-decoder needs something to read")
        ids = [*before, *self.tokenizer.encode(prompt), *behind] or [self.tokenizer.bos]
        if len(ids) > self.recipe.model.context_length:
            raise InputError(
                f"the {'source' if self.has_source else 'prompt'} has {len(ids)} tokens and the model's context is "
                f"{self.recipe.model.context_length}; shorten it: {prompt[:40]!r}..."
            )
        return ids

    def _row(self, ids: list[int], key: jax.Array) -> Row:
        return Row(list(self.tokenizer.target_start), key, source=ids) if self.has_source else Row(list(ids), key)

    def sample(
        self,
        prompts: Sequence[str],
        *,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        greedy: bool = False,
        beams: int = 0,
        length_penalty: float | None = None,
        num: int = 1,
        seed: int = 0,
        stop: Sequence[str] = (),
        stream: Callable[[int, str], None] | None = None,
        encoded: list[list[int]] | None = None,
    ) -> list[Sample]:
        """Continue every prompt `num` times; with an encoder-decoder, the prompt is the source of what is written.

        Draw n of a prompt depends on (seed, n) and the prompt alone, never on the batch around it.

        Args:
          max_tokens: per continuation; None: 256, or 50 more than the source has (arXiv 1706.03762, section 6.1).
            Beyond the model's context, the text goes on from the last half of it, or ends where there is a source.
          beams: width of a beam search instead of sampling; `num` best hypotheses are returned.
          length_penalty: of a beam search; None: 0.6.
          stop: a continuation ends before the first of these strings.
          stream: called with (index of the result, new piece of text) while it is being made.
          encoded: the tokens that are read of each prompt; None: those of `encode_prompt`.

        Returns:
          prompts x num results, in the order of the prompts.

        Raises:
          InputError: numbers out of range, or a prompt longer than the context.
        """
        check_limits(max_tokens, num, stop)
        check_seed(seed)
        encoded = encoded or [self.encode_prompt(p) for p in prompts]
        if beams < 0:
            raise InputError(f"beams is {beams}; it must be at least 1, the hypotheses that a search keeps")
        if beams:
            if stream or stop or greedy:
                raise InputError("beam search knows its text only at the end: leave out --stream, --stop and --greedy")
            if (temperature, top_k, top_p, min_p) != (1.0, 0, 1.0, 0.0):
                raise InputError("beam search draws nothing: leave out --temperature, --top-k, --top-p and --min-p")
            alpha = 0.6 if length_penalty is None else length_penalty
            if not math.isfinite(alpha):
                raise InputError(f"length-penalty is {alpha}; it must be a finite number, such as 0.6")
            return self._search(prompts, encoded, beams, num, max_tokens, alpha)
        if length_penalty is not None:
            raise InputError("--length-penalty ranks what a beam search finds: add --beams, or leave it out")
        method = SamplingParams.make(temperature, top_k, top_p, min_p, greedy, never=never_drawn(self.tokenizer))
        fitting = rows_that_decode(self.recipe.model, max_tokens or 256)
        return self._continued(prompts, encoded, self.decoder, method, fitting, max_tokens, num, seed, stop, stream)

    def _continued(
        self,
        prompts: Sequence[str],
        encoded: list[list[int]],
        decoder: Decoder,
        method: SamplingParams,
        fitting: Callable[[int], int],
        max_tokens: PerPrompt | None,
        num: int,
        seed: PerPrompt,
        stop: Sequence[str],
        stream: Callable[[int, str], None] | None,
    ) -> list[Sample]:
        """What `sample` returns, by this decoder.

        Args:
          fitting: length of a prompt -> rows in a batch.
        """
        rows = [self._row(encoded[i // num], key) for i, key in enumerate(draw_keys(prompts, num, seed))]
        shown = [""] * len(rows)
        index = {id(row): i for i, row in enumerate(rows)}

        def after_chunk(batch: list[Row]) -> None:
            for row in batch:
                text, stopped = self._cut(row, stop)
                if stopped:
                    row.stop = "stop"
                if stream:
                    i = index[id(row)]
                    ready = text if row.stop else shown_so_far(text, stop)
                    if len(ready) > len(shown[i]):
                        stream(i, ready[len(shown[i]) :])
                        shown[i] = ready

        limits = for_each(max_tokens, len(prompts))
        chunk = 4 if stream else 32 if stop else 0
        for batch in batched(rows, prompt_length, fitting):
            most = [self._most(row, limits[index[id(row)] // num]) for row in batch]
            decoder.generate(self.run.params, batch, method, most, chunk=chunk, after_chunk=after_chunk)
        return [
            to_sample(self.tokenizer, prompts[i // num], self._ids(row), row.logprobs, row.stop, stop)
            for i, row in enumerate(rows)
        ]

    def _most(self, row: Row, max_tokens: int | None) -> int:
        if not self.has_source:
            return max_tokens or 256
        longest = self.recipe.model.context_length - len(self.tokenizer.target_start)
        return min(max_tokens or len(row.source) - 1 + 50, longest)

    def _ids(self, row: Row) -> list[int]:
        return row.tokens[:-1] if row.tokens and row.tokens[-1] == self.tokenizer.eos else row.tokens

    def _cut(self, row: Row, stop: Sequence[str]) -> tuple[str, bool]:
        return cut_at_stop(self.tokenizer.decode(self._ids(row)), stop)

    def _search(
        self, prompts: Sequence[str], encoded: list[list[int]], beams: int, num: int, max_tokens: int | None, alpha: float
    ) -> list[Sample]:
        if num > beams:
            raise InputError(f"num is {num}: a search with --beams {beams} has no more than {beams} hypotheses")
        rows = [self._row(ids, jax.random.key(0)) for ids in encoded]
        results: dict[int, list[Sample]] = {}
        index = {id(row): i for i, row in enumerate(rows)}
        fitting = rows_that_decode(self.recipe.model, max_tokens or 256)
        for batch in batched(rows, prompt_length, lambda length: max(1, fitting(length) // beams)):
            limits = [min(self._most(r, max_tokens), self.recipe.model.context_length - len(r.context)) for r in batch]
            if min(limits) < 1:
                raise InputError("a prompt fills the model's context; beam search does not go beyond it")
            state, _, _ = self.decoder.start(self.run.params, batch, limits)
            how = {"beams": beams, "alpha": alpha, "size": bucket(max(limits))}
            found = self._beams(self.run.params, state.cache, state.logits, state.limit, **how)
            done, length, logprob = jax.device_get((found.finished, found.finished_length, found.finished_logprob))
            for i, row in enumerate(batch):
                hypotheses = [done[i, k, : length[i, k]].tolist() for k in range(num)]
                made = zip(hypotheses, logprob[i].tolist(), strict=False)
                results[index[id(row)]] = [self._hypothesis(prompts[index[id(row)]], ids, lp) for ids, lp in made]
        return [sample for i in range(len(rows)) for sample in results[i]]

    def _hypothesis(self, prompt: str, ids: list[int], logprob: float) -> Sample:
        ended = bool(ids) and ids[-1] == self.tokenizer.eos
        text = self.tokenizer.decode(ids[:-1] if ended else ids)
        return Sample(prompt, text, len(ids), round(logprob, 3), "eos" if ended else "max_tokens")

    def score(self, texts: Sequence[str], rule: str = "causal") -> list[Score]:
        """Log-probability of every text as a document of its own.

        Rule causal: the sum over tokens of log p(token | those before it, in a context that opens a document). With an
        encoder-decoder a text is `source TAB target`, and the target's tokens and its end count, given the source.

        Raises:
          InputError: an empty text, or a rule that the family does not know.
        """
        if rule != "causal":
            raise InputError(f"rule {rule!r} is not for a {self.recipe.family} run, which scores by: causal")
        for i, text in enumerate(texts):
            if not text:
                raise InputError(f"text {i + 1} is empty; there is nothing to score")
        if self.has_source:
            pairs = [text.split("\t") for text in texts]
            if any(len(pair) != 2 or not all(pair) for pair in pairs):
                raise InputError("an encoder-decoder scores a target after its source: give `source TAB target` per line")
            logprobs, counts = self.score_pairs(pairs)
        else:
            sequences = [[self.tokenizer.bos, *self.tokenizer.encode(text)] for text in texts]
            logprobs = scoring.causal_logprobs(
                self.run.module, self.run.params, sequences, self.recipe.model.context_length
            )
            counts = [len(ids) - 1 for ids in sequences]
        return [Score.of(text, lp, n, rule) for text, lp, n in zip(texts, logprobs, counts, strict=True)]

    def score_pairs(self, pairs: Sequence[Sequence[str]]) -> tuple[list[float], list[int]]:
        """Of every (source, target) the log-probability of the target and its end, in nats, and how many tokens they are; what
        opens every target is given."""
        tokenizer, targets = self.tokenizer, self.tokenizer.of_targets
        before, behind = tokenizer.around_source()
        sides = (
            [[*before, *tokenizer.encode(source), *behind] for source, _ in pairs],
            [[*tokenizer.target_start, *targets.encode(target), tokenizer.eos] for _, target in pairs],
        )
        arguments = (self.run.module, self.run.params, *sides, self.recipe.model.context_length)
        given = len(tokenizer.target_start)
        return scoring.target_logprobs(*arguments, given=given), [len(ids) - given for ids in sides[1]]

    def embed(self, texts: Sequence[str], pool: str = "", prompt: str = "") -> np.ndarray:
        """[texts, D] float32: the mean of the last features over all tokens, or those of the last token (last); the
        encoder's, where there is one.

        Args:
          pool: empty: as the run says, else mean.
          prompt: the name of what the run puts before such a text.

        Raises:
          InputError: a text longer than the context; pool cls, since a first token sees nothing behind it; or a prompt that
            the run does not have.
        """
        said = read_embedding(self.run.home)
        info = said or EmbeddingInfo()
        pool, texts = pool or info.pool, prompted(info, texts, prompt)
        if pool not in ("mean", "last"):
            raise InputError(
                f"pool {pool!r} is not for a causal run: its first token sees nothing of the text; use mean or last"
            )
        if said:
            return shaped(info, vectors(self.run, texts, published_rows(self.run, info, texts), pool))
        before, behind = self.tokenizer.around_source() if self.has_source else ((self.tokenizer.bos,), ())
        rows = [[*before, *self.tokenizer.encode(text), *behind] for text in texts]
        return vectors(self.run, texts, rows, pool)
