"""What `export` writes is what vLLM reads: it goes by `architectures`, loads safetensors by transformers' names, and takes the
tokenizer from the same directory."""

import json

import pytest

from bothways.convert.run import export_run, import_run
from bothways.data.tokenizer import Tokenizer
from tests.convert.published import checkpoint, quiet

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("torch", reason="torch is not installed")


@pytest.mark.parametrize(
    ("family", "architecture", "sizes"),
    [("gpt2", "GPT2LMHeadModel", {}), ("llama", "LlamaForCausalLM", {"hidden_size": 24})],
)
def test_an_exported_run_has_what_vllm_reads(family, architecture, sizes, tmp_path, monkeypatch):
    monkeypatch.setattr("bothways.convert.check.transformers_logits", lambda *_: (None, ""))
    home, out = tmp_path / "run", tmp_path / "out"
    import_run(str(checkpoint(family, tmp_path / "source", **sizes)), home, "shakespeare", quiet)
    export_run(home, out, quiet)
    assert json.loads((out / "config.json").read_text())["architectures"] == [architecture]
    assert not list(out.glob("*.bin"))
    assert list(out.glob("*.safetensors"))
    model, info = getattr(transformers, architecture).from_pretrained(out, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    text = "the dog sees the queen"
    found = transformers.AutoTokenizer.from_pretrained(out)(text, add_special_tokens=False)["input_ids"]
    assert found == Tokenizer.load(home).encode(text)
    assert max(found) < model.config.vocab_size
