"""The dial from GPT to BERT: blocks of one token to the whole row, what each size costs and what it gains."""

import dataclasses
import time
from typing import Any

import jax
import numpy as np

from bothways.compare.core import Experiment, ExperimentRunner, Pilot, Result
from bothways.compare.dial_result import ROWS, WAYS, conclude
from bothways.compare.text import text_of, vocabulary_of
from bothways.compare.writing import distinct, entropy, self_bleu
from bothways.config import ObjectiveConfig
from bothways.data import corpora
from bothways.data.config import DataConfig
from bothways.sample.decode import Row
from bothways.sample.denoise import Denoising
from bothways.sample.diffusion import DiffusionModel
from bothways.sample.sampling_params import SamplingParams
from bothways.sample.score import causal_logprobs

BLOCKS = (1, 2, 4, 8, 16, 32, 0)
"""0 is the whole row."""
FEW = (1, 4, 16, 0)
"""Of a size that trains for fewer than 100 steps."""
PROMPT, NEW, DRAWS = 31, 64, 16
"""Tokens of a prompt, with [CLS] before it; tokens behind it; draws of a bound. No block lies across the end of prompt or text: one
that is cut would take as many passes as a whole one."""

SECONDS = 2.0
"""After which a way of filling is not timed again."""


def named(block: int) -> str:
    return str(block) if block else "row"


def half_of_the_plays(lab: ExperimentRunner, which: int) -> DataConfig:
    """Every other document of the training text, with the vocabulary of all arms."""
    cfg = lab.recipes["causal"].data

    def texts() -> tuple[list[str], list[str]]:
        corpus = corpora.load(cfg)
        train, held = ([text for _, text in corpus.documents(split)] for split in ("train", "validation"))
        return (train[which::2] if len(train) > 1 else train), held

    return lab.documents(f"half-{which}", texts, vocabulary_of(lab))


def model_of(lab: ExperimentRunner, sizes: tuple[int, ...], seed: int) -> DiffusionModel:
    tag = "-dial-" + ("all" if len(sizes) > 1 else named(sizes[0]))
    ask = ObjectiveConfig(kind="diffusion", block_sizes=sizes)
    found = lab.text("causal", seed, tag=tag, objective=ask, data=half_of_the_plays(lab, 0))
    assert isinstance(found, DiffusionModel)
    return found


def judge_of(lab: ExperimentRunner) -> Any:
    """A larger causal model of the other half of the plays."""
    cfg = lab.recipes["causal"].model
    wide = {"n_layers": cfg.n_layers + 1, "d_model": 2 * cfg.d_model, "n_heads": 2 * cfg.n_heads}
    model = dataclasses.replace(cfg, **wide, n_kv_heads=0, d_head=0, d_value=0, d_ff=0)
    return lab.text("causal", 0, share=1.5, tag="-judge", model=model, data=half_of_the_plays(lab, 1))


def judged(judge: Any, prompts: list[list[int]], said: list[list[int]]) -> list[float]:
    """Bits per token of every text given its prompt."""
    bos, context = judge.tokenizer.bos, judge.recipe.model.context_length
    rows = [[bos, *p, *s] for p, s in zip(prompts, said, strict=True)] + [[bos, *p] for p in prompts]
    nats = np.array(causal_logprobs(judge.run.module, judge.run.params, rows, context))
    bits = -(nats[: len(said)] - nats[len(said) :]) / np.log(2)
    return (bits / [max(1, len(s)) for s in said]).tolist()


def sizes_of(lab: ExperimentRunner) -> tuple[int, ...]:
    """Those that a row has room for."""
    few = 0 < lab.size.text_steps < 100
    return tuple(b for b in (FEW if few else BLOCKS) if b < lab.recipes["causal"].model.context_length)


def lengths_of(lab: ExperimentRunner) -> tuple[int, int]:
    """(tokens of a prompt, tokens that are written behind it): PROMPT and NEW, or in that proportion what a row has room for."""
    quarter = min(lab.recipes["causal"].model.context_length // 4, PROMPT + 1)
    return quarter - 1, NEW * quarter // (PROMPT + 1)


def written(
    model: DiffusionModel, prompts: list[list[int]], block: int, way: str, new: int, seed: int
) -> tuple[list[list[int]], int]:
    """`new` tokens behind each prompt at temperature 1, without an end of text, and the forward passes of all rows.

    A whole row is one block that holds the prompt and all that is written. Prompts have one length.
    """
    bos, eos, key = model.tokenizer.bos, model.tokenizer.eos, jax.random.key(seed)
    rows = [Row([bos, *p], jax.random.fold_in(key, i)) for i, p in enumerate(prompts)]
    width, (a_pass, threshold, any_order) = block or 1 + len(prompts[0]) + new, WAYS[way]
    steps = -(-(width if block else new) // a_pass) if a_pass else 1
    decoder = model.block_decoder(width).filling(Denoising.make(steps, threshold, any_order=any_order))
    decoder.generate(model.run.params, rows, SamplingParams.make(), new)
    return [[t for t in row.tokens if t != eos] for row in rows], sum(row.passes for row in rows)


def ways_of(block: int) -> list[str]:
    """What makes a difference: where next tokens are predicted, a block of 2 has but one that is hidden."""
    return ["1 a pass"] if block in (1, 2) else [way for way, (a_pass, *_) in WAYS.items() if not block or a_pass < block]


def nats(lab: ExperimentRunner, sizes: tuple[int, ...], seed: int) -> dict[str, list[float]]:
    """Of one model, by block: nats of held-out pieces."""
    model = model_of(lab, sizes, seed)
    pieces = [[model.tokenizer.bos, *p] for p in held_pieces(lab)]
    return {named(block): (-model.bound_rows(pieces, None, DRAWS, block)).tolist() for block in sizes}


def held_pieces(lab: ExperimentRunner) -> list[list[int]]:
    return text_of(lab).pieces(max(8, lab.size.items // 6), lab.recipes["causal"].model.context_length - 1)


def texts_of(lab: ExperimentRunner) -> int:
    """How many texts are written each way. Fewer than are scored: ways of writing differ by far more than sizes of blocks."""
    return max(8, lab.size.items // 10)


def writes(lab: ExperimentRunner, block: int, seed: int) -> dict[str, Any]:
    """What the model for all writes in blocks of one size, by each way."""
    (known, new), model, judge = lengths_of(lab), model_of(lab, sizes_of(lab), seed), judge_of(lab)
    prompts, found = [p[:known] for p in text_of(lab).pieces(texts_of(lab), known + new)], {}
    for way in ways_of(block):
        said, passes = written(model, prompts, block, way, new, seed)
        found[way] = measures(judge, prompts, said) | {"per_pass": sum(map(len, said)) / max(1, passes)}
    return found


def measures(judge: Any, prompts: list[list[int]], said: list[list[int]]) -> dict[str, Any]:
    varied = {"distinct": distinct(said), "entropy": entropy(said), "self_bleu": self_bleu(said)}
    return {"judge": judged(judge, prompts, said)} | varied


def real(lab: ExperimentRunner) -> dict[str, Any]:
    """Held-out text by the same measures, and how many bytes its pieces have."""
    text, judge, (known, new) = text_of(lab), judge_of(lab), lengths_of(lab)
    lengths, pieces = text.tokenizer.byte_lengths(), text.pieces(texts_of(lab), known + new)
    found = measures(judge, [p[:known] for p in pieces], [p[known:] for p in pieces])
    return found | {"bytes": [int(lengths[p].sum()) for p in held_pieces(lab)]}


def speeds(lab: ExperimentRunner, block: int) -> dict[str, dict[str, float]]:
    """Tokens per second of the model for all in blocks of one size, by way of filling and rows, compiled before: the fastest of as many runs
    as begin within SECONDS, three at most."""
    (known, new), model = lengths_of(lab), model_of(lab, sizes_of(lab), 0)
    ways, found = ways_of(block), {way: {} for way in ways_of(block)}
    for rows in ROWS:
        prompts = [p[:known] for p in text_of(lab).pieces(rows, known + new)]
        for way in {WAYS[way][2]: way for way in ways}.values():  # a program for each order
            written(model, prompts, block, way, new, 1)
        for way in ways:
            took: list[float] = []
            while len(took) < 3 and sum(took) < SECONDS:
                began = time.monotonic()
                said, _ = written(model, prompts, block, way, new, 0)
                took.append(time.monotonic() - began)
            found[way][str(rows)] = sum(map(len, said)) / min(took)
    return found


def run(lab: ExperimentRunner) -> Result:
    """One seed of all models after another, a part for each: stopped anywhere, it goes on there."""
    sizes = sizes_of(lab)
    ends_first = sorted(sizes, key=lambda block: block > 1)
    models = {"all": sizes} | {named(b): (b,) for b in ends_first}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in (*map(named, sizes), "all")}
    of_real = lab.part("dial-real", lambda: real(lab))
    for seed in lab.seeds:
        for name, m in models.items():
            likelihoods = lab.part(f"dial-nats-{name}-{seed}", lambda m=m, s=seed: nats(lab, m, s))
            texts = {
                named(b): lab.part(f"dial-writes-{named(b)}-{seed}", lambda b=b, s=seed: writes(lab, b, s))
                for b in (sizes if name == "all" else ())
            }
            found[name].append({"nats": likelihoods, "writes": texts})
    fast = {named(b): lab.part(f"dial-speeds-{named(b)}", lambda b=b: speeds(lab, b)) for b in sizes}
    return conclude(found, of_real, fast)


EXPERIMENT = Experiment(
    "dial",
    "A token at a time, or a chunk",
    "The BERT model, runs once, predicts a chunk of values based on a chunk of input text, whereas the GPT model will predict the "
    "next word based on the previous words. Thus, for a text generation task BERT may be underequipped needing to process and "
    "output in text chunks vs a more natural iterative approach from the GPT framework.",
    "One network, one number: every token sees its block and all before it, and a share of the block is hidden. Blocks of 1 are "
    "a GPT, a block of the whole row is a BERT trained with all rates; a model for each size, and one for all, on half of the "
    "plays, at equal tokens. A larger causal model of the other half judges what is written.",
    "Block diffusion on LM1B and OpenWebText (arXiv 2503.09573): the smaller the block, the smaller the gap in perplexity to "
    "autoregressive models. Masked diffusion on LM1B (arXiv 2406.07524): a bound of 23 against 20.9.",
    run,
    pilots=(Pilot(0.016, "bits per byte between whole rows and single tokens"),),
)
