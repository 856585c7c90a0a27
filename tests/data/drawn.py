"""Rows with text, special tokens and padding, and what is drawn for them, for tests of what is hidden."""

import numpy as np

from data.draws import Draws
from data.examples import Masking
from data.tokenizer import made_up_vocabulary

LENGTH, SIGMAS = 61, 4
VOCABULARY = made_up_vocabulary(211)
UNTOUCHED = Masking(mask_share=0.0, random_share=0.0)


def row_of(n: int) -> np.ndarray:
    """Text with special tokens in it, and padding at the end: as much of both as n says."""
    rng = np.random.default_rng([1, n])
    tokens = rng.choice(VOCABULARY.ordinary, LENGTH).astype(np.int32)
    tokens[rng.permutation(LENGTH)[: n % 7]] = rng.integers(1, 5, n % 7)
    tokens[LENGTH - n % 11 :] = VOCABULARY.pad
    return tokens


def singly(examples: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    return [dict(zip(examples, values, strict=True)) for values in zip(*examples.values(), strict=True)]


def draws_of(*numbers: int, seed: int = 0) -> Draws:
    return Draws(seed, np.array(numbers))


def near(count: float, trials: int, share: float) -> bool:
    """Whether a binomial count is within some standard deviations of what is expected."""
    return abs(count - trials * share) <= SIGMAS * np.sqrt(trials * share * (1 - share)) + 1e-9
