"""Imported weights compute what `transformers` computes, and train as PyTorch trains them."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import bothways
from bothways import sharding
from bothways.config import MeshConfig, OptimizerConfig
from bothways.convert import check
from bothways.convert.families import FAMILIES
from bothways.convert.run import export_run, import_run
from bothways.registry import make_module
from bothways.rundir import load_run
from bothways.train.objectives import make_objective
from bothways.train.optimizer import make_optimizer
from bothways.train.step import TrainState, make_train_step, state_shardings
from tests.convert.published import change, save_tokenizer, shuffled

torch = pytest.importorskip("torch", reason="the extra `parity` (torch, transformers) is not installed")
transformers = pytest.importorskip("transformers", reason="the extra `parity` (torch, transformers) is not installed")

BERT = {"hidden_size": 33, "num_attention_heads": 3, "num_hidden_layers": 2, "intermediate_size": 41}
LLAMA = BERT | {"num_key_value_heads": 1, "head_dim": 14, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}
ROPE = {"rope_theta": 500.0, "factor": 3.0, "original_max_position_embeddings": 19}
LLAMA3 = ROPE | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 3.0}
WIDE = BERT | {"hidden_size": 48, "max_position_embeddings": 37}
ONE = WIDE | {"num_key_value_heads": 1}
CASES = {  # name: class, configuration
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 33, "n_head": 3, "n_layer": 2, "n_inner": 41, "n_positions": 29}),
    "gpt2 untied": (
        "GPT2LMHeadModel",
        {"n_embd": 22, "n_head": 2, "n_layer": 3, "n_positions": 37, "tie_word_embeddings": False},
    ),
    "bert": ("BertForPreTraining", BERT | {"max_position_embeddings": 37}),
    "bert masked": ("BertForMaskedLM", BERT | {"max_position_embeddings": 37, "hidden_act": "relu"}),
    "bert body": ("BertModel", BERT | {"max_position_embeddings": 37}),
    "roberta": ("RobertaForMaskedLM", BERT | {"max_position_embeddings": 37, "type_vocab_size": 1}),
    "modernbert": (
        "ModernBertForMaskedLM",
        BERT | {"hidden_size": 42, "num_hidden_layers": 5, "local_attention": 6, "max_position_embeddings": 37},
    ),
    "llama": ("LlamaForCausalLM", LLAMA),
    "llama tied": ("LlamaForCausalLM", LLAMA | {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "llama linear": ("LlamaForCausalLM", LLAMA | {"rope_parameters": {"rope_type": "linear", "factor": 2.5}}),
    "llama yarn": ("LlamaForCausalLM", LLAMA | {"rope_parameters": ROPE | {"rope_type": "yarn", "beta_fast": 2.0}}),
    "openai-gpt": ("OpenAIGPTLMHeadModel", {"n_embd": 33, "n_head": 3, "n_layer": 2, "n_positions": 29}),
    "distilbert": (
        "DistilBertForMaskedLM",
        {"dim": 33, "n_heads": 3, "n_layers": 2, "hidden_dim": 41, "max_position_embeddings": 37},
    ),
    "distilbert body": (
        "DistilBertModel",
        {"dim": 33, "n_heads": 3, "n_layers": 2, "hidden_dim": 41, "max_position_embeddings": 37},
    ),
    "electra": ("ElectraForMaskedLM", BERT | {"embedding_size": 33, "max_position_embeddings": 37}),
    "electra guessing": ("ElectraForPreTraining", BERT | {"embedding_size": 33, "max_position_embeddings": 37}),
    "xlm-roberta": ("XLMRobertaForMaskedLM", BERT | {"max_position_embeddings": 37, "type_vocab_size": 1}),
    "camembert": ("CamembertForMaskedLM", BERT | {"max_position_embeddings": 37, "type_vocab_size": 1}),
    "mistral": ("MistralForCausalLM", LLAMA | {"sliding_window": 7}),
    "mistral whole": ("MistralForCausalLM", LLAMA | {"sliding_window": None}),
    "qwen3": ("Qwen3ForCausalLM", LLAMA),
    "phi3": ("Phi3ForCausalLM", BERT | LLAMA | {"hidden_size": 42, "head_dim": 14, "sliding_window": 5}),
    "qwen2": ("Qwen2ForCausalLM", ONE),
    "olmo2": ("Olmo2ForCausalLM", WIDE),
    "smollm3": ("SmolLM3ForCausalLM", ONE | {"num_hidden_layers": 3, "no_rope_layer_interval": 2}),
    "gemma": ("GemmaForCausalLM", LLAMA),
    "gemma3_text": (
        "Gemma3ForCausalLM",
        LLAMA
        | {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
        | {"sliding_window": 5, "query_pre_attn_scalar": 23},
    ),
    "gemma3_text capped": ("Gemma3ForCausalLM", LLAMA | {"final_logit_softcapping": 0.75}),
    "gemma2": (
        "Gemma2ForCausalLM",
        LLAMA
        | {"num_hidden_layers": 3, "sliding_window": 5, "query_pre_attn_scalar": 23}
        | {"attn_logit_softcapping": 0.25, "final_logit_softcapping": 1.5},
    ),
    "gemma2 free": (
        "Gemma2ForCausalLM",
        LLAMA | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "tie_word_embeddings": False},
    ),
    "starcoder2": ("Starcoder2ForCausalLM", ONE | {"sliding_window": 5}),
    "gpt_neox": ("GPTNeoXForCausalLM", WIDE),
    "gpt_neox in turn": ("GPTNeoXForCausalLM", WIDE | {"use_parallel_residual": False}),
    "gptj": ("GPTJForCausalLM", {"n_embd": 42, "n_head": 3, "n_layer": 2, "n_positions": 29, "rotary_dim": 6}),
    "phi": ("PhiForCausalLM", ONE),
    "opt": (
        "OPTForCausalLM",
        {"hidden_size": 33, "num_attention_heads": 3, "num_hidden_layers": 2, "ffn_dim": 41}
        | {"max_position_embeddings": 37, "word_embed_proj_dim": 33},
    ),
}
CASES |= {
    "electra small": ("ElectraForMaskedLM", BERT | {"embedding_size": 14, "max_position_embeddings": 37}),
    "bloom": ("BloomForCausalLM", {"hidden_size": 33, "n_head": 3, "n_layer": 2, "seq_length": 37}),
    "albert": (
        "AlbertForPreTraining",
        BERT | {"embedding_size": 14, "num_hidden_layers": 3, "max_position_embeddings": 37},
    ),
    "albert body": ("AlbertModel", BERT | {"embedding_size": 33, "max_position_embeddings": 37, "hidden_act": "relu"}),
    "mpnet": ("MPNetForMaskedLM", BERT | {"max_position_embeddings": 37}),
}
CASES |= {
    "modernbert-decoder": (
        "ModernBertDecoderForCausalLM",
        BERT | {"hidden_size": 42, "num_hidden_layers": 5, "local_attention": 6, "max_position_embeddings": 37},
    ),
    "modernbert-decoder untied": (
        "ModernBertDecoderForCausalLM",
        BERT
        | {"hidden_size": 42, "tie_word_embeddings": False, "decoder_bias": False, "layer_types": ["full_attention"] * 2},
    ),
    "eurobert": ("EuroBertForMaskedLM", LLAMA),
    "eurobert tied": ("EuroBertForMaskedLM", LLAMA | {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "nomic_bert": (
        "NomicBertForMaskedLM",
        WIDE | {"type_vocab_size": 3, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    ),
    "nomic_bert body": ("NomicBertModel", WIDE | {"hidden_act": "gelu", "head_dim": 14}),
}
FALCON = {"hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 2, "ffn_hidden_size": 41}
FALCON |= {"max_position_embeddings": 37, "layer_norm_epsilon": 1e-4}
GROUPS = {
    "new_decoder_architecture": True,
    "num_kv_heads": 3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}
CASES |= {  # as 7B is built, and 40B, 11B; and one sub-layer after the other
    "falcon": ("FalconForCausalLM", FALCON),
    "falcon groups": ("FalconForCausalLM", FALCON | GROUPS),
    "falcon groups one norm": ("FalconForCausalLM", FALCON | GROUPS | {"num_ln_in_parallel_attn": 1}),
    "falcon in turn": (
        "FalconForCausalLM",
        FALCON | {"parallel_attn": False, "multi_query": False, "bias": True, "tie_word_embeddings": False},
    ),
}
STABLELM = WIDE | {"num_key_value_heads": 1, "layer_norm_eps": 1e-4, "use_qkv_bias": True}
PART = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.375}}
STABLELM |= PART
NEMOTRON = WIDE | PART | {"num_key_value_heads": 1, "head_dim": 32, "norm_eps": 1e-4}
NEMOTRON |= {"intermediate_size": 23}  # of wider ones, sums of squares are beyond 1e-4 in float32, theirs too
CASES |= {
    "stablelm": ("StableLmForCausalLM", STABLELM),
    "stablelm parallel": (
        "StableLmForCausalLM",
        STABLELM | {"use_parallel_residual": True, "use_qkv_bias": False, "tie_word_embeddings": True},
    ),
    "nemotron": ("NemotronForCausalLM", NEMOTRON),
    "nemotron biased": (
        "NemotronForCausalLM",
        NEMOTRON | {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu", "tie_word_embeddings": True},
    ),
}
SIDES = {"d_model": 36, "max_position_embeddings": 37, "activation_function": "silu", "scale_embedding": True}
SIDES |= {f"{side}_{k}": n for side in ("encoder", "decoder") for k, n in (("layers", 2), ("attention_heads", 3))}
SIDES |= {"encoder_ffn_dim": 41, "decoder_ffn_dim": 41}
T5 = {"d_model": 33, "d_kv": 14, "d_ff": 41, "num_layers": 2, "num_heads": 3, "relative_attention_num_buckets": 10}
T5 |= {"relative_attention_max_distance": 13, "layer_norm_epsilon": 1e-5}
CASES |= {
    "bart": ("BartForConditionalGeneration", SIDES),
    "mbart": ("MBartForConditionalGeneration", SIDES | {"activation_function": "gelu"}),
    "marian": ("MarianMTModel", SIDES),
    "pegasus": ("PegasusForConditionalGeneration", SIDES | {"activation_function": "relu"}),
    "m2m_100": ("M2M100ForConditionalGeneration", SIDES | {"activation_function": "relu"}),
    "t5": ("T5ForConditionalGeneration", T5),
    "t5 untied": ("T5ForConditionalGeneration", T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "mt5": ("MT5ForConditionalGeneration", T5 | {"tie_word_embeddings": False}),
}
SPECIAL_IDS = {
    "modernbert": {"pad_token_id": 0, "bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3},
    "modernbert-decoder": {"pad_token_id": 0, "bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3},
    "eurobert": {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "mask_token_id": 4},
    "gpt2": {"bos_token_id": 0, "eos_token_id": 0},
    "t5": {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0},
    "mt5": {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0},
    **{
        name: {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
        for name in ("bart", "mbart", "marian", "pegasus", "m2m_100")
    },
    **{
        name: {"bos_token_id": 0, "eos_token_id": 1}
        for name in ("llama", "mistral", "qwen3", "gptj", "phi", "gpt_neox", "bloom", "falcon", "stablelm", "nemotron")
    },
    **{
        name: {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
        for name in ("phi3", "qwen2", "olmo2", "smollm3", "gemma", "gemma2", "gemma3_text", "starcoder2", "opt")
    },
}


def stated(home: Path, **values) -> None:
    """Values of config.json that this version of transformers does not write."""
    config = json.loads((home / "config.json").read_text()) | values
    (home / "config.json").write_text(json.dumps(config))


def published(name: str, home: Path) -> Path:
    """A checkpoint that `transformers` wrote, with random weights."""
    family = name.split()[0]
    kind, values = CASES[name]
    vocab_size = save_tokenizer(family, home) + 4  # tables are often made larger than the vocabulary
    stem = FAMILIES[family].classes
    config = getattr(transformers, f"{stem}Config")
    torch.manual_seed(0)
    getattr(transformers, kind)(config(vocab_size=vocab_size, **SPECIAL_IDS.get(family, {}), **values)).save_pretrained(
        home
    )
    shuffled(home)
    if name == "pegasus":  # transformers stores the sinusoids, which are no parameters
        change(home, **{f"model/{side}/embed_positions/weight": None for side in ("encoder", "decoder")})
    if name in ("t5 untied", "mt5"):  # their logits are not scaled, and would be some 20
        scale = load_file(home / "model.safetensors")["decoder.final_layer_norm.weight"]
        change(home, **{"decoder/final_layer_norm/weight": scale / 16})
    if name == "t5 untied":  # transformers 5 writes none of its own; T5 1.1 and flan have it
        table = load_file(home / "model.safetensors")["shared.weight"]
        change(home, **{"lm_head/weight": np.roll(table, 1, axis=0)})
        stated(home, tie_word_embeddings=False)
    if name == "bart":  # as bart-large-cnn has it
        stated(home, forced_bos_token_id=0)
    return home


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Name of a case -> (its checkpoint, its run, what the import said); made once."""
    made = {}

    def of(name: str):
        if name not in made:
            home = tmp_path_factory.mktemp("published")
            source = published(name, home / "source")
            made[name] = source, home / "run", import_run(str(source), home / "run", "shakespeare", lambda _: None)
        return made[name]

    return of


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(imported, name):
    source, home, result = imported(name)
    assert result.max_difference < 1e-4
    run = load_run(home, print)
    shape = check.fixed_tokens(run.tokenizer, run.recipe.model.context_length).shape
    tokens = np.random.default_rng(1).integers(5, 60, shape).astype(np.int32)
    wanted, _ = check.transformers_logits(source, run.recipe, tokens)
    assert np.abs(wanted).max() > 0.3  # differences would show
    np.testing.assert_allclose(check.our_logits(run.recipe, run.params, tokens), wanted, atol=1e-4, rtol=0)


ALIKE = (
    "mbart",
    "pegasus",
    "m2m_100",
    "t5",
    "mt5",
    "albert body",
    "electra small",
    "bloom",
    "electra guessing",
    "qwen2",
    "olmo2",
    "smollm3",
    "gemma",
    "starcoder2",
    "gpt_neox in turn",
    "phi",
    "mistral whole",
    "camembert",
)
"""Their tables and layouts are those of others below; that they go out and come back, tests/convert/test_gguf.py and
test_import.py say too."""


@pytest.mark.parametrize("name", [name for name in CASES if name not in ALIKE])
def test_export_import_export_is_the_same_bytes_and_transformers_opens_it(imported, name, tmp_path):
    source, home, _ = imported(name)
    first = export_run(home, tmp_path / "a", print)
    assert first.max_difference < 1e-4
    import_run(str(tmp_path / "a"), tmp_path / "run", "shakespeare", print)
    second = export_run(tmp_path / "run", tmp_path / "b", print)
    assert dataclasses.replace(first, run="") == dataclasses.replace(second, run="")
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "b").iterdir())
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    text = "the dog sees the queen."
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")(text, add_special_tokens=False)
    assert theirs.input_ids == load_run(home, print).tokenizer.encode(text)
    before, after = (json.loads((p / "config.json").read_text()) for p in (source, tmp_path / "a"))
    assert before["architectures"] == after["architectures"]


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_an_encoder_decoder_writes_what_transformers_does(imported, name):
    """From the token that starts its decoder, BART's with the one that must follow; sources of two lengths."""
    source, home, _ = imported(name)
    model, texts = bothways.load(home), ["the king", "the queen sees the dog and the king"]
    found = model.sample(texts, max_tokens=9, greedy=True)
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(source).eval()
    for text, mine in zip(texts, found, strict=True):
        ids = torch.tensor([model.encode_prompt(text)])
        with torch.no_grad():
            start = {"forced_bos_token_id": 0} if name == "bart" else {}
            row = theirs.generate(ids, max_new_tokens=12, do_sample=False, num_beams=1, **start)[0].tolist()
        row = row[len(model.tokenizer.target_start) :][:9]
        eos = model.tokenizer.eos
        wanted = row[: row.index(eos)] if eos in row else row
        assert mine.text == model.tokenizer.decode(wanted)
    assert model.tokenizer.target_start == {"bart": (2, 0), "t5": (0,)}[name]


ADAMW = OptimizerConfig(learning_rate=3e-3, schedule="constant", b2=0.99, weight_decay=0.1, clip_norm=1.0)


def rows(kind: str, seed: int, tokens: int) -> dict[str, np.ndarray]:
    """A batch of 4 rows of 13 tokens, as training makes them; for BERT with padding, pairs, and places asked for."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(5, tokens, (4, 14)).astype(np.int32)
    positions = np.broadcast_to(np.arange(13, dtype=np.int32), (4, 13))
    if kind == "gpt":
        ones = np.ones((4, 13), np.int32)
        return {"tokens": ids[:, :-1], "targets": ids[:, 1:], "segments": ones, "positions": positions} | {
            "weights": rng.integers(0, 2, (4, 13)).astype(np.float32)
        }
    real = (positions < rng.integers(9, 14, (4, 1))).astype(np.int32)
    places = np.stack([rng.choice(8, 3, replace=False) for _ in range(4)]).astype(np.int32)
    return {
        "tokens": ids[:, :-1],
        "segments": real,
        "positions": positions,
        "types": (positions > 5).astype(np.int32),
    } | {
        "mask_positions": places,
        "targets": rng.integers(5, tokens, (4, 3)).astype(np.int32),
        "weights": rng.integers(0, 2, (4, 3)).astype(np.float32),
        "random_next": rng.integers(0, 2, 4).astype(np.int32),
        "pair_weight": np.ones(4, np.float32),
    }


def torch_loss(model, batch: dict[str, np.ndarray]):
    """The loss of a batch, in PyTorch."""
    b = {k: torch.from_numpy(v.astype(np.int64 if v.dtype == np.int32 else v.dtype)) for k, v in batch.items()}
    nats = torch.nn.functional.cross_entropy
    if "mask_positions" not in b:
        logits = model(b["tokens"]).logits
        return (nats(logits.flatten(0, 1), b["targets"].flatten(), reduction="none") * b["weights"].flatten()).sum() / (
            b["weights"].sum()
        )
    out = model(b["tokens"], attention_mask=b["segments"], token_type_ids=b["types"])
    asked = out.prediction_logits[torch.arange(4)[:, None], b["mask_positions"]]
    mlm = (nats(asked.flatten(0, 1), b["targets"].flatten(), reduction="none") * b["weights"].flatten()).sum()
    return mlm / b["weights"].sum() + nats(out.seq_relationship_logits, b["random_next"])


@pytest.mark.parametrize("name", ["gpt2", "bert", "gemma2", "modernbert-decoder"])
def test_twenty_steps_of_adamw_have_pytorchs_losses(imported, name):
    """From the same weights on the same batches, dropout off: decay on the same parameters, clipping, bias correction."""
    source, home, _ = imported(name)
    run = load_run(home, print)
    family, size = run.recipe.family, len(run.tokenizer)
    still = dict.fromkeys(("dropout_embed", "dropout_attention", "dropout_residual"), 0.0)
    module = make_module(family, dataclasses.replace(run.recipe.model, scan_layers=True, **still))
    batches = [rows(family, seed, size) for seed in range(20)]

    model = getattr(transformers, CASES[name][0]).from_pretrained(source).float().eval()
    plain = [p for n, p in model.named_parameters() if n.endswith("bias") or "ln_" in n or "norm" in n.lower()]
    matrices = [p for p in model.parameters() if not any(p is q for q in plain)]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=ADAMW.learning_rate, betas=(ADAMW.b1, ADAMW.b2), eps=ADAMW.eps)
    wanted = []
    for batch in batches:
        loss = torch_loss(model, batch)
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), ADAMW.clip_norm)
        adamw.step()
        wanted.append(loss.item())

    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    asked = dataclasses.replace(run.recipe.objective, next_sentence=family == "bert")
    objective = make_objective(asked, run.tokenizer.vocabulary())
    optimizer, zeros = make_optimizer(ADAMW, 20), [jnp.zeros((), jnp.int32) for _ in range(3)]
    state = TrainState(zeros[0], run.params, optimizer.init(run.params), *zeros[1:])
    step = make_train_step(module, objective, optimizer, mesh, state_shardings(mesh, jax.eval_shape(lambda: state)))
    got = []
    for batch in batches:
        state, metrics = step(state, batch, 0)
        got.append(float(metrics["loss"]))
    assert max(wanted) - min(wanted) > 0.3  # they move
    np.testing.assert_allclose(got, wanted, atol=1e-3, rtol=0)
