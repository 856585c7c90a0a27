"""The bound along the dial: the likelihood itself where every conditional is known, and at blocks of one."""

import dataclasses
import itertools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bothways
from bothways.config import ObjectiveConfig
from bothways.data.tokenizer import MASK
from bothways.errors import InputError
from bothways.model.gpt import GPT
from bothways.sample import bound
from bothways.sample.bound import bound_logprobs
from bothways.sample.score import causal_logprobs
from bothways.train.loop import train

HIDDEN, LETTERS, N = 36, (5, 6, 7), 5
rng = np.random.default_rng(2)
TEXTS = list(itertools.product(LETTERS, repeat=N))
P = rng.dirichlet(np.full(len(TEXTS), 0.3))
ROWS = [[2, *text] for text in TEXTS]


class Oracle:
    """Every conditional of texts of five letters, exactly; or not quite: `power` sharpens, a blind one sees nothing of
    the open block."""

    def __init__(self, predicts: str, power: float = 1.0, blind: bool = False):
        self.power, self.blind = power, blind
        self.module = types.SimpleNamespace(
            predicts=predicts, cfg=GPT(bothways.TransformerConfig(d_model=8, n_heads=1)).cfg
        )
        self.known: dict[tuple, np.ndarray] = {}

    def conditional(self, seen: tuple[int, ...], t: int) -> np.ndarray:
        """[3] p(letter t | what is seen; 0 is not seen)."""
        if (seen, t) not in self.known:
            fits = [all(s in (0, x) for s, x in zip(seen, text, strict=True)) for text in TEXTS]
            p = np.array([sum(P[i] for i, text in enumerate(TEXTS) if fits[i] and text[t] == x) for x in LETTERS])
            p = (p + 1e-12) ** self.power
            self.known[seen, t] = p / p.sum()
        return self.known[seen, t]

    def __call__(self, module, params, batch, block: int) -> np.ndarray:
        found = np.zeros(batch["tokens"].shape)
        size = block or N + 1
        for i, (row, right) in enumerate(zip(batch["tokens"].tolist(), batch["targets"].tolist(), strict=True)):
            for t in range(1, N + 1 if right[0] else 0):  # the rest is padding
                begin = t // size * size
                first = module.predicts == "next" and t == begin
                if not first and row[t] != HIDDEN:
                    continue
                own = [0 if x == HIDDEN else x for x in row[begin : begin + size]]
                own = [0] * len(own) if first or self.blind else own
                seen = [*right[:begin], *own, *[0] * N][1 : N + 1]
                found[i, t] = np.log(self.conditional(tuple(seen), t - 1)[LETTERS.index(right[t])])
        return found


def missing(monkeypatch, oracle: Oracle, block: int, draws: int) -> float:
    """The mean over the distribution of log-likelihood - bound, in nats per text."""
    monkeypatch.setattr(bound, "denoised_logprobs", oracle)
    found = bound_logprobs(oracle.module, None, ROWS, 6, block, HIDDEN, draws)
    return float(P @ (np.log(P) - found))


@pytest.mark.parametrize("predicts", ["next", "own"])
def test_exact_conditionals_give_the_likelihood_at_every_block(monkeypatch, predicts):
    oracle = Oracle(predicts)
    assert missing(monkeypatch, oracle, 1, 32) == pytest.approx(0, abs=1e-4)  # nothing is drawn
    for block in (2, 3, 0):
        assert missing(monkeypatch, oracle, block, 60) == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize("wrong", [{"power": 2.0}, {"power": 0.4}, {"blind": True}], ids=lambda w: str(w))
def test_any_other_model_gets_less(monkeypatch, wrong):
    oracle = Oracle("own", **wrong)
    for block in (1, 3, 0):
        least = 0.0 if block == 1 and "blind" in wrong else 0.1  # in a block of one there is nothing to be blind to
        assert missing(monkeypatch, oracle, block, 20) >= least - 1e-4


# ---- a model -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2(tiny):
    module = GPT(dataclasses.replace(tiny, n_layers=2))
    return module, module.init(jax.random.key(1), jnp.zeros((1, 2), jnp.int32))["params"]


SEQUENCES = [rng.integers(5, 35, n).tolist() for n in (9, 40, 14)]


def test_at_blocks_of_one_it_is_the_likelihood(gpt2):
    """Also of texts longer than the context, and of their ends given their beginnings."""
    module, params = gpt2
    found = bound_logprobs(module, params, SEQUENCES, 23, 1, 36)
    np.testing.assert_allclose(found, causal_logprobs(module, params, SEQUENCES, 23), rtol=1e-5)
    short = [s[:14] for s in SEQUENCES]
    ends = bound_logprobs(module, params, short, 23, 1, 36, first=[4, 4, 4])
    begins = causal_logprobs(module, params, [s[:4] for s in short], 23)
    np.testing.assert_allclose(ends + begins, causal_logprobs(module, params, short, 23), rtol=1e-5)


def test_a_context_is_never_hidden_and_a_text_scores_alone_what_it_scores_among_others(gpt2, monkeypatch):
    module, params = gpt2
    together = bound_logprobs(module, params, SEQUENCES, 23, 4, 36, 5, first=[3, 1, 9])
    for i, (sequence, first) in enumerate(zip(SEQUENCES, (3, 1, 9), strict=True)):
        np.testing.assert_allclose(
            bound_logprobs(module, params, [sequence], 23, 4, 36, 5, first=[first]), together[i], rtol=1e-4
        )
    seen = []
    monkeypatch.setattr(
        bound, "denoised_logprobs", lambda m, p, batch, b: seen.append(batch) or np.zeros(batch["tokens"].shape)
    )
    bound_logprobs(module, params, [SEQUENCES[2]], 23, 4, 36, 50, first=[6])
    hidden = np.concatenate([b["tokens"] == 36 for b in seen])
    assert not hidden[:, :6].any()
    assert hidden[:, 6:14].any(axis=0).tolist() == [True, True, False, True, True, True, False, True]


# ---- a run ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tiny_recipe, tmp_path_factory, one_device):
    home = tmp_path_factory.mktemp("dial")
    model = dataclasses.replace(tiny_recipe.model, n_layers=1, scan_layers=False)
    objective = ObjectiveConfig(kind="diffusion", block_sizes=(1, 4, 0))
    often = dataclasses.replace(tiny_recipe.train, steps=4, eval_rows=16)
    train(dataclasses.replace(tiny_recipe, model=model, objective=objective, train=often), home)
    return home


def test_a_run_writes_fills_scores_and_is_evaluated_along_the_dial(run, tmp_path, capsys):
    (tmp_path / "texts").write_text("the king\nthe castle in the garden calls a dog and the king sleeps\n")

    def answers(*argv: str) -> list[dict]:
        assert bothways.main([*argv, "--json"]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    by_block = {b: answers("score", str(run), str(tmp_path / "texts"), "--block", b) for b in ("1", "4", "0")}
    exact = answers("score", str(run), str(tmp_path / "texts"), "--rule", "causal")
    assert [round(s["logprob"], 1) for s in by_block["1"]] == [round(s["logprob"], 1) for s in exact]
    assert {s["rule"] for s in by_block["4"]} == {"bound"}
    assert len({scores[1]["logprob"] for scores in by_block.values()}) == 3
    figures = {f["metric"]: f for f in answers("evaluate", str(run))}
    assert list(figures) == [f"bits_per_byte_block_{b}" for b in ("1", "4", "row")]
    for figure in figures.values():
        assert figure["interval"][0] < figure["value"] < figure["interval"][1]
    held = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert held["eval_bits_per_byte_low"] < held["eval_bits_per_byte"] < held["eval_bits_per_byte_high"]
    (drawn,) = answers("sample", str(run), "the king", "--block", "4", "--steps", "2", "--max-tokens", "9")
    assert drawn["tokens"] <= 9
    assert answers("fill", str(run), f"the {MASK} sleeps")[0]["masks"]
    with pytest.raises(InputError, match=r"block is 3, and .* was trained on blocks of 1, 4, the whole row \(0\)"):
        bothways.load(run).score(["the"], block=3)


def test_a_harness_scores_continuations_by_the_bound(run):
    backend = pytest.importorskip("bothways.sample.lm_eval_backend", reason="needs lm-eval")
    model = bothways.load(run)
    found, exact = backend.BothwaysLM(model), backend.BothwaysLM(model, rule="causal")
    assert found.rule == "bound"
    pairs = [("the king", " sleeps"), ("", "the castle")]
    requests = [(pair, found.tok_encode(pair[0]), found.tok_encode(pair[1])) for pair in pairs]
    for (a, greedy), (b, _) in zip(
        found._loglikelihood_tokens(requests), exact._loglikelihood_tokens(requests), strict=True
    ):
        assert a == pytest.approx(b, rel=1e-4)  # blocks of one are among those trained on
        assert not greedy
