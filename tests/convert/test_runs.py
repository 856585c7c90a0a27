"""An imported run is a run like any other: it samples, embeds, goes out again, and trains on."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import sentencepiece as spm
from huggingface_hub.utils import filter_repo_objects
from safetensors.numpy import load_file, save_file

import bothways
from bothways.config import TrainConfig
from bothways.convert import files
from bothways.convert.check import digest
from bothways.convert.files import REFERENCE, WEIGHTS, Checkpoint
from bothways.convert.run import export_run, import_run
from bothways.convert.stored import save_tensors
from bothways.errors import InputError
from bothways.recipes import Recipe
from bothways.rundir import load_run
from bothways.sample.evaluate import evaluate
from bothways.train.loop import train
from tests.convert.published import change, checkpoint, quiet, refused, save_tokenizer
from tests.corpus import made_up_text
from tests.train.bodies import body, write


@pytest.fixture(scope="module", autouse=True)
def no_transformers():
    """Comparing with transformers takes longer, and is done in test_parity.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bothways.convert.check.transformers_logits", lambda *_: (None, ""))
        yield


def imported(source: Path, home: Path):
    import_run(str(source), home, "shakespeare", quiet)
    return load_run(home, quiet)


@pytest.fixture(scope="module")
def gpt(tmp_path_factory):
    """A GPT-2 checkpoint and the run that it became."""
    home = tmp_path_factory.mktemp("gpt")
    source = checkpoint("gpt2", home / "source")
    import_run(str(source), home / "run", "shakespeare", quiet)
    return source, home / "run"


def test_import_and_export_say_what_they_did(gpt, tmp_path, capfd):
    source, home = gpt[0], tmp_path / "run"
    assert bothways.main(["import", str(source), str(home), "--json"]) == 0
    said = json.loads(capfd.readouterr().out)
    count = sum(t.size for t in load_file(source / "model.safetensors").values())
    assert said == {"run": str(home), "family": "gpt2", "parameters": count, "max_difference": None}
    assert bothways.main(["export", str(home), str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == said | {"run": str(tmp_path / "out")}
    first, out = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert first.keys() == out.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], out[name])
    assert bothways.main(["sample", str(home), "the dog", "--max-tokens", "3", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["tokens"] == 3


def test_every_verb_takes_a_published_vocabulary(gpt, text_file, cache_dir, tmp_path):
    """Both families on a text file: WordPiece for the masked model, byte-level BPE for the causal one."""
    import_run(str(checkpoint("bert", tmp_path / "source")), tmp_path / "bert", str(text_file), quiet)
    for home in (gpt[1], tmp_path / "bert"):
        run = load_run(home, quiet)
        data = dataclasses.replace(run.recipe.data, corpus=str(text_file), cache=str(cache_dir))
        (home / "recipe.json").write_text(dataclasses.replace(run.recipe, data=data).to_json())
        model, masked = bothways.load(home), home.name == "bert"
        assert model.sample(["the dog"], max_tokens=2, **({"block": 2, "steps": 1} if masked else {}))[0].tokens == 2
        likely, long = model.score(["the dog", "the dog sees the queen"], **({"rule": "pll"} if masked else {}))
        assert likely.logprob > long.logprob
        assert np.isfinite(model.embed(["the dog"])).all()
        figures = {f.metric: f.value for f in evaluate(model, ["validation"])}
        assert 0 < figures["bits_per_byte"] < 20
    filled = model.fill(["The [MASK] sees"], top=2)[0]
    assert filled.filled.startswith("the")
    assert [len(m) for m in filled.masks] == [2]


def test_a_run_trained_here_goes_out_and_comes_back(tiny, tmp_path):
    """With its own sentencepiece vocabulary; `transformers` opens its weights, and the import its vocabulary too."""
    run = body("gpt", tiny, d_head=11, d_value=11, attention="xla")  # how it is computed, nobody else needs to know
    write(run, tmp_path / "run")
    assert export_run(tmp_path / "run", tmp_path / "out", quiet).family == "gpt2"
    back = imported(tmp_path / "out", tmp_path / "back")
    assert back.tokenizer.fingerprint == run.tokenizer.fingerprint
    same = {field: getattr(tiny, field) for field in ("init", "init_residual", "dtype")} | {"attention": "xla"}
    assert dataclasses.replace(back.recipe.model, **same) == run.recipe.model
    jax.tree.map(np.testing.assert_array_equal, back.params, run.params)


def from_hub(home: Path, cache: Path, monkeypatch) -> Checkpoint:
    """What is read where a directory lies on the hub, of which the files that are asked for are fetched."""

    def fetched(name, allow_patterns, ignore_patterns):
        names = [str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (cache / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(home / name, cache / name)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    return files.read("owner/name")


def test_a_run_on_the_hub_has_the_vocabulary_of_its_directory(tiny, tmp_path, monkeypatch):
    """Else text that was prepared with the one is refused with the other."""
    run = body("gpt", tiny)
    write(run, tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out", quiet)
    found = from_hub(tmp_path / "out", tmp_path / "cache", monkeypatch)
    assert found.tokenizer.fingerprint == run.tokenizer.fingerprint


def test_a_sentencepiece_model_beside_a_published_vocabulary_is_left_alone(tmp_path, monkeypatch):
    """As in Llama's directories, also where it knows a [PAD]."""
    source = checkpoint("llama", tmp_path / "source")
    wanted = files.read(str(source)).tokenizer.fingerprint
    with (source / "tokenizer.model").open("wb") as model:
        lines = iter(made_up_text(60).split("\n"))
        spm.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=model, vocab_size=60, user_defined_symbols=["[PAD]"], minloglevel=2
        )
    assert files.read(str(source)).tokenizer.fingerprint == wanted
    assert from_hub(source, tmp_path / "cache", monkeypatch).tokenizer.fingerprint == wanted


def test_a_stored_reference_is_held_against_the_weights(gpt, tmp_path, capfd):
    """But for weights that were trained on since it was written: those are not what it is of."""
    _, home = gpt
    out = tmp_path / "out"
    export_run(home, out, quiet)
    assert import_run(str(out), tmp_path / "same", "shakespeare", quiet).max_difference < 1e-5
    table = load_file(out / WEIGHTS)["transformer.wpe.weight"]
    table[1, 3] += 0.1
    change(out, **{"transformer/wpe/weight": table})
    logged: list[str] = []
    import_run(str(out), tmp_path / "later", "shakespeare", logged.append)
    assert f"the weights beside {REFERENCE} have changed since it was written" in logged[0]
    reference = load_file(out / REFERENCE)
    save_file(reference, out / REFERENCE, {"weights": digest(out)})
    refused(out, tmp_path / "run", capfd, "the logits differ from the reference by", "nothing was written")


def test_rounding_that_loses_something_is_refused_for_what_it_is(gpt, tmp_path, capfd):
    export_run(gpt[1], tmp_path / "out", quiet)
    code = bothways.main(["import", str(tmp_path / "out"), str(tmp_path / "run"), "--dtype", "bfloat16"])
    assert code == 2
    assert "rounded to bfloat16" in (err := capfd.readouterr().err)
    assert "--dtype float32" in err
    assert not (tmp_path / "run").exists()


def test_a_reference_knows_weights_in_several_files(gpt, tmp_path, monkeypatch):
    monkeypatch.setattr("bothways.convert.run.save_tensors", functools.partial(save_tensors, shard_bytes=3000))
    export_run(gpt[1], tmp_path / "out", quiet)
    before = digest(tmp_path / "out")
    shard = max((tmp_path / "out").glob("model-*.safetensors"))
    save_file({k: v + 1 for k, v in load_file(shard).items()}, shard, {"format": "pt"})
    assert before != digest(tmp_path / "out")


@pytest.mark.parametrize(
    ("argv", "field"),
    [
        (["export", "RUN", "out", "--adapters", "--dtype", "bfloat16"], "--dtype"),
        (["export", "RUN", "out", "--adapters", "--embeds", "mean"], "--embeds"),
        (["export", "RUN", "out.gguf", "--adapters"], "out.gguf"),
        (["export", "RUN", "out.gguf", "--license", "mit"], "--license"),
        (["import", "peft", "out", "--base", "RUN", "--dtype", "bfloat16"], "--dtype"),
        (["import", "peft", "out", "--base", "RUN", "--corpus", "bible"], "--corpus"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(gpt, argv, field, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text("{}")
    assert bothways.main([str(gpt[1]) if a == "RUN" else a for a in argv]) == 2
    assert field in capfd.readouterr().err.partition("\n")[0]


def continuation_of(home: Path, text: Path, cache: Path) -> Recipe:
    """The recipe that the command line makes of `train RUN`, small."""
    from bothways.commands.train import continuation_of

    found = continuation_of(home)
    data = dataclasses.replace(found.data, corpus=str(text), cache=str(cache))
    cfg = TrainConfig(steps=2, batch_size=8, eval_rows=8, init_from=found.train.init_from)
    optimizer = dataclasses.replace(found.optimizer, learning_rate=1e-9, warmup_steps=0)
    return dataclasses.replace(
        found, data=data, train=cfg, optimizer=optimizer, model=dataclasses.replace(found.model, context_length=16)
    )


def leaves(params) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(p): np.asarray(x) for p, x in jax.tree_util.tree_leaves_with_path(params)}


def test_training_starts_from_an_import_and_resumes_itself_first(gpt, text_file, cache_dir, tmp_path):
    """1. what is in the directory; 2. and 3. the run that is named; 4. scratch."""
    _, home = gpt
    recipe = continuation_of(home, text_file, cache_dir)
    train(recipe, tmp_path / "on")
    theirs, mine = leaves(load_run(home, quiet).params), leaves(load_run(tmp_path / "on", quiet).params)
    for path, leaf in mine.items():  # learned positions are cut to the new context
        np.testing.assert_allclose(leaf, theirs[path][:16] if "position" in path else theirs[path], atol=1e-6)
    moved = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, init_from=str(tmp_path / "gone")))
    with pytest.raises(InputError, match="gone does not exist"):
        train(moved, tmp_path / "other")
    started = (tmp_path / "on" / "recipe.json").read_text()
    was, now = (f'"init_from": "{r.train.init_from}"' for r in (recipe, moved))
    (tmp_path / "on" / "recipe.json").write_text(started.replace(was, now))
    assert train(moved, tmp_path / "on").steps == 2  # resumed: where it began is not looked for
    with pytest.raises(InputError, match="n_layers is 2, and there 3"):
        train(dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, n_layers=2)), tmp_path / "other")
    save_tokenizer("llama", tmp_path / "llama")
    other = dataclasses.replace(recipe.data, tokenizer=str(tmp_path / "llama" / "tokenizer.json"))
    with pytest.raises(InputError, match=r"the tokenizer is another; set --data.tokenizer .*tokenizer.json"):
        train(dataclasses.replace(recipe, data=other), tmp_path / "other")


def test_a_body_without_a_head_embeds_and_gets_a_head_by_training(text_file, cache_dir, tmp_path, capfd):
    source = checkpoint("bert", tmp_path / "source")
    change(source, **{k.replace(".", "/"): None for k in load_file(source / "model.safetensors") if k.startswith("cls.")})
    run = imported(source, tmp_path / "body")
    assert not run.recipe.model.masked_head
    assert run.recipe.model.pooler
    (tmp_path / "text").write_text("the dog\nthe dog sees\n")
    assert bothways.main(["embed", str(tmp_path / "body"), str(tmp_path / "text"), "--json"]) == 0
    assert len(json.loads(capfd.readouterr().out.splitlines()[1])["vector"]) == 22
    for verb, *rest in (["fill", "the [MASK]"], ["score", str(tmp_path / "text")], ["evaluate"]):
        assert bothways.main([verb, str(tmp_path / "body"), *rest]) == 2
        assert "without a masked-token head: it can embed and be fine-tuned" in capfd.readouterr().err
    recipe = continuation_of(tmp_path / "body", text_file, cache_dir)
    with pytest.raises(InputError, match=r"set --model.masked-head$"):
        train(dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, masked_head=False)), tmp_path / "on")
    train(recipe, tmp_path / "on")
    assert "new and random: mlm" in capfd.readouterr().err
    theirs, mine = leaves(run.params), leaves(load_run(tmp_path / "on", quiet).params)
    assert mine.keys() - theirs.keys() == {k for k in mine if "mlm'" in k}
    np.testing.assert_allclose(
        mine["['encoder']['embed']['token']['embedding']"],
        theirs["['encoder']['embed']['token']['embedding']"],
        atol=1e-6,
    )
