"""Task heads as transformers has them: in, ready for predict, and out again with the same scores and labels."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers

import bothways
from bothways.convert.families import FAMILIES
from bothways.convert.heads import KINDS, differences, task_of
from bothways.convert.run import export_run, import_run
from bothways.errors import InputError
from bothways.rundir import TaskInfo, load_run
from tests.convert.published import SIZES, quiet, save_tokenizer, shuffled

torch = pytest.importorskip("torch", reason="the extra `parity` (torch, transformers) is not installed")
transformers = pytest.importorskip("transformers", reason="the extra `parity` (torch, transformers) is not installed")

CASES = {  # those whose heads are another family's under another name are left out
    "gpt2": ("SequenceClassification", "TokenClassification", "QuestionAnswering"),
    "openai-gpt": ("SequenceClassification",),
    "bert": ("TokenClassification", "QuestionAnswering", "MultipleChoice"),
    "roberta": ("SequenceClassification", "MultipleChoice"),
    "electra": ("MultipleChoice",),
    "distilbert": ("SequenceClassification",),
    "modernbert": ("SequenceClassification", "TokenClassification"),
    "modernbert-decoder": ("SequenceClassification",),
    "gemma2": ("SequenceClassification", "TokenClassification"),
    "falcon": ("QuestionAnswering",),
    "eurobert": ("TokenClassification", "SequenceClassification"),
    "nomic_bert": ("SequenceClassification",),
    "llama": ("SequenceClassification", "TokenClassification", "QuestionAnswering"),
    "mistral": ("QuestionAnswering",),
    "nemotron": ("SequenceClassification", "TokenClassification", "QuestionAnswering"),
    "stablelm": ("SequenceClassification", "TokenClassification"),
}
LABELS = ["sad", "glad", "neither"]
TEXT, PAIR = "the dog sees the queen", "the king speaks"


def published(name: str, suffix: str, home: Path, **values) -> Path:
    """A checkpoint with a head, which `transformers` wrote; with three labels where labels are chosen."""
    family = FAMILIES[name]
    labels = {"id2label": dict(enumerate(LABELS)), "label2id": {label: i for i, label in enumerate(LABELS)}}
    one_layer = {key: 2 for key in ("n_layer", "n_layers", "num_hidden_layers") if key in SIZES[name]}
    values = (labels if suffix in ("SequenceClassification", "TokenClassification") else {}) | one_layer | values
    values |= {"pad_token_id": {"roberta": 1, "xlm-roberta": 1, "camembert": 1}.get(name, 0)}
    values |= {"hidden_size": 24} if "num_key_value_heads" in SIZES[name] else {}
    values |= {"type_vocab_size": 1} if "roberta" in name or name == "camembert" else {}
    config = getattr(transformers, f"{family.classes}Config")(
        vocab_size=save_tokenizer(name, home), **SIZES[name] | values
    )
    if name == "roberta":  # <s> a </s></s> b </s>
        fast = tokenizers.Tokenizer.from_file(str(home / "tokenizer.json"))
        fast.post_processor = tokenizers.processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
        fast.save(str(home / "tokenizer.json"))
    torch.manual_seed(0)
    getattr(transformers, f"{family.classes}For{suffix}")(config).save_pretrained(home)
    shuffled(home)
    return home


def test_every_class_with_a_head_is_there_in_transformers():
    for name, family in FAMILIES.items():
        for suffix in family.tasks:
            assert hasattr(transformers, f"{family.classes}For{suffix}"), (name, suffix)


@pytest.mark.parametrize(("name", "suffix"), [(name, suffix) for name, some in CASES.items() for suffix in some])
def test_a_head_comes_in_and_goes_out_with_the_scores_of_transformers(name, suffix, tmp_path):
    source = published(name, suffix, tmp_path / "source")
    assert import_run(str(source), tmp_path / "run", "shakespeare", quiet).max_difference < 1e-4
    task = load_run(tmp_path / "run", quiet).task
    assert task.kind in KINDS[suffix]
    assert task.labels == (tuple(LABELS) if task.kind in ("classify", "tag") else ())
    first = export_run(tmp_path / "run", tmp_path / "a", quiet)
    assert (first.family, first.max_difference < 1e-4) == (name, True)
    before, after = (json.loads((p / "config.json").read_text()) for p in (source, tmp_path / "a"))
    for key in ("architectures", "id2label"):
        assert before.get(key) == after.get(key)


@pytest.mark.parametrize(
    ("name", "suffix", "values"),
    [
        ("bert", "SequenceClassification", {}),
        (
            "roberta",
            "SequenceClassification",
            {"num_labels": 1, "id2label": {0: "LABEL_0"}} | {"max_position_embeddings": 61},
        ),
        ("modernbert", "SequenceClassification", {"classifier_pooling": "mean"}),
        ("eurobert", "SequenceClassification", {}),
        ("eurobert", "SequenceClassification", {"classifier_pooling": "mean"}),
        ("eurobert", "SequenceClassification", {"classifier_pooling": "bos"}),
        ("gpt2", "SequenceClassification", {}),
    ],
)
def test_predict_gives_the_probabilities_of_the_pipeline_and_export_import_export_the_same_bytes(
    name, suffix, values, tmp_path
):
    """Of a text and of a pair, each wrapped as the vocabulary itself wraps it."""
    source = published(name, suffix, tmp_path / "source", **values)
    import_run(str(source), tmp_path / "run", "shakespeare", quiet)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    model = getattr(transformers, f"AutoModelFor{suffix}").from_pretrained(source).eval()
    for line, texts in ((TEXT, (TEXT,)), (f"{TEXT}\t{PAIR}", (TEXT, PAIR))):
        found = bothways.load(tmp_path / "run").predict([line])[0]
        inputs = tokenizer(*texts, return_tensors="pt", padding=False, truncation=False)
        with torch.no_grad():
            scores = model(**inputs).logits[0].numpy()
        if found.p is None:
            assert abs(found.label - scores[0]) < 1e-4
        else:
            p = np.exp(scores) / np.exp(scores).sum()
            assert (found.label, abs(found.p - p.max()) < 1e-4) == (LABELS[p.argmax()], True)
    export_run(tmp_path / "run", tmp_path / "a", quiet)
    import_run(str(tmp_path / "a"), tmp_path / "again", "shakespeare", quiet)
    export_run(tmp_path / "again", tmp_path / "b", quiet)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_what_a_head_does_not_read_stays_behind_and_what_is_no_single_label_is_refused(tmp_path):
    source = published("bert", "TokenClassification", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    for values, says in (
        ({"id2label": {"0": "a", "2": "b", "3": "c"}}, "number its labels from 0"),
        ({"id2label": {"0": "a", "1": "a", "2": "c"}}, "one name"),
        ({"architectures": ["BertForNextSentencePrediction"]}, "left over: classifier"),
    ):
        (source / "config.json").write_text(json.dumps(config | values))
        with pytest.raises(InputError, match=says):
            import_run(str(source), tmp_path / "run", "shakespeare", quiet)
    (source / "config.json").write_text(json.dumps(config))
    from tests.convert.published import change

    change(source, **{"bert/pooler/dense/weight": np.ones((22, 22), np.float32), "bert/pooler/dense/bias": np.ones(22)})
    import_run(str(source), tmp_path / "run", "shakespeare", quiet)
    assert not load_run(tmp_path / "run", quiet).recipe.model.pooler
    assert dataclasses.asdict(load_run(tmp_path / "run", quiet).task)["wrap"] == "vocabulary"


@pytest.mark.parametrize(("name", "known"), [("modernbert", "cls, mean"), ("eurobert", "late, bos, mean")])
def test_a_pooling_that_is_not_known_is_refused_by_name(name, known):
    theirs = {"architectures": [f"{FAMILIES[name].classes}ForSequenceClassification"], "classifier_pooling": "max"}
    with pytest.raises(InputError, match=f"classifier_pooling is 'max'; .* only {known}"):
        task_of(FAMILIES[name], theirs, FAMILIES["llama"].config({"vocab_size": 307} | SIZES["llama"], []), "run")


def test_what_only_scores_of_tokens_have_keeps_no_head_from_a_family():
    """A fine-tuned Llama with a cap and a transform before its output layer is a Llama with a head."""
    sizes = {"vocab_size": 307} | SIZES["llama"]
    model = FAMILIES["llama"].config(sizes, ["model."])
    model = dataclasses.replace(model, output_transform=True, output_bias=True, logit_cap=3.0, tie_embeddings=False)
    task = TaskInfo("made up", "classify", tuple(LABELS), 11, (), "token")
    assert differences(FAMILIES["llama"], task, model, np.zeros(3), ends_in_pad=False) == []
    capped = dataclasses.replace(model, score_cap=3.0)
    assert differences(FAMILIES["llama"], task, capped, np.zeros(3), False) == ["score_cap=0.0, not 3.0"]


def test_a_head_of_several_labels_comes_in_predicts_and_goes_out(tmp_path):
    several = {"problem_type": "multi_label_classification"}
    source = published("bert", "SequenceClassification", tmp_path / "source", **several)
    import_run(str(source), tmp_path / "run", "shakespeare", quiet)
    task = load_run(tmp_path / "run", quiet).task
    assert (task.kind, task.labels, task.metrics) == ("multilabel", tuple(LABELS), ("micro_f1", "macro_f1"))
    (found,) = bothways.load(tmp_path / "run").predict([TEXT])
    model = transformers.AutoModelForSequenceClassification.from_pretrained(source).eval()
    with torch.no_grad():
        scores = model(**transformers.AutoTokenizer.from_pretrained(source)(TEXT, return_tensors="pt")).logits[0]
    p = torch.sigmoid(scores).numpy()
    np.testing.assert_allclose(list(found.p.values()), p, atol=1e-4)
    assert found.label == [label for label, x in zip(LABELS, p, strict=True) if x >= 0.5]
    export_run(tmp_path / "run", tmp_path / "out", quiet)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["problem_type"] == several["problem_type"]
