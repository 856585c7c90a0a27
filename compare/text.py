"""Running text for the experiments: held-out pieces, how well they are told, and pairs of sentences with a written key."""

import dataclasses
import functools
import random
from collections.abc import Sequence

import numpy as np

from bothways.compare.core import ExperimentRunner, asked
from bothways.data import corpora, tokens
from bothways.data.tokenizer import Tokenizer, vocabulary_file
from bothways.sample.masked import MaskedModel


@dataclasses.dataclass(frozen=True)
class Text:
    """The text that all arms share."""

    tokenizer: Tokenizer
    train: np.ndarray
    """Ids without specials."""
    held: np.ndarray

    @functools.cached_property
    def unigram(self) -> np.ndarray:
        """[V] log-probability of each token by its count in training, plus one."""
        counts = np.bincount(self.train, minlength=len(self.tokenizer)) + 1.0
        return np.log(counts / counts.sum())

    def pieces(self, count: int, length: int) -> list[list[int]]:
        """Pieces of held-out text, spread evenly."""
        count = max(1, min(count, len(self.held) // length))
        return [self.held[b : b + length].tolist() for b in np.linspace(0, len(self.held) - length, count).astype(int)]

    def bits(self, nats: float, pieces: Sequence[list[int]]) -> float:
        """Bits per byte."""
        lengths = self.tokenizer.byte_lengths()
        return float(nats / np.log(2) / sum(lengths[p].sum() for p in pieces))


def text_of(lab: ExperimentRunner) -> Text:
    """The corpus and tokenizer of the causal arm, which all arms take."""
    cfg = lab.recipes["causal"].data
    corpus = corpora.load(cfg)
    tokenizer = tokens.obtain_tokenizer(cfg, corpus)
    special = tokenizer.vocabulary().special
    ids = [np.asarray(tokens.prepare(corpus, s, tokenizer, cfg.cache).ids) for s in ("train", "validation")]
    return Text(tokenizer, *(part[~special[part]] for part in ids))


def vocabulary_of(lab: ExperimentRunner) -> str:
    """A file of the tokenizer that all arms share, for other texts of theirs."""
    home = lab.home / "data" / "vocabulary"
    if not home.is_dir():
        home.mkdir(parents=True)
        text_of(lab).tokenizer.save_in(home)
    return str(vocabulary_file(home))


def forward_nats(model: MaskedModel, pieces: Sequence[list[int]]) -> np.ndarray:
    """[pieces] -log p(piece | [CLS]) of a model read forward: rule causal."""
    rows = [[model.tokenizer.bos, *p] for p in pieces]
    return -np.array([x.sum() for x in asked(model, rows, [list(range(1, len(r))) for r in rows], list(pieces))])


def bound_nats(model: MaskedModel, pieces: Sequence[list[int]], draws: int = 32) -> np.ndarray:
    """[pieces] an upper bound on -log p(piece), read both ways: rule bound."""
    return -model.score_tokens(pieces, "bound", draws)


def hidden_nats(
    model: MaskedModel, text: Text, pieces: Sequence[list[int]], rate: float, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """(nats of the model, nats of the unigram) [pieces] per token at positions masked at this rate: the same for every model.

    A model read forward is scored at the same positions, and sees all that stands before each.
    """
    rng, rows, positions, targets = np.random.default_rng(seed), [], [], []
    for piece in pieces:
        row = [model.tokenizer.bos, *piece, model.tokenizer.eos]
        chosen = sorted((rng.permutation(len(piece))[: max(1, round(rate * len(piece)))] + 1).tolist())
        targets.append([row[p] for p in chosen])
        positions.append(chosen)
        if getattr(model.run.module, "both_ways", True):
            row = [model.tokenizer.mask if i in set(chosen) else t for i, t in enumerate(row)]
        rows.append(row)
    logprobs = np.array([x.mean() for x in asked(model, rows, positions, targets)])
    return -logprobs, -np.array([text.unigram[t].mean() for t in targets])


PAIRS: dict[str, list[tuple[str, str]]] = {
    "agreement": [
        ("The {n} is {p}.", "The {n} are {p}."),
        ("The {n}s are {p}.", "The {n}s is {p}."),
        ("I am {a}, my lord.", "I is {a}, my lord."),
        ("Thou art {a}, {n}.", "Thou am {a}, {n}."),
        ("He hath the {n} {p}.", "He have the {n} {p}."),
        ("They have the {n} {p}.", "They hath the {n} {p}."),
    ],
    "anaphora": [
        ("The {m} loves himself, and the {n} too.", "The {m} loves herself, and the {n} too."),
        ("The {f} loves herself, and the {n} too.", "The {f} loves himself, and the {n} too."),
        ("I will {v} myself, {n}.", "I will {v} himself, {n}."),
        ("We will {v} ourselves, {n}.", "We will {v} herself, {n}."),
    ],
    "polarity": [
        ("I have not seen any {n} {p}.", "I have seen any {n} {p}."),
        ("No man did ever {v} the {n}.", "That man did ever {v} the {n}."),
        ("Nor did he {v} any {n}.", "And he did {v} any {n}."),
    ],
    "order": [
        ("I will go to the {n} {p}.", "I will go the to {n} {p}."),
        ("What is the {n}, my lord?", "What the is {n}, my lord?"),
        ("Give me the {a} {n}.", "Give me {a} the {n}."),
        ("I do not {v} the {n}.", "I not do {v} the {n}."),
    ],
}
WORDS = {
    "n": "horse sword house friend soldier letter knave villain brother hand".split(),
    "m": "king prince father duke lord".split(),
    "f": "queen mother lady maid daughter".split(),
    "a": "good young noble sweet true".split(),
    "v": "love kill serve hear know".split(),
    "p": ["here", "in the house", "at the door", "with the king"],
}


def minimal_pairs(per_kind: int, seed: int = 0) -> list[tuple[str, str, str]]:
    """(phenomenon, right, wrong): sentences from templates that differ in what the key says, and in nothing else."""
    rng, found = random.Random(seed), []
    for kind, templates in PAIRS.items():
        made: set[tuple[str, str, str]] = set()
        for _ in range(50 * per_kind):
            if len(made) == per_kind:
                break
            right, wrong = rng.choice(templates)
            words = {k: rng.choice(v) for k, v in WORDS.items()}
            made.add((kind, right.format(**words), wrong.format(**words)))
        found += sorted(made)
    return found
