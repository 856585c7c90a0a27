"""Relations or structure: the symmetry of what attention compares, and what is left when the order of the words is lost."""

import json
import math
import random
from pathlib import Path

import jax
import numpy as np

from bothways.compare import pictures
from bothways.compare.core import Experiment, ExperimentRunner, Measurement, Pilot, Result, Table
from bothways.compare.stats import Estimate, all_of, difference, format_difference, mean, verdict
from bothways.compare.text import hidden_nats, text_of, vocabulary_of
from bothways.data import corpora
from bothways.data.config import DataConfig
from bothways.recipes import Recipe
from bothways.rundir import param_shapes
from bothways.sample.directions import directions


def parameter_count(recipe: Recipe) -> int:
    """Parameters of a recipe's model, with nothing allocated."""
    return sum(math.prod(s.shape) for s in jax.tree.leaves(param_shapes(recipe)))


def compared(params: dict) -> np.ndarray:
    """[L, D, D] W_q W_k^T of every layer, summed over heads: what attention makes of a pair (query, key)."""
    body = params.get("decoder") or params["encoder"]
    attention = body["stack"]["blocks"]["attention"]
    q, k = (np.asarray(attention[name]["kernel"], np.float64) for name in ("query", "key"))
    k = np.repeat(k, q.shape[2] // k.shape[2], axis=2)
    return np.einsum("ldhk,lehk->lde", q, k)


def symmetry(m: np.ndarray) -> float:
    """(|S|^2 - |N|^2) / |M|^2 of the symmetric and skew parts S, N of a matrix: 1, 0 for a random one, -1 (arXiv 2502.10927, 3).

    >>> symmetry(np.eye(3)), symmetry(np.array([[0.0, 1.0], [-1.0, 0.0]]))
    (1.0, -1.0)
    """
    return float((m * m.T).sum() / (m * m).sum())


def direction(m: np.ndarray, spread: float = 2.0) -> float:
    """(C - R) / (C + R), where C and R sum the norms of columns and of rows that stand out by `spread` deviations.

    1: some features of the key decide whatever the query; -1: the other way round (arXiv 2502.10927, section 3).
    """
    sums = []
    for axis in (0, 1):
        norms = np.linalg.norm(m, axis=axis)
        sums.append(float(norms[norms > norms.mean() + spread * norms.std()].sum()))
    return 0.0 if sum(sums) == 0 else (sums[0] - sums[1]) / sum(sums)


def shuffled(text: str, rng: random.Random) -> str:
    """The words of every line in a random order."""
    lines = [line.split(" ") for line in text.split("\n")]
    for words in lines:
        rng.shuffle(words)
    return "\n".join(" ".join(words) for words in lines)


def without_order(lab: ExperimentRunner) -> DataConfig:
    """The text of all arms, with the words of each line shuffled, and the same tokenizer."""
    cfg = lab.recipes["causal"].data

    def texts() -> tuple[list[str], list[str]]:
        corpus, rng = corpora.load(cfg), random.Random(0)
        train, held = ([shuffled(text, rng) for _, text in corpus.documents(s)] for s in ("train", "validation"))
        return train, held

    return lab.documents("shuffled", texts, vocabulary_of(lab))


def run(lab: ExperimentRunner) -> Result:
    found: dict[str, list[dict]] = {arm: [] for arm in lab.arms()}
    saved: dict[str, list[dict]] = {}
    for arm in found:
        for seed in lab.seeds:
            found[arm].append(lab.part(f"weights-{arm}-{seed}", lambda a=arm, s=seed: matrices(lab, a, s)))
    for arm in lab.arms("causal", "masked"):
        saved[arm] = [lab.part(f"order-{arm}-{s}", lambda a=arm, s=s: order(lab, a, s)) for s in lab.seeds]
    return conclude(found, saved)


def matrices(lab: ExperimentRunner, arm: str, seed: int) -> dict[str, list[float]]:
    m = compared(jax.device_get(lab.text(arm, seed).run.params))
    return {"symmetry": [symmetry(x) for x in m], "direction": [direction(x) for x in m]}


def order(lab: ExperimentRunner, arm: str, seed: int) -> dict[str, list[float]]:
    """[pieces] nats per token saved against the unigram, with the order of words and without it."""
    saved = {}
    for name, tag, data in (("with", "", None), ("without", "-shuffled", without_order(lab))):
        model = next(iter(directions(lab.text(arm, seed, tag=tag, data=data)).values()))
        text = text_of(lab)
        held = text.held if data is None else encoded(Path(data.validation), text)
        text = type(text)(text.tokenizer, text.train, held)
        pieces = text.pieces(max(4, lab.size.items // 4), model.context_length - 2)
        nats, unigram = hidden_nats(model, text, pieces, 0.15)
        saved[name] = (unigram - nats).tolist()
    return saved


def encoded(path: Path, text) -> np.ndarray:
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    return np.concatenate([np.asarray(ids) for ids in text.tokenizer.encode_many(texts)])


def conclude(found: dict[str, list[dict]], saved: dict[str, list[dict]]) -> Result:
    """`found` has symmetry and direction by layer, of each seed; `saved` is of each seed and piece."""
    figures, series, rows = [], {}, []
    rules = {"symmetry": "(|S|^2 - |N|^2) / |M|^2 of W_q W_k^T; a random matrix has 0"}
    rules["direction"] = "(C - R) / (C + R) of the norms of outlying columns and rows of W_q W_k^T"
    means: dict[tuple[str, str], list[float]] = {}
    for arm, by_seed in found.items():
        for what, rule in rules.items():
            layers = [mean([run[what][i] for run in by_seed]) for i in range(len(by_seed[0][what]))]
            means[arm, what] = [float(np.mean(run[what])) for run in by_seed]
            whole = mean(means[arm, what])
            figures.append(
                Measurement(f"{what}, {arm}, mean of layers", whole, f"{rule}; Student interval over seeds", baseline=0.0)
            )
            figures += [Measurement(f"{what}, {arm}, layer {i + 1}", e, rule, baseline=0.0) for i, e in enumerate(layers)]
            if what == "symmetry":
                series[arm] = [(i + 1, e) for i, e in enumerate(layers)]
            rows.append([arm, what, str(whole), *(f"{e.value:+.3f}" for e in layers)])
    shares: dict[str, Estimate] = {}
    saved_rows = []
    # Of every piece, over what the order of words saves on average: the mean is the share that is kept.
    kept = {arm: [np.divide(r["without"], np.mean(r["with"])) for r in runs] for arm, runs in saved.items()}
    for arm, runs in saved.items():
        shares[arm] = mean(kept[arm])
        rule = "nats per token saved against the unigram without word order, over those saved with it; the same masked positions"
        figures.append(Measurement(f"kept without word order, {arm}", shares[arm], rule))
        saved_rows.append([arm, *(str(mean([r[k] for r in runs])) for k in ("with", "without")), str(shares[arm])])
    more_symmetric = difference(means["masked", "symmetry"], means["causal", "symmetry"])
    less_order = difference(kept["masked"], kept["causal"])
    layers = [p[0] for p in series["causal"]]
    return Result(
        all_of(verdict(more_symmetric), verdict(less_order)),
        f"The symmetry of W_q W_k^T in the masked model differs from that in the causal model by {format_difference(more_symmetric)}. "
        f"Trained on text whose words are shuffled within each line, the masked model keeps {shares['masked'].value:.0%} of what it learned "
        f"beyond word counts, the causal model {shares['causal'].value:.0%} (difference {format_difference(less_order)}).",
        f"{len(kept['causal'])} seeds. With a symmetric matrix, attention depends on whether two words belong together and not on which "
        "comes first. The claim holds only if both differences are significant. Weights show what can be used, not what is used.",
        figures,
        [
            Table("W_q W_k^T by layer", ("model", "measure", "mean of layers", *(f"layer {i}" for i in layers)), rows),
            Table(
                "Nats per token saved against word counts, on text as it is and on text with the words of each line shuffled",
                ("model", "with order", "without", "share kept"),
                saved_rows,
            ),
        ],
        [
            (
                pictures.curves(series, "layer", "symmetry of W_q W_k^T", at=layers, a_random_matrix=0.0),
                "Symmetry by layer.",
            )
        ],
        f"symmetry {format_difference(more_symmetric)}, kept without word order {format_difference(less_order)}",
    )


EXPERIMENT = Experiment(
    "weights",
    "BERT's weights hold relations between words more than structure",
    "Built using a masking and a next-sentence prediction framework, its weights probably encode less of the structure of the "
    "english language as opposed to word-relation understandings (note obviously these are just my opinions).",
    "Symmetry and direction of W_q W_k^T are measured in every layer of each model. As a control, causal and masked models are "
    "trained again on the same text with the words of each line shuffled, which keeps relations and removes order.",
    "Bidirectional training gives symmetric, causal training directional matrices in models up to billions of parameters "
    "(arXiv 2502.10927); BERT trained on shuffled text keeps most of its GLUE score (arXiv 2104.06644).",
    run,
    pilots=(
        Pilot(0.011, "of symmetry"),
        Pilot(0.051, "in the share kept without word order"),
    ),
)
