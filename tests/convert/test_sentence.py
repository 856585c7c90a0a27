"""Directories of sentence-transformers in and out: pooling, length 1, prompts, and how much of a text is read."""

import json

import numpy as np
import pytest

import bothways
from bothways.convert import sentence
from bothways.convert.run import export_run, import_run
from bothways.embedding import EmbeddingInfo
from bothways.errors import InputError
from tests.convert.published import checkpoint, quiet, refused

TEXTS = ["the dog sees the queen", "the king"]
QUERY = EmbeddingInfo("mean", True, 7, {"query": "the queen: "}, "dot")
CASES = {
    "bert": QUERY,
    "distilbert": EmbeddingInfo("cls", False, 0, {"query": "a ", "text": "b "}, default_prompt="text"),
    "llama": EmbeddingInfo("last", True),
}


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Name of a case -> (its directory, its run); made once, without comparing logits."""
    made = {}

    def of(name: str):
        if name not in made:
            home = tmp_path_factory.mktemp(name)
            values, width = ({"hidden_size": 24}, 24) if name == "llama" else ({}, 22)
            sentence.write(checkpoint(name, home / "source", **values), CASES[name], width)
            if name == "llama":  # sentence-transformers pads texts to one length
                roles = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
                (home / "source" / "tokenizer_config.json").write_text(json.dumps(roles))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("bothways.convert.check.transformers_logits", lambda *_: (None, ""))
                import_run(str(home / "source"), home / "run", "shakespeare", quiet)
            made[name] = home / "source", home / "run"
        return made[name]

    return of


@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_vectors_are_those_of_sentence_transformers_before_and_after(imported, name, tmp_path, monkeypatch):
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    monkeypatch.setattr("bothways.convert.check.transformers_logits", lambda *_: (None, ""))
    source, home = imported(name)
    export_run(home, tmp_path / "out", quiet)
    model = bothways.load(home)
    prompts = ["", *CASES[name].prompts]
    for place in (source, tmp_path / "out"):
        theirs = library.SentenceTransformer(str(place), device="cpu")
        for prompt in prompts:
            wanted = theirs.encode(TEXTS, **({"prompt_name": prompt} if prompt else {}))
            np.testing.assert_allclose(model.embed(TEXTS, prompt=prompt), wanted, atol=1e-5)


def test_the_files_of_an_export_are_those_that_came(imported, tmp_path, monkeypatch):
    monkeypatch.setattr("bothways.convert.check.transformers_logits", lambda *_: (None, ""))
    source, home = imported("bert")
    export_run(home, tmp_path / "out", quiet)
    assert sentence.read(tmp_path / "out") == QUERY
    settings = json.loads((tmp_path / "out" / "config_sentence_transformers.json").read_text())
    assert settings["similarity_fn_name"] == "dot"
    for name in (sentence.MODULES, "1_Pooling/config.json", "config_sentence_transformers.json"):
        assert (source / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    with pytest.raises(InputError, match="no prompt 'answer'; this run has query"):
        bothways.load(home).embed(TEXTS, prompt="answer")


def test_a_run_trained_here_leaves_with_a_pooling_where_one_is_chosen(imported, tmp_path, monkeypatch):
    monkeypatch.setattr("bothways.convert.check.transformers_logits", lambda *_: (None, ""))
    _, home = imported("llama")
    (home / "embedding.json").rename(tmp_path / "aside")
    try:
        export_run(home, tmp_path / "plain", quiet)
        export_run(home, tmp_path / "out", quiet, embeds="mean")
    finally:
        (tmp_path / "aside").rename(home / "embedding.json")
    assert not (tmp_path / "plain" / sentence.MODULES).exists()
    assert sentence.read(tmp_path / "out") == EmbeddingInfo("mean")


def test_modules_that_are_not_computed_are_refused(imported, tmp_path, capfd):
    source, _ = imported("bert")
    listed, pooling = source / sentence.MODULES, source / "1_Pooling" / "config.json"
    whole, kept = listed.read_text(), pooling.read_text()
    dense = [*json.loads(whole)[:2], {"idx": 2, "name": "2", "path": "2_Dense", "type": "x.Dense"}]
    outside = [json.loads(whole)[0] | {"path": "../other"}, *json.loads(whole)[1:]]
    for modules, part in ((dense, "Transformer, Pooling, Dense"), (outside, "outside its directory"), ([], "no module")):
        listed.write_text(json.dumps(modules))
        refused(source, tmp_path / "run", capfd, part)
    listed.write_text(whole)
    pooling.write_text(json.dumps({"pooling_mode_max_tokens": True}))
    refused(source, tmp_path / "run", capfd, "pools by pooling_mode_max_tokens; there are mean, cls, lasttoken")
    pooling.write_text(kept)
    lowered = source / "sentence_bert_config.json"
    before = lowered.read_text()
    lowered.write_text(json.dumps(json.loads(before) | {"do_lower_case": True}))
    refused(source, tmp_path / "run", capfd, "do_lower_case")
    lowered.write_text(before)
