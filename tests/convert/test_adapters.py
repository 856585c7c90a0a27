"""Adapters in PEFT's files: the same function there and here, and the same losses when they are trained."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bothways import rundir, sharding
from bothways.config import MeshConfig, ObjectiveConfig, OptimizerConfig
from bothways.convert.adapters import export_adapters, import_adapters
from bothways.convert.run import export_run, import_run
from bothways.data.tokenizer import made_up_vocabulary
from bothways.errors import InputError
from bothways.model import adapters
from bothways.model.config import LoRAConfig
from bothways.registry import make_module, tiny_inputs
from bothways.train.finetune import save
from bothways.train.objectives import make_objective
from bothways.train.optimizer import make_optimizer
from bothways.train.start import load_base
from bothways.train.step import init_state, make_train_step, state_shardings
from tests.convert.published import checkpoint, quiet

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers and peft warn each other
TARGETS = {"llama": ["q_proj", "v_proj", "o_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}
STEPS, RATE = 6, 0.01


@pytest.fixture(scope="module")
def peft():
    """Imported when it is needed: each worker collects this file, and one runs it."""
    return pytest.importorskip("peft", reason="peft is not installed: adapters were not compared with it")


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def made(request, peft, tmp_path_factory):
    """A checkpoint, its run, and random adapters of PEFT's for it."""
    home, family = tmp_path_factory.mktemp(request.param), request.param
    sizes = {"hidden_size": 24, "num_hidden_layers": 2} if family == "llama" else {"n_layer": 2}
    source = checkpoint(family, home / "source", **sizes)
    import_run(str(source), home / "base", "", quiet)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    torch.manual_seed(0)
    how = peft.LoraConfig(r=3, lora_alpha=7, target_modules=TARGETS[family], fan_in_fan_out=family == "gpt2")
    adapted = peft.get_peft_model(model, how)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    adapted.save_pretrained(home / "peft")
    import_adapters(home / "peft", home / "run", home / "base", quiet)
    return home, adapted


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(5, 300, (4, 12)).astype(np.int32)


def logits_here(home, tokens):
    run = rundir.load_run(home, quiet)

    def inner(module):
        features, _ = module(tokens)
        return module.logits(features)

    return np.asarray(jax.jit(lambda p: run.module.apply({"params": p}, method=inner))(run.params))


def logits_there(model, tokens):
    with torch.no_grad():
        return model(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()


def test_adapters_compute_the_same_here_and_there_and_back(peft, made, tokens):
    home, adapted = made
    wanted = logits_there(adapted, tokens)
    with adapted.disable_adapter():
        assert np.abs(wanted - logits_there(adapted, tokens)).max() > 0.1
    np.testing.assert_allclose(logits_here(home / "run", tokens), wanted, atol=2e-4)
    export_adapters(home / "run", home / "out", quiet)
    plain = transformers.AutoModelForCausalLM.from_pretrained(home / "source", dtype=torch.float32)
    back = peft.PeftModel.from_pretrained(plain, home / "out")
    np.testing.assert_allclose(logits_there(back, tokens), wanted, atol=2e-4)


@pytest.mark.parametrize(
    "made", ["llama"], indirect=True
)  # GPT-2's three projections have one A there, and one each here
def test_losses_are_those_of_peft(made, tokens):
    home, adapted = made
    recipe, mine = rundir.load_adapters(home / "run", quiet)
    module = make_module("gpt", recipe.model)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=RATE, schedule="constant", weight_decay=0.0), STEPS)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    shapes = jax.eval_shape(lambda: init_state(module, tiny_inputs("gpt"), optimizer, 0))
    placed = state_shardings(mesh, shapes)
    state = jax.jit(lambda: init_state(module, tiny_inputs("gpt"), optimizer, 0))()
    state = state.replace(params=mine, frozen=load_base(home / "run", shapes.frozen, placed.frozen))
    state = jax.device_put(state, placed)
    objective = make_objective(
        ObjectiveConfig(), made_up_vocabulary(len(state.weights["decoder"]["embed"]["token"]["embedding"]))
    )
    step = make_train_step(module, objective, optimizer, mesh, placed)
    T = tokens.shape[1] - 1
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segments": np.ones((4, T), np.int32)}
    batch |= {"positions": np.tile(np.arange(T, dtype=np.int32), (4, 1)), "weights": np.ones((4, T), np.float32)}
    batch = jax.tree.map(jnp.asarray, batch)
    ours = []
    for _ in range(STEPS):
        state, metrics = step(state, batch, 0)
        ours.append(float(metrics["loss"]))
    ids = torch.from_numpy(tokens.astype(np.int64))
    trained = [p for p in adapted.parameters() if p.requires_grad]
    other = torch.optim.AdamW(trained, RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    theirs = []
    for _ in range(STEPS):
        loss = adapted(ids, labels=ids).loss
        theirs.append(loss.item())
        other.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        other.step()
    assert theirs[0] - theirs[-1] > 0.1
    assert ours == pytest.approx(theirs, abs=1e-3)


def test_adapters_that_do_not_fit(made, tmp_path):
    home, _ = made
    config = json.loads((home / "peft" / "adapter_config.json").read_text())
    family = "gpt2" if "gpt2" in home.name else "llama"
    other = checkpoint(
        family, tmp_path / "other", **({"n_inner": 34, "n_embd": 26} if family == "gpt2" else {"hidden_size": 30})
    )
    import_run(str(other), tmp_path / "wide", "", quiet)
    with pytest.raises(InputError, match="of another width"):
        import_adapters(home / "peft", tmp_path / "run", tmp_path / "wide", quiet)
    (tmp_path / "peft").mkdir()
    for name in ("adapter_model.safetensors",):
        (tmp_path / "peft" / name).write_bytes((home / "peft" / name).read_bytes())
    for change, match in (
        ({"use_dora": True}, "use_dora"),
        ({"peft_type": "IA3"}, "only LORA"),
        ({"bias": "all"}, "bias"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights=pissa_niter_16"),
    ):
        (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(InputError, match=match):
            import_adapters(tmp_path / "peft", tmp_path / "run", home / "base", quiet)
    with pytest.raises(InputError, match="has no adapters"):
        export_adapters(home / "base", tmp_path / "out", quiet)
    assert not (tmp_path / "run").exists()


def test_a_head_goes_beside_its_adapters(peft, tmp_path):
    """A fine-tuned run's adapters and head are PEFT's modules_to_save; merged, the run leaves as any other."""
    source = checkpoint("bert", tmp_path / "source")
    import_run(str(source), tmp_path / "base", "", quiet)
    base = rundir.load_run(tmp_path / "base", quiet)
    model = dataclasses.replace(base.recipe.model, lora=LoRAConfig(rank=3, alpha=7.0, targets=("query", "out", "down")))
    recipe = dataclasses.replace(base.recipe, model=model)
    info = rundir.TaskInfo("dogs", "classify", ("a", "b", "c"), 23, ("accuracy",))
    shapes, rng = adapters.split(rundir.param_shapes(recipe, info))[0], np.random.default_rng(0)
    trained = jax.tree.map(lambda s: rng.normal(0, 0.3, s.shape).astype(np.float32), shapes)
    save(tmp_path / "run", dataclasses.replace(base, recipe=recipe), trained, info)
    tokens = rng.integers(5, 80, (3, 11)).astype(np.int32)
    run = rundir.load_run(tmp_path / "run", quiet)
    ours = jax.jit(lambda p: run.module.apply({"params": p}, tokens, tokens * 0 + 1, tokens * 0))(run.params)

    export_adapters(tmp_path / "run", tmp_path / "peft", quiet)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(source, num_labels=3, dtype=torch.float32)
    before = logits_there(plain.eval(), tokens)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "peft").eval()
    assert np.abs(before - ours).max() > 0.1
    np.testing.assert_allclose(logits_there(theirs, tokens), ours, atol=1e-4)
    export_run(tmp_path / "run", tmp_path / "merged", quiet)
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    np.testing.assert_allclose(logits_there(merged.eval(), tokens), ours, atol=1e-4)
    assert merged.config.id2label == {0: "a", 1: "b", 2: "c"}
