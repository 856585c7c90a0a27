"""The dial from GPT to BERT: blocks of one token to the whole row, what each size costs and what it gains."""

import dataclasses
import time
from typing import Any

import jax
import numpy as np

from bothways.compare import pictures
from bothways.compare.core import Experiment, ExperimentRunner, Measurement, Result, Table
from bothways.compare.stats import Estimate, all_of, detectable, format_difference, mean, two_way, verdict
from bothways.compare.text import text_of
from bothways.compare.writing import distinct, entropy
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
PROMPT, NEW = 8, 64
WAYS = {
    "1 a pass": (1, 0.0, True),
    "2 a pass": (2, 0.0, True),
    "4 a pass": (4, 0.0, True),
    "all at once": (0, 0.0, True),
    "most confident first": (1, 0.0, False),
    "above 0.9": (1, 0.9, False),
    "above 0.7": (1, 0.7, False),
    "above 0.5": (1, 0.5, False),
}
"""How a block is filled, as (tokens a pass, threshold, any order): some in a random order, which draws from the model's own
distribution as far as they are few; or the most confident ones, and all that are above a probability."""
EACH, ALL = "a model for each", "one model for all"


def named(block: int) -> str:
    return str(block) if block else "row"


def half_of_the_plays(lab: ExperimentRunner, which: int) -> DataConfig:
    """Every other document of the training text, with the vocabulary of all arms."""
    cfg = lab.recipes["causal"].data
    home = lab.home / "data" / "vocabulary"
    if not home.is_dir():
        home.mkdir(parents=True)
        text_of(lab).tokenizer.save_in(home)
    kept = next(p for p in ("tokenizer.json", "tokenizer.model") if (home / p).exists())

    def texts() -> tuple[list[str], list[str]]:
        corpus = corpora.load(cfg)
        train, held = ([text for _, text in corpus.documents(split)] for split in ("train", "validation"))
        return (train[which::2] if len(train) > 1 else train), held

    return lab.documents(f"half-{which}", texts, str(home / kept))


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
    """Those of BLOCKS that a row has room for."""
    return tuple(b for b in BLOCKS if b < lab.recipes["causal"].model.context_length)


def tokens_of(lab: ExperimentRunner) -> int:
    """How many tokens are written behind a prompt: NEW, or what a row has room for."""
    return min(NEW, lab.recipes["causal"].model.context_length - 1 - PROMPT)


def written(
    model: DiffusionModel, prompts: list[list[int]], block: int, way: str, new: int, seed: int
) -> tuple[list[list[int]], int]:
    """`new` tokens behind each prompt at temperature 1, without an end of text, and the forward passes of all rows.

    A whole row is one block that holds the prompt and all that is written.
    """
    bos, eos, key = model.tokenizer.bos, model.tokenizer.eos, jax.random.key(seed)
    rows = [Row([bos, *p], jax.random.fold_in(key, i)) for i, p in enumerate(prompts)]
    width, (a_pass, threshold, any_order) = block or 1 + PROMPT + new, WAYS[way]
    steps = -(-(width if block else new) // a_pass) if a_pass else 1
    decoder = model.block_decoder(width).filling(Denoising.make(steps, threshold, any_order=any_order))
    decoder.generate(model.run.params, rows, SamplingParams.make(), new)
    return [[t for t in row.tokens if t != eos] for row in rows], sum(row.passes for row in rows)


def ways_of(block: int) -> list[str]:
    """What makes a difference: where next tokens are predicted, a block of 2 has but one that is hidden."""
    return ["1 a pass"] if block in (1, 2) else [way for way, (a_pass, *_) in WAYS.items() if not block or a_pass < block]


def measured(lab: ExperimentRunner, sizes: tuple[int, ...], seed: int) -> dict[str, Any]:
    """Of one model, by block: nats of held-out pieces; and, of the model for all, what is written by each way."""
    text, model, judge = text_of(lab), model_of(lab, sizes, seed), judge_of(lab)
    room = model.recipe.model.context_length - 1
    new, count = tokens_of(lab), max(8, lab.size.items // 6)
    pieces = [[model.tokenizer.bos, *p] for p in text.pieces(count, room)]
    prompts = [p[:PROMPT] for p in text.pieces(count, PROMPT + new)]
    found: dict[str, Any] = {"nats": {}, "writes": {}}
    for block in sizes:
        found["nats"][named(block)] = (-model.bound_rows(pieces, None, 16, block)).tolist()
        for way in ways_of(block) if len(sizes) > 1 else ():
            said, passes = written(model, prompts, block, way, new, seed)
            found["writes"].setdefault(named(block), {})[way] = {
                "judge": judged(judge, prompts, said),
                "per_pass": sum(map(len, said)) / max(1, passes),
                "distinct": distinct(said),
                "entropy": entropy(said),
            }
    return found


def real(lab: ExperimentRunner) -> dict[str, Any]:
    """Held-out text by the same measures, and how many bytes its pieces have."""
    text, judge = text_of(lab), judge_of(lab)
    count, lengths = max(8, lab.size.items // 6), text.tokenizer.byte_lengths()
    pieces = text.pieces(count, PROMPT + tokens_of(lab))
    prompts, said = [p[:PROMPT] for p in pieces], [p[PROMPT:] for p in pieces]
    held = text.pieces(count, lab.recipes["causal"].model.context_length - 1)
    found = {"judge": judged(judge, prompts, said), "distinct": distinct(said), "entropy": entropy(said)}
    return found | {"bytes": [int(lengths[p].sum()) for p in held]}


def speeds(lab: ExperimentRunner) -> dict[str, dict[str, dict[str, float]]]:
    """Tokens per second of the model for all, by block, way of filling and rows; compiled before."""
    text, sizes, new = text_of(lab), sizes_of(lab), tokens_of(lab)
    model = model_of(lab, sizes, 0)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for rows in (1, 16):
        prompts = [p[:PROMPT] for p in text.pieces(rows, PROMPT + new)]
        for block in sizes:
            for way in ("1 a pass", "above 0.5"):
                if way in ways_of(block):
                    written(model, prompts, block, way, new, 1)
                    began = time.monotonic()
                    said, _ = written(model, prompts, block, way, new, 0)
                    per_second = sum(map(len, said)) / (time.monotonic() - began)
                    found.setdefault(named(block), {}).setdefault(way, {})[str(rows)] = per_second
    return found


def run(lab: ExperimentRunner) -> Result:
    models = [(b,) for b in sizes_of(lab)] + [sizes_of(lab)]
    names = [f"{named(m[0])}" if len(m) == 1 else "all" for m in models]
    found = {
        name: [lab.part(f"dial-{name}-{s}", lambda m=m, s=s: measured(lab, m, s)) for s in lab.seeds]
        for name, m in zip(names, models, strict=True)
    }
    return conclude(found, lab.part("dial-real", lambda: real(lab)), lab.part("dial-speeds", lambda: speeds(lab)))


SPEEDS = ("tokens/s, 1 row", "16 rows")
RULES = {
    "bits": "bits per byte of held-out text in blocks: exact at 1 and 2, a bound above, 16 draws; the truth is at most this",
    "judge": "bits per token that a larger causal model of other plays gives what is written, over what it gives real text",
    "per_pass": "tokens written per forward pass of a row, those over the prompt left out",
}


def conclude(found: dict[str, list[dict]], real: dict[str, Any], speeds: dict[str, Any]) -> Result:
    blocks = [name for name in found if name != "all"]
    size = np.array(real["bytes"], float)

    def nats(model: str, block: str) -> np.ndarray:
        return np.array([run["nats"][block] for run in found[model]]) / np.log(2)

    bits = {(EACH, b): two_way(nats(b, b), size) for b in blocks} | {
        (ALL, b): two_way(nats("all", b), size) for b in blocks
    }
    figures = [Measurement(f"bits per byte, blocks of {b}, {kind}", e, RULES["bits"]) for (kind, b), e in bits.items()]
    cost = two_way(nats("row", "row") - nats("1", "1"), size)
    shared = two_way(nats("all", "1") - nats("1", "1"), size)
    spread = float(
        np.std([(a.sum() - b.sum()) / size.sum() for a, b in zip(nats("row", "row"), nats("1", "1"), strict=True)])
    )

    def over_real(block: str, way: str) -> np.ndarray:
        """[seeds, texts] bits per token over real text, of the model for all."""
        return np.array([r["writes"][block][way]["judge"] for r in found["all"]]) - np.array(real["judge"])

    def average(block: str, way: str, what: str) -> float:
        return float(np.mean([r["writes"][block][way][what] for r in found["all"]]))

    def at(block: str) -> int:
        """Where a block size stands in the picture: the whole row at twice the last."""
        return int(block) if block != "row" else 2 * int(blocks[-2])

    frontiers: dict[bool, dict[str, list[tuple[float, Estimate]]]] = {True: {}, False: {}}
    rows = []
    for block in blocks:
        for way in found["all"][0]["writes"][block]:
            e, per_pass = two_way(over_real(block, way)), average(block, way, "per_pass")
            line = f"blocks of {block}" if block != "row" else "whole row"
            for any_order in (True, False) if block == "1" else (WAYS[way][2],):  # a GPT stands in both pictures
                frontiers[any_order].setdefault(line, []).append((per_pass, e))
            figures.append(Measurement(f"judge, blocks of {block}, {way}", e, RULES["judge"], expected=0.0))
            passes = mean([r["writes"][block][way]["per_pass"] for r in found["all"]])
            figures.append(Measurement(f"tokens per pass, blocks of {block}, {way}", passes, RULES["per_pass"]))
            fast = [f"{speeds.get(block, {}).get(way, {}).get(n, float('nan')):.0f}" for n in ("1", "16")]
            more = [f"{average(block, way, what):.3f}" for what in ("distinct", "entropy")]
            rows.append([block, way, f"{per_pass:.2f}", str(e), *more, *(["" if x == "nan" else x for x in fast])])
    rows.append(["real text", "", "", "0", f"{real['distinct']:.3f}", f"{real['entropy']:.3f}", "", ""])
    wide = "16" if "16" in blocks else blocks[-2]
    chunked = two_way(over_real(wide, "all at once") - over_real(wide, "1 a pass"))
    patient = two_way(over_real(wide, "1 a pass") - over_real("1", "1 a pass"))
    quick = average(wide, "above 0.5", "per_pass")
    at_half = two_way(over_real(wide, "above 0.5") - over_real("1", "1 a pass"))
    seeds = len(found["row"])
    power = (
        f"With the spread between these seeds, {spread:.3f} bits per byte, a difference of {detectable(spread, seeds):.3f} is "
        "found four times out of five. "
        if seeds > 1
        else ""
    )
    return Result(
        all_of(verdict(cost), verdict(chunked)),
        f"Predicting held-out text, a model of whole rows is {format_difference(cost, ' bits per byte')} worse than one of single "
        f"tokens, at equal tokens; one model for all sizes {format_difference(shared, ' bits')} worse than that at single "
        f"tokens. Writing in blocks of {wide}, a token a pass in any order, is to the judge "
        f"{format_difference(patient, ' bits per token')} further above real text than a token at a time from the left; all "
        f"{wide} at once {format_difference(chunked, ' bits')} further still. All tokens above a probability of 0.5, {quick:.1f} "
        f"a pass: {format_difference(at_half, ' bits')} against a token at a time, with {average(wide, 'above 0.5', 'distinct'):.0%} "
        f"of its pairs of tokens distinct against {average('1', '1 a pass', 'distinct'):.0%}: below real text is not better, but duller.",
        f"{seeds} seeds and {len(size)} held-out pieces, both in the intervals. {power}The claim counts as held if "
        f"whole rows predict worse than single tokens, and {wide} tokens at once are written worse than one by one. The bound is "
        "no likelihood: some of what whole rows lose is the bound's.",
        figures,
        [
            Table(
                "Bits per byte of held-out text",
                ("block", EACH, ALL),
                [[b, str(bits[EACH, b]), str(bits[ALL, b])] for b in blocks],
            ),
            Table(
                "What one model for all writes behind 8 held-out tokens, at temperature 1",
                ("block", "kept in a pass", "tokens a pass", "judge over real, bits", "distinct-2", "entropy", *SPEEDS),
                rows,
            ),
        ],
        [
            (
                pictures.curves(
                    {k: [(at(b), bits[k, b]) for b in blocks] for k in (EACH, ALL)},
                    "tokens in a block (the last: the whole row)",
                    "bits per byte",
                    log_x=True,
                    at=[at(b) for b in blocks],
                ),
                "Predicting held-out text: exact at 1 and 2, a bound above.",
            ),
            *(
                (
                    pictures.curves(
                        frontiers[any_order],
                        "tokens per forward pass",
                        "judge's bits over real text",
                        log_x=True,
                        at=(1, 2, 4, 8, 16, 32, 64),
                        real_text=0.0,
                    ),
                    f"Writing, {how}: quality against cost. Nearer to 0 is better, below it duller than real text; further "
                    "right is cheaper.",
                )
                for any_order, how in (
                    (True, "tokens in any order, some a pass"),
                    (False, "the most confident tokens first"),
                )
            ),
        ],
    )


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
    pilot=(0.022, "bits per byte between whole rows and single tokens"),
)
