"""Every command with every family and --json: valid JSON, or exit code 2 and a message; never a traceback."""

import dataclasses
import io
import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bothways
from bothways import rundir
from bothways.commands.shared import emit
from bothways.config import ObjectiveConfig
from bothways.data import tokenizer as tokenizers
from bothways.data.config import DataConfig
from bothways.errors import InputError
from bothways.recipes import Recipe
from bothways.train.finetune import save
from tests.corpus import made_up_text
from tests.train.bodies import write

pytestmark = pytest.mark.usefixtures("one_device", "loaded_once")
KINDS = {
    "gpt": ("gpt", {"kind": "causal"}),
    "bert": ("bert", {"kind": "masked"}),
    "hybrid": ("gpt", {"kind": "hybrid"}),
    "pairs": ("seq2seq", {"kind": "pairs"}),
    "spans": ("seq2seq", {"kind": "spans"}),
    "diffusion": ("gpt", {"kind": "diffusion", "block_sizes": (2, 0)}),
    "bare": ("bert", {"kind": "masked"}),
    "tuned": ("gpt", {"kind": "causal"}),
}
BERT = {"norm_position": "post", "segment_types": 2, "embed_norm": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny, cache_dir, one_device):
    """A run of every kind with weights drawn at random, and the files that the commands read."""
    home = tmp_path_factory.mktemp("commands")
    tale = made_up_text(300)
    (home / "tale.txt").write_text(tale)
    sentences = [line for line in tale.splitlines() if line.startswith("the")]
    pairs = zip(sentences, sentences[1:], strict=False)
    (home / "pairs.tsv").write_text("a\tb\n" + "".join(f"{a}\t{b}\n" for a, b in pairs))
    rows = "".join(f"{s},{'dog' if 'dog' in s else 'none'}\n" for s in sentences[:90])
    (home / "labelled.csv").write_text("text,label\n" + rows)
    (home / "lines.txt").write_text("the dog sees\na king\n")
    (home / "pair.txt").write_text("the dog\tthe cat\n")
    tokenizer = tokenizers.train([made_up_text(60)], "bpe", 390)
    for name, (family, objective) in KINDS.items():
        bert = BERT if family == "bert" else {}
        model = dataclasses.replace(
            tiny, n_layers=1, context_length=32, vocab_size=len(tokenizer), masked_head=name != "bare", **bert
        )
        source = {"source_field": "a", "target_field": "b"} if name == "pairs" else {}
        corpus = home / ("pairs.tsv" if source else "tale.txt")
        recipe = Recipe(
            name=name,
            family=family,
            model=model.resolved(),
            objective=ObjectiveConfig(**objective),
            data=DataConfig(corpus=str(corpus), tokenizer="bpe", vocab_size=390, cache=str(cache_dir), **source),
        )
        rng, task = np.random.default_rng(1), None
        if name == "tuned":
            task = rundir.TaskInfo("dogs", "classify", ("dog", "none"), 32, ("accuracy",))
        params = jax.tree.map(lambda s: rng.normal(0, 0.3, s.shape).astype(s.dtype), rundir.param_shapes(recipe, task))  # noqa: B023
        run = rundir.Run(home / name, recipe, tokenizer, rundir.module_of(recipe, task), params, 0, task)
        if task:
            save(run.home, run, params, task)
        else:
            write(run, run.home)
    return home


def commands(home: Path, kind: str, out: Path) -> dict[str, list[str]]:
    """What is done with a run of that kind, by command."""
    run, recipe = str(home / kind), str(home / kind / "recipe.json")
    lines = str(home / ("pair.txt" if KINDS[kind][0] == "seq2seq" else "lines.txt"))
    tuning = "--learning-rates 0.01 --seeds 1 --epochs 1 --no-scratch --batch-size 16 --length 16".split()
    training = (
        "--train.steps 1 --optimizer.warmup-steps 0 --train.batch-size 2 --train.eval-rows 2 --train.eval-every 1".split()
    )
    found = {
        "sample": ["sample", run, "the dog", "--max-tokens", "3"],
        "fill": ["fill", run, "the [MASK] sees"],
        "score": ["score", run, lines],
        "embed": ["embed", run, lines],
        "search": ["search", run, lines, lines],
        "predict": ["predict", run, lines],
        "evaluate": ["evaluate", run, "--rows", "2"],
        "finetune": ["finetune", run, str(home / "labelled.csv"), "--workdir", str(out / "tuned"), *tuning],
        "export": ["export", run, str(out / "published")],
        "import": ["import", str(out / "published"), str(out / "imported")],
        "chat": ["chat", run, "--max-tokens", "3"],
        "prepare": ["prepare", recipe, "--to", str(out / "text")],
        "launch": ["launch", recipe, "--on", "slurm", "--topology", "h100:1x8", "--bucket", str(out), "--dry-run"],
        "train": ["train", run, "--workdir", str(out / "more"), *training],
    }
    return {name: argv for name, argv in found.items() if kind not in TOO_LONG.get(name, ())}


TOO_LONG = {
    "train": ("gpt", "hybrid", "spans", "diffusion", "bare", "tuned"),
    "finetune": ("gpt", "bert", "hybrid", "diffusion"),
}
"""Compiled for seconds, and no other path to the result than that of a kind which is there, or of tests/test_cli.py."""


REFUSED = {
    "gpt": {"fill", "predict"},
    "bert": {"chat", "predict"},
    "hybrid": {"predict"},
    "pairs": {"chat", "fill", "predict", "finetune"},
    "spans": {"chat", "fill", "predict", "finetune"},
    "diffusion": {"predict"},
    "bare": {"chat", "launch", "sample", "fill", "score", "predict", "evaluate"},
    "tuned": {"chat", "sample", "fill", "score", "embed", "search", "evaluate", "finetune"},
}
"""What a kind has no answer to."""


def plainly(text: str) -> object:
    """JSON as its standard has it, which knows no NaN."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("kind", KINDS)
def test_every_command_gives_json_or_says_what_is_wrong(folder, kind, tmp_path, capfd, monkeypatch):
    refused = set()
    for name, argv in commands(folder, kind, tmp_path).items():
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"the dog\n")))  # a turn of `chat`
        code = bothways.main([*argv, "--json"])
        out, err = capfd.readouterr()
        assert code in (0, 2), f"{name}: {err}"
        assert "Traceback" not in err
        if code == 2:
            refused.add(name)
            assert out == ""
            assert f"bothways {name}: " in err
            continue
        assert out.strip()
        assert all(isinstance(plainly(line), dict) for line in out.splitlines())
    assert refused == REFUSED[kind]


def test_a_result_is_plain_numbers_and_one_that_is_not_finite_is_no_result(capsys):
    emit({"a": np.float32(0.5), "b": np.arange(2), "c": {"d": (1, Path("x"))}}, True, "")
    assert plainly(capsys.readouterr().out) == {"a": 0.5, "b": [0, 1], "c": {"d": [1, "x"]}}
    for value, field in (({"loss": math.nan}, "loss is nan"), ({"of": {"v": [np.float32(np.inf)]}}, "of.v is inf")):
        for as_json in (True, False):
            with pytest.raises(InputError, match=field):
                emit(value, as_json, "shown")
    emit({"interval": (math.nan, 1.0), "value": 2.0}, True, "", undefined=("interval",))
    assert plainly(capsys.readouterr().out) == {"interval": [None, 1.0], "value": 2.0}


@pytest.mark.parametrize("argv", [["--temperature", "nan"], ["--temperature", "inf"], ["--beams", "-1"], ["--seed", "9" * 20],
                                  ["--beams", "2", "--length-penalty", "nan"], ["--top-p", "nan"], ["--min-p", "nan"],
                                  ["--stop", "\udcff"]])  # fmt: skip
def test_numbers_and_texts_that_are_none_are_refused(folder, argv, capfd):
    for kind in ("gpt", "pairs", "bert"):
        assert bothways.main(["sample", str(folder / kind), "the dog", "--max-tokens", "2", "--json", *argv]) == 2
        out, err = capfd.readouterr()
        assert out == ""
        assert err.startswith("bothways sample: ")


def test_weights_that_are_not_finite_give_no_results(folder, tmp_path, monkeypatch, capfd):
    loaded = bothways.load(folder / "bert")
    broken = dataclasses.replace(loaded.run, params=jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), loaded.run.params))
    monkeypatch.setattr("bothways.load", lambda *_, **__: type(loaded)(broken))
    for name in ("score", "embed"):
        assert bothways.main([name, "x", str(folder / "lines.txt"), "--json"]) == 2
        out, err = capfd.readouterr()
        assert out == ""
        assert "is nan, which is no result" in err


def test_standard_output_that_is_closed_or_full_is_no_success(folder):
    """And one that nobody reads to its end is."""
    command = f"{sys.executable} -m bothways.cli score {folder / 'gpt'} {folder / 'lines.txt'}"
    for redirect, code, message in ((">&-", 2, "standard output is closed"), ("> /dev/full", 2, "No space left")):
        done = subprocess.run(f"{command} {redirect}", shell=True, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    done = subprocess.run(
        f"{command.removesuffix(str(folder / 'lines.txt'))} <&-", shell=True, capture_output=True, check=False
    )
    assert done.returncode == 2
    assert b"standard input is closed" in done.stderr
