"""GGUF files: what goes out comes in again, and llama.cpp itself continues it with the same tokens."""

import dataclasses
import re
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import bothways
from bothways.convert import files, gguf_file, gguf_vocabulary
from bothways.convert.gguf_architectures import ARCHITECTURES
from bothways.convert.run import export_run, import_run
from bothways.data.tokenizer import train as train_tokenizer
from bothways.embedding import EmbeddingInfo, read_embedding
from bothways.errors import InputError
from bothways.model.config import RotaryScaling
from bothways.rundir import load_run
from tests.convert.published import SIZES, checkpoint, quiet
from tests.corpus import made_up_text
from tests.train.bodies import body, write

EXTRA = {"gemma3": {"sliding_window_pattern": 6, "query_pre_attn_scalar": 8}, "smollm3": {"no_rope_layer_interval": 4}}
EXTRA["starcoder2"] = {"sliding_window": None}
TEXT = "the dog sees 42 ships. the queen"


@pytest.fixture(scope="module", autouse=True)
def no_transformers():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bothways.convert.check.transformers_logits", lambda *_: (None, ""))
        yield


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """Name of an architecture -> the run of a checkpoint that llama.cpp keeps so; made once."""
    made = {}

    def of(name: str) -> Path:
        if name not in made:
            home = tmp_path_factory.mktemp(name)
            source = checkpoint(ARCHITECTURES[name].family, home / "source", **EXTRA.get(name, {}))
            import_run(str(source), home / "run", "shakespeare", quiet)
            made[name] = home / "run"
        return made[name]

    return of


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_run_goes_out_as_gguf_and_comes_back(run_of, name, tmp_path):
    path = tmp_path / "model.gguf"
    said = export_run(run_of(name), path, quiet)
    assert (said.family, said.max_difference < 1e-5) == (ARCHITECTURES[name].family, True)
    import_run(str(path), tmp_path / "back", "shakespeare", quiet)
    before, after = load_run(run_of(name), print), load_run(tmp_path / "back", print)
    assert after.tokenizer.encode(TEXT) == before.tokenizer.encode(TEXT)
    assert (after.tokenizer.bos, after.tokenizer.eos) == (before.tokenizer.bos, before.tokenizer.eos)
    names = {re.sub(r"^blk\.\d+", "blk.{bid}", t.name.rpartition(".")[0]) for t in gguf.GGUFReader(path).tensors}
    kinds = gguf.MODEL_TENSORS[next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == name)]
    assert names <= {gguf.TENSOR_NAMES[kind] for kind in kinds}


def test_keys_lie_as_queries_where_a_file_does_not_say_how_many_heads_they_have(run_of, tmp_path, monkeypatch):
    """As in files made from checkpoints of before grouped queries."""
    source = checkpoint("llama", tmp_path / "source", num_key_value_heads=SIZES["llama"]["num_attention_heads"])
    import_run(str(source), tmp_path / "run", "shakespeare", quiet)
    add_uint32 = gguf.GGUFWriter.add_uint32
    unsaid = lambda self, key, value: None if key.endswith("head_count_kv") else add_uint32(self, key, value)  # noqa: E731
    monkeypatch.setattr(gguf.GGUFWriter, "add_uint32", unsaid)
    export_run(tmp_path / "run", tmp_path / "x.gguf", quiet)
    assert "llama.attention.head_count_kv" not in gguf.GGUFReader(tmp_path / "x.gguf").fields
    import_run(str(tmp_path / "x.gguf"), tmp_path / "back", "shakespeare", quiet)
    before, after = load_run(tmp_path / "run", print), load_run(tmp_path / "back", print)
    jax.tree.map(np.testing.assert_array_equal, before.params, after.params)


def change_pooling(path: Path, number: int) -> None:
    reader = gguf.GGUFReader(path, "r+")
    reader.fields["bert.pooling_type"].parts[-1][0] = number
    reader.data.flush()


def test_texts_are_pooled_as_a_file_says(run_of, tmp_path):
    texts = ["the dog", "the king sees 42 ships"]
    before = bothways.load(run_of("bert"))
    for pool in ("mean", "cls", "last"):
        export_run(run_of("bert"), tmp_path / f"{pool}.gguf", quiet, embeds=pool)
        import_run(str(tmp_path / f"{pool}.gguf"), tmp_path / pool, "shakespeare", quiet)
        assert read_embedding(tmp_path / pool) == EmbeddingInfo(pool)
        vectors = bothways.load(tmp_path / pool).embed(texts)
        np.testing.assert_allclose(vectors, before.embed(texts, pool=pool), atol=1e-5)
    change_pooling(tmp_path / "cls.gguf", gguf.PoolingType.NONE)
    assert files.read(str(tmp_path / "cls.gguf")).embedding is None
    change_pooling(tmp_path / "cls.gguf", gguf.PoolingType.RANK)
    with pytest.raises(InputError, match="pooling_type is 4; there are 1 mean, 2 cls, 3 last"):
        files.read(str(tmp_path / "cls.gguf"))


def test_quantised_to_eight_bits_it_is_near_and_small(run_of, tmp_path):
    for type_ in ("float32", "float16", "q8_0"):
        said = export_run(run_of("gpt2"), tmp_path / f"{type_}.gguf", quiet, dtype=type_)
        assert said.max_difference < {"float32": 1e-5, "float16": 0.02, "q8_0": 0.2}[type_]
    rows = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "q8_0.gguf").tensors}
    assert rows["blk.0.ffn_up.weight"] == "F16"  # rows of 22 are no multiple of 32
    assert rows["output_norm.weight"] == "F32"


def test_llama_3s_scaling_is_found_in_its_factors(tmp_path):
    """A file holds the factors only."""
    scaling = RotaryScaling("llama3", 8.0, 8192, 1.0, 4.0)
    factors = gguf_file._factors(scaling, 64, 500_000.0).astype(np.float32)
    found = gguf_file._llama3_of(factors, {"rope_theta": 500_000.0}, tmp_path)
    assert found == {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192} | {
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    with pytest.raises(InputError, match="not Llama 3's"):
        gguf_file._llama3_of(factors[::-1].copy(), {"rope_theta": 500_000.0}, tmp_path)


def test_gemma_2s_scale_of_scores_is_the_one_of_its_size():
    """Which no file says; the 27B's is not the width of its heads."""
    sizes = {  # layers, D, heads, K: query_pre_attn_scalar
        (26, 2304, 8, 256): 256,
        (46, 4608, 32, 128): 144,
    }
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "head_dim")
    for size, scale in sizes.items():
        said = ARCHITECTURES["gemma2"].means(dict(zip(names, size, strict=True)))
        assert said == {"query_pre_attn_scalar": scale}


def test_a_sentencepiece_vocabulary_keeps_its_tokens(tiny, tmp_path):
    """Trained here, with byte fallback; it comes back as a published vocabulary that cuts every text alike."""
    tokenizer = train_tokenizer([made_up_text(60)], "bpe", 331)
    run = body("gpt", dataclasses.replace(tiny, d_head=0, d_value=0))
    model = dataclasses.replace(run.recipe.model, vocab_size=len(tokenizer))
    rows = np.random.default_rng(0).normal(size=(len(tokenizer), model.d_model)).astype(np.float32)
    params = {**run.params, "decoder": {**run.params["decoder"]}}
    params["decoder"]["embed"] = {**params["decoder"]["embed"], "token": {"embedding": rows}}
    recipe = dataclasses.replace(run.recipe, model=model)
    write(dataclasses.replace(run, recipe=recipe, params=params, tokenizer=tokenizer), tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "model.gguf", quiet)
    back = files.read(str(tmp_path / "model.gguf")).tokenizer
    for text in (TEXT, "a\nb  c", "caf\u00e9 \u2603"):
        assert back.encode(text) == tokenizer.encode(text)
        assert back.decode(back.encode(text)) == text


def test_ernies_queries_lie_in_a_file_as_in_the_checkpoint_and_llamas_do_not(run_of, tmp_path):
    """llama.cpp turns features 2k and 2k + 1 of both; Llama's checkpoint has k and k + K/2."""
    for name, same in (("ernie4_5", True), ("llama", False)):
        export_run(run_of(name), tmp_path / f"{name}.gguf", quiet)
        found = next(
            t.data for t in gguf.GGUFReader(tmp_path / f"{name}.gguf").tensors if t.name == "blk.0.attn_q.weight"
        )
        tensors = load_file(run_of(name).parent / "source" / "model.safetensors")
        assert np.array_equal(found, tensors["model.layers.0.self_attn.q_proj.weight"]) == same


def test_what_llama_cpp_does_not_compute_is_refused(run_of, tiny, tmp_path):
    write(body("gpt", dataclasses.replace(tiny, activation="relu2")), tmp_path / "run")
    with pytest.raises(InputError, match="published families only"):
        export_run(tmp_path / "run", tmp_path / "x.gguf", quiet)
    source = checkpoint("gemma3_text", tmp_path / "source", query_pre_attn_scalar=23)
    import_run(str(source), tmp_path / "gemma", "shakespeare", quiet)
    with pytest.raises(InputError, match="query_scale is 23, and comes back as 8"):
        export_run(tmp_path / "gemma", tmp_path / "x.gguf", quiet)
    source = checkpoint("gemma2", tmp_path / "second", attn_logit_softcapping=None)
    import_run(str(source), tmp_path / "gemma2", "shakespeare", quiet)
    with pytest.raises(InputError, match=r"score_cap is 0\.0, and comes back as 50\.0"):
        export_run(tmp_path / "gemma2", tmp_path / "x.gguf", quiet)
    source = checkpoint("ernie4_5", tmp_path / "third", use_bias=True)
    import_run(str(source), tmp_path / "ernie", "shakespeare", quiet)
    with pytest.raises(InputError, match="bias"):
        export_run(tmp_path / "ernie", tmp_path / "x.gguf", quiet)
    with pytest.raises(InputError, match="this one keeps capitals"):
        gguf_vocabulary._write_wordpiece(None, None, {"normalizer": {"lowercase": False}}, [], [], {})
    assert not list(tmp_path.glob("*.gguf"))
    (tmp_path / "x.gguf").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        export_run(run_of("gpt2"), tmp_path / "x.gguf", quiet)


@pytest.mark.parametrize(
    ("name", "type_"),
    [
        ("llama", "float32"),
        ("llama", "q8_0"),
        ("gpt2", "float32"),
        ("gemma3", "float32"),
        ("gemma2", "float32"),
        ("ernie4_5", "float32"),
    ],
)
def test_llama_cpp_writes_the_same_greedy_tokens(run_of, name, type_, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; it is built from source")
    export_run(run_of(name), tmp_path / "model.gguf", quiet, dtype=type_)
    import_run(str(tmp_path / "model.gguf"), tmp_path / "back", "shakespeare", quiet)  # of Q8_0, the rounded weights
    model = bothways.load(tmp_path / "back")
    engine = llama_cpp.Llama(str(tmp_path / "model.gguf"), n_ctx=23, n_threads=1, verbose=False, logits_all=False)
    prompt = [*model.tokenizer.opening, *model.tokenizer.encode("the dog")]
    assert engine.tokenize(b"the dog", add_bos=bool(model.tokenizer.opening), special=False) == prompt
    ours = model.sample(["the dog"], greedy=True, max_tokens=8)[0].text
    theirs = []
    for token in engine.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0):
        if token == model.tokenizer.eos or len(theirs) == 8:
            break
        theirs.append(token)
    assert model.tokenizer.decode(theirs) == ours
