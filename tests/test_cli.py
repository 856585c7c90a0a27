"""The command line: results on standard output, everything else on standard error, exit codes that mean something."""

import io
import json
import os
import subprocess
import sys
import types

import pytest

import bothways
from bothways.cli import COMMANDS
from bothways.commands.chat import turns
from bothways.commands.plan import PlanOptions
from bothways.commands.shared import parse_recipe
from bothways.data import tokens
from bothways.errors import InputError
from bothways.sample.text import Score
from bothways.train.loop import Result

pytestmark = pytest.mark.usefixtures("loaded_once")
TINY_FLAGS = (
    "--model.n-layers 1 --model.d-model 16 --model.n-heads 2 --model.context-length 16 --data.vocab-size 320 --train.batch-size 8 "
    "--train.steps 4 --train.eval-every 2 --train.save-every 2 --train.eval-rows 8 --optimizer.warmup-steps 1"
).split()


@pytest.fixture(scope="module")
def tiny_args(text_file, cache_dir):
    return ["shakespeare_gpt", "--data.corpus", str(text_file), "--data.cache", str(cache_dir), *TINY_FLAGS]


@pytest.fixture(scope="module")
def run_home(tiny_args, tmp_path_factory):
    """A run trained through the command line."""
    home = tmp_path_factory.mktemp("cli") / "run"
    assert bothways.main(["train", *tiny_args, "--workdir", str(home)]) == 0
    return str(home)


def call(capfd, *argv, code=0):
    """(standard output, standard error) of a command that ends with this code."""
    assert bothways.main(list(argv)) == code
    return capfd.readouterr()


def test_train_prints_one_json_object(run_home, tiny_args, capfd):
    out, err = call(capfd, "train", *tiny_args, "--workdir", run_home, "--json")
    result = json.loads(out)
    assert set(result) == {"run", "steps", "loss", "bits_per_byte", "seconds", "tokens_per_second"}
    assert result["steps"] == 4
    assert "a sample without a prompt" in err


def test_only_texts_that_fit_are_filled_after_training(monkeypatch, capfd):
    """In a context of 16 characters and what stands around them, the first of the three texts is too long."""
    asked = []
    tokenizer = types.SimpleNamespace(encode=lambda text: text.replace("[MASK]", "?"))
    fill = lambda texts, **_: asked.extend(texts) or []  # noqa: E731
    model = types.SimpleNamespace(
        recipe=bothways.recipe("shakespeare_bert"), context_length=18, tokenizer=tokenizer, fill=fill
    )
    monkeypatch.setattr("bothways.train.loop.train", lambda *_: Result("x", 1, 1.0, None, 1.0, 1.0))
    monkeypatch.setattr("bothways.load", lambda *_, **__: model)
    monkeypatch.setattr("bothways.sample.evaluate.evaluate", lambda *_, **__: [])
    call(capfd, "train", "shakespeare_bert")
    assert asked == ["the [MASK] of the [MASK]", "I [MASK] you,"]


def test_a_run_that_cannot_be_shown_is_trained_all_the_same(monkeypatch, capfd):
    def evaluate(*_, **__):
        raise InputError("the validation split has no token that the model predicts")

    model = types.SimpleNamespace(recipe=bothways.recipe("shakespeare_bert"))
    monkeypatch.setattr("bothways.train.loop.train", lambda *_: Result("x", 1, 1.0, None, 1.0, 1.0))
    monkeypatch.setattr("bothways.load", lambda *_, **__: model)
    monkeypatch.setattr("bothways.sample.evaluate.evaluate", evaluate)
    out, err = call(capfd, "train", "shakespeare_bert", "--json")
    assert json.loads(out)["loss"] == 1.0
    assert "no token that the model predicts" in err


def test_sample_json(run_home, capfd):
    argv = ["sample", run_home, "the dog", "QUEEN:", "--num", "2", "--seed", "1", "--max-tokens", "9", "--json"]
    first = call(capfd, *argv).out
    results = [json.loads(line) for line in first.splitlines()]
    assert [r["prompt"] for r in results] == ["the dog", "the dog", "QUEEN:", "QUEEN:"]
    assert all(set(r) == {"prompt", "text", "tokens", "logprob", "stop"} for r in results)
    assert results[0]["text"] != results[1]["text"]
    assert call(capfd, *argv).out == first
    alone = call(capfd, "sample", run_home, "QUEEN:", *argv[4:]).out
    assert [json.loads(line)["text"] for line in alone.splitlines()] == [r["text"] for r in results[2:]]


def test_stream_shows_the_same_text(run_home, capfd):
    argv = ["sample", run_home, "the dog", "--max-tokens", "11"]
    assert call(capfd, *argv).out == call(capfd, *argv, "--stream").out


def test_score_reads_a_file(run_home, tmp_path, capfd):
    path = tmp_path / "lines.txt"
    path.write_text("the dog sees the cat in the garden.\ngarden the in cat the sees dog the.\n")
    results = [json.loads(line) for line in call(capfd, "score", run_home, str(path), "--json").out.splitlines()]
    assert [r["text"] for r in results] == path.read_text().splitlines()
    assert all(r["logprob"] < 0 and r["tokens"] > 3 and r["rule"] == "causal" for r in results)


def test_a_text_without_tokens_has_no_log_probability(monkeypatch, tmp_path, capfd):
    """A vocabulary may know nothing of it; 0 would say that it is certain."""
    model = types.SimpleNamespace(
        task=None, score=lambda texts: [Score.of(t, -2.0 * len(t), 0 if t == "?" else len(t), "causal") for t in texts]
    )
    monkeypatch.setattr("bothways.load", lambda *_, **__: model)
    (tmp_path / "lines.txt").write_text("abc\n?\n")
    argv = ["score", "run", str(tmp_path / "lines.txt")]
    found = [json.loads(line) for line in call(capfd, *argv, "--json").out.splitlines()]
    assert [(r["logprob"], r["tokens"]) for r in found] == [(-6.0, 3), (None, 0)]
    assert [line.split()[0] for line in call(capfd, *argv).out.splitlines()] == ["-6.000", "-"]


def test_lines_come_from_a_pipe_and_from_standard_input(monkeypatch, tmp_path, capfd):
    score = lambda texts: [Score.of(text, -1.0, 1, "causal") for text in texts]  # noqa: E731
    monkeypatch.setattr("bothways.load", lambda *_, **__: types.SimpleNamespace(task=None, score=score))
    reader, writer = os.pipe()  # as <(...) of a shell gives
    os.write(writer, b"a line\r\n")
    os.close(writer)
    assert "a line" in call(capfd, "score", "run", f"/dev/fd/{reader}").out
    os.close(reader)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfanother\n")))
    assert call(capfd, "score", "run", "-").out.endswith("  another\n")
    assert "is a directory; give a file" in call(capfd, "score", "run", str(tmp_path), code=2).err


def test_a_byte_order_mark_is_none_of_the_first_turn(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfwho is there?\r\n\nno one\n")))
    assert list(turns()) == ["who is there?", "no one"]


@pytest.mark.parametrize("argv", [["train"], ["evaluate"], ["import", "x"], ["finetune", "x"], ["export", "x"]])
def test_a_text_where_a_path_is_wanted_is_refused(capfd, argv):
    """Its name is too long for a file; nothing is read before."""
    assert "File name too long; name another" in call(capfd, *argv[:1], "to be or not " * 40, *argv[1:], code=2).err


def test_scores_are_shown_while_later_lines_wait(monkeypatch, tmp_path, capfd):
    shown = []

    def score(texts):
        shown.append(capfd.readouterr().out.count("\n"))
        return [Score.of(text, -1.0, 1, "causal") for text in texts]

    monkeypatch.setattr("bothways.load", lambda *_, **__: types.SimpleNamespace(task=None, score=score))
    (tmp_path / "lines.txt").write_text("a line\n" * 23)
    assert call(capfd, "score", "run", str(tmp_path / "lines.txt")).out.count("\n") == 23 - 8
    assert shown == [0, 8]


def test_evaluate_agrees_with_training(run_home, tiny_args, capfd, monkeypatch):
    """And reads no more text than it measures on."""
    trained = json.loads(call(capfd, "train", *tiny_args, "--workdir", run_home, "--json", "--train.eval-rows", "0").out)
    prepare, read = tokens.prepare, []
    monkeypatch.setattr(
        tokens, "prepare", lambda corpus, split, *rest: read.append(split) or prepare(corpus, split, *rest)
    )
    figures = [
        json.loads(line) for line in call(capfd, "evaluate", run_home, "validation", "test", "--json").out.splitlines()
    ]
    assert [(f["suite"], f["metric"]) for f in figures] == [
        (s, m) for s in ("validation", "test") for m in ("loss", "bits_per_byte")
    ]
    assert read == ["validation", "test"]
    assert figures[0]["value"] == pytest.approx(trained["loss"], rel=1e-4)
    assert figures[1]["value"] == pytest.approx(trained["bits_per_byte"], rel=1e-4)
    for f in figures:
        assert f["interval"][0] < f["value"] < f["interval"][1]


def refused(capfd, *argv):
    """The message of a command that is refused: exit code 2, nothing on standard output, no traceback."""
    out, err = call(capfd, *argv, code=2)
    assert out == ""
    assert "Traceback" not in err
    return err


def test_no_such_verb(capfd):
    assert "did you mean train?" in refused(capfd, "trian", "shakespeare_gpt")


def test_no_such_recipe(capfd):
    assert "did you mean shakespeare_gpt" in refused(capfd, "train", "shakespear_gpt")


def test_misspelt_field(capfd):
    err = refused(capfd, "train", "shakespeare_gpt", "--model.n-layer", "3")
    assert "--model.n-layer" in err
    assert "--model.n-layers" in err


def test_widths_that_do_not_divide(capfd, tiny_args, tmp_path):
    err = refused(capfd, "train", *tiny_args, "--model.n-heads", "3", "--workdir", str(tmp_path / "x"))
    assert "d_model=16" in err
    assert "n_heads=3" in err
    assert not (tmp_path / "x").exists()


def test_a_batch_that_the_mesh_does_not_divide(capfd, tiny_args, tmp_path):
    err = refused(capfd, "train", *tiny_args, "--train.batch-size", "12", "--workdir", str(tmp_path / "x"))
    assert "multiple of 8" in err


def test_a_mesh_that_is_not_here(capfd, tiny_args):
    assert "8 devices" in refused(capfd, "train", *tiny_args, "--mesh.data", "3")


def test_parameters_that_the_mesh_does_not_divide(capfd, tiny_args, tmp_path):
    err = refused(capfd, "train", *tiny_args, "--mesh.tensor", "8", "--workdir", str(tmp_path / "x"))
    assert "heads=2 is not divisible by mesh.tensor=8" in err


def test_a_kernel_for_another_device(capfd, tiny_args):
    assert "cudnn is for GPUs, and this is a cpu" in refused(capfd, "train", *tiny_args, "--model.attention", "cudnn")


def test_hosts_that_are_told_in_part(capfd, tiny_args):
    err = refused(capfd, "train", *tiny_args, "--hosts.count", "2")
    assert "count=2" in err
    assert "--hosts.coordinator ADDRESS:PORT" in err


def test_an_empty_corpus(capfd, tiny_args, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    assert "is empty" in refused(capfd, "train", *tiny_args, "--data.corpus", str(tmp_path / "empty.txt"))


def test_a_corpus_shorter_than_a_row(capfd, tiny_args, tmp_path):
    (tmp_path / "short.txt").write_text("the dog\nthe cat\n" * 3)
    err = refused(
        capfd, "train", *tiny_args, "--data.corpus", str(tmp_path / "short.txt"), "--data.vocab-size", "272",
        "--model.context-length", "100", "--workdir", str(tmp_path / "x"),
    )  # fmt: skip
    assert "less than one row of model.context_length=100" in err


def test_a_file_that_is_not_utf8(capfd, tiny_args, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"first line\nna\xefve text\n")
    err = refused(capfd, "train", *tiny_args, "--data.corpus", str(tmp_path / "latin.txt"))
    assert "ef 76 65" in err
    assert "offset 13 (line 2)" in err


def test_a_corpus_replaces_a_mixture_and_a_mixture_a_corpus():
    def named(recipe, *argv):
        made = parse_recipe("plan", [recipe, *argv], PlanOptions, "")[0].data
        return made.corpus, made.mixture

    assert named("gpt3_small", "--topology", "v5e:2x2")[1][0] == "c4/en=0.60"
    assert named("gpt3_small", "--topology", "v5e:2x2", "--data.corpus", "a.txt") == ("a.txt", ())
    two = ("a.txt=1", "b=2,10:3")
    assert named("shakespeare_gpt", "--topology", "v5e:2x2", "--data.mixture", *two) == ("", two)


def test_prepare_of_a_mixture_says_how_to_train(capfd, tmp_path, text_file):
    (tmp_path / "b.txt").write_text("That is the question.\n" * 400)
    mixture = [f"{text_file}=2", f"{tmp_path}/b.txt=1"]
    flags = ["--data.mixture", *mixture, "--data.tokenizer", "char", "--data.cache", str(tmp_path / "cache")]
    out, _ = call(capfd, "prepare", "shakespeare_gpt", "--to", str(tmp_path / "text"), *flags)
    assert f"train with --data.mixture {tmp_path}/text/tale=2 {tmp_path}/text/b=1" in out
    out, _ = call(capfd, "prepare", "shakespeare_gpt", "--to", str(tmp_path / "text"), "--json", *flags)
    assert [json.loads(line)["to"] for line in out.splitlines()] == [f"{tmp_path}/text/{name}" for name in ("tale", "b")]
    flags[1] = "a.txt=-1"
    _, err = call(capfd, "prepare", "shakespeare_gpt", "--to", str(tmp_path / "text"), *flags, code=2)
    assert "the weight '-1' must be a positive, finite number" in err


def test_a_vocabulary_larger_than_the_text_allows(capfd, tiny_args, tmp_path):
    err = refused(capfd, "train", *tiny_args, "--data.vocab-size", "7777", "--workdir", str(tmp_path / "x"))
    assert "7777" in err
    assert "at most" in err


def test_a_vocabulary_that_does_not_fit_the_model(capfd, tiny_args, tmp_path):
    err = refused(capfd, "train", *tiny_args, "--model.vocab-size", "100", "--workdir", str(tmp_path / "x"))
    assert "model.vocab_size=100 is smaller than the tokenizer's 320" in err


def test_a_prompt_longer_than_the_context(capfd, run_home):
    assert "the model's context is 16" in refused(capfd, "sample", run_home, "the dog sees the cat " * 9)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--temperature", "-1"], "temperature is -1"),
        (["--top-p", "0"], "top-p is 0"),
        (["--num", "0"], "num is 0"),
        (["--max-tokens", "0"], "max-tokens is 0"),
        (["--beams", "2", "--num", "3"], "no more than 2"),
        (["--stop", ""], "stop string is empty"),
        (["--stream", "--json"], "--stream"),
    ],
)
def test_bad_sampling_options(argv, message, capfd, run_home):
    assert message in refused(capfd, "sample", run_home, "the", *argv)


def test_a_directory_that_is_no_run(capfd, tmp_path):
    assert "is not a run directory" in refused(capfd, "sample", str(tmp_path), "x")
    assert "does not exist" in refused(capfd, "sample", str(tmp_path / "nothing"), "x")


def test_score_refuses_empty_lines_and_missing_files(capfd, run_home, tmp_path):
    (tmp_path / "gap.txt").write_text("one\n\ntwo\n")
    assert "line 2 is empty" in refused(capfd, "score", run_home, str(tmp_path / "gap.txt"))
    assert "no file" in refused(capfd, "score", run_home, str(tmp_path / "none.txt"))
    (tmp_path / "fine.txt").write_text("one\n")
    assert "rule 'pll'" in refused(capfd, "score", run_home, str(tmp_path / "fine.txt"), "--rule", "pll")


def test_no_such_suite(capfd, run_home):
    assert "there are validation, test" in refused(capfd, "evaluate", run_home, "glue")


def test_a_full_disk_is_said_and_the_run_goes_on_later(tiny_args, tmp_path):
    """A file-size limit stands in for a full disk: writes fail in the middle of a checkpoint."""
    home = tmp_path / "full"
    limited = (
        "import resource, sys; import bothways; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000)); sys.exit(bothways.main(sys.argv[1:]))"
    )
    argv = ["train", *tiny_args, "--workdir", str(home)]
    env = os.environ | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e9"}  # nothing is kept: it would be cut short
    done = subprocess.run([sys.executable, "-c", limited, *argv], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "the disk is full" in done.stderr
    # A thread of tensorstore may, now and then, tell of its own end; none of our frames is shown.
    assert 'bothways.py", line' not in done.stderr
    assert bothways.main(argv) == 0


def test_help_of_every_verb(capfd):
    for verb in COMMANDS:
        assert verb in call(capfd, verb, "--help").out
    assert all(verb in call(capfd, "--help").out for verb in COMMANDS)
