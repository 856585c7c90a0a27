"""Imported weights compute what `transformers` computes, and train as PyTorch trains them."""

import copy
import dataclasses
import json
import types
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
from tests.convert.cases import CASES, SPECIAL_IDS
from tests.convert.published import change, save_tokenizer, shuffled

torch = pytest.importorskip("torch", reason="the extra `parity` (torch, transformers) is not installed")
transformers = pytest.importorskip("transformers", reason="the extra `parity` (torch, transformers) is not installed")


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


@pytest.fixture(scope="module", autouse=True)
def opened_once():
    """A checkpoint of the same bytes is opened once by each class of `transformers`."""
    kept = {}

    def opening(kind: str):
        opens = getattr(transformers, kind).from_pretrained

        def once(home, **how):
            files = [(Path(home) / name).read_bytes() for name in ("config.json", "model.safetensors")]
            key = kind, repr(how), *files
            kept[key] = kept.get(key) or opens(home, **how)
            return kept[key]

        return types.SimpleNamespace(from_pretrained=once)

    with pytest.MonkeyPatch.context() as patch:
        for kind in ("AutoModel", "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM"):
            patch.setattr(transformers, kind, opening(kind))
        yield


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

    model = (
        copy.deepcopy(getattr(transformers, CASES[name][0]).from_pretrained(source)).float().eval()
    )  # it is trained here
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
