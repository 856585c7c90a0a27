"""The same weights and conversations in TRL: the loss of every step is the same."""

import dataclasses
import json
import logging

import pytest

from bothways.config import ObjectiveConfig, OptimizerConfig, TrainConfig
from bothways.convert.run import import_run
from bothways.data import corpora, tokens
from bothways.data.config import DataConfig
from bothways.data.conversation_rows import PackedConversations
from bothways.rundir import read_recipe
from bothways.train.loop import train
from tests.convert.published import checkpoint, quiet
from tests.data.test_chat import MARKED, TALK

pytestmark = [pytest.mark.usefixtures("one_device"), pytest.mark.filterwarnings("ignore")]
STEPS, RATE = 20, 0.002
TEMPLATE = (
    MARKED.replace("<|im_start|>", "<s>")
    .replace("<|im_end|>", "</s>")
    .replace(
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}</s>",
        "</s>{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}",
    )
)


@pytest.fixture(scope="module")
def trl():
    """Imported here, where it is needed: that takes seconds in every process that collects the tests."""
    pytest.importorskip("torch", reason="torch is not installed")
    why = "trl is not installed: losses of conversations were not compared with its SFT"
    return pytest.importorskip("trl", reason=why)


@pytest.fixture(scope="module")
def llama(trl, tmp_path_factory):
    home = tmp_path_factory.mktemp("llama") / "llama"
    checkpoint("llama", home, max_position_embeddings=128, hidden_size=24, pad_token_id=1, bos_token_id=0, eos_token_id=1)
    settings = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "chat_template": TEMPLATE}
    (home / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    return home


def talks():
    return [{"messages": [{**TALK[1], "content": f"the king {i}?"}, *TALK[2 : 3 + 2 * (i % 2)]]} for i in range(20)]


def losses_of_trl(trl, home, records, out):
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("trl").setLevel(logging.ERROR)
    config = trl.SFTConfig(
        output_dir=str(out),
        assistant_only_loss=True,
        per_device_train_batch_size=len(records),
        max_steps=STEPS,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        max_length=256,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        eos_token="</s>",
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(home, dtype="float32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(home)
    trainer = trl.SFTTrainer(model, config, train_dataset=datasets.Dataset.from_list(records), processing_class=tokenizer)
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_losses_are_those_of_trl(trl, llama, tmp_path, cache_dir):
    records, path = talks(), tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    import_run(str(llama), tmp_path / "run", "", quiet)
    found = read_recipe(tmp_path / "run")
    data = DataConfig(
        corpus=str(path),
        validation=str(tmp_path / "held.jsonl"),
        messages_field="messages",
        tokenizer=found.data.tokenizer,
        cache=str(cache_dir),
    )
    (tmp_path / "held.jsonl").write_text(json.dumps({"messages": TALK}) + "\n")
    corpus = corpora.load(data)
    tokenizer = tokens.obtain_tokenizer(data, corpus)
    rows = len(PackedConversations(tokens.prepare(corpus, "train", tokenizer, data.cache), 129, tokenizer.vocabulary()))
    recipe = dataclasses.replace(
        found,
        data=data,
        objective=ObjectiveConfig(kind="chat"),
        optimizer=OptimizerConfig(learning_rate=RATE, schedule="constant", b1=0.9, b2=0.95, weight_decay=0.0),
        train=TrainConfig(
            steps=STEPS, batch_size=rows, log_every=1, eval_every=STEPS, init_from=str(tmp_path / "run"), tracker="none"
        ),
    )
    train(recipe, tmp_path / "tuned")
    lines = map(json.loads, (tmp_path / "tuned" / "metrics.jsonl").read_text().splitlines())
    ours = [line["loss"] for line in lines if "loss" in line]
    theirs = losses_of_trl(trl, llama, records, tmp_path / "trl")
    assert len(ours) == len(theirs) == STEPS
    assert theirs[0] - theirs[-1] > 0.2  # it learns, so that the steps are compared and not the start alone
    assert ours == pytest.approx(theirs, abs=1e-3)
