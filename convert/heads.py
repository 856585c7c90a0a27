"""Task heads as they are published: classes of a text or of its tokens, a number, a span, a choice.

Our fine-tuned runs hold a body under `task_head` (model/task.py). Each family lists the heads that `transformers` has for it:
which stems hold which layers. A head reads the features only: output layers over the vocabulary that a body brings along stay
behind.
"""

import dataclasses
from typing import Any

import numpy as np

from bothways.convert.family import Config, Family, Head
from bothways.convert.layout import Layout
from bothways.errors import InputError
from bothways.model.config import TransformerConfig
from bothways.rundir import TaskInfo

KINDS = {
    "SequenceClassification": ("classify", "regress", "multilabel"),
    "TokenClassification": ("tag",),
    "QuestionAnswering": ("span",),
    "MultipleChoice": ("choice",),
}
"""Class of `transformers` -> our kinds of task."""
METRICS = {"classify": ("accuracy", "macro_f1"), "regress": ("pearson", "spearman"), "choice": ("accuracy",)}
METRICS |= {"tag": ("accuracy", "macro_f1"), "span": ("span_f1", "exact_match"), "multilabel": ("micro_f1", "macro_f1")}
LABELLED, OF_TEXTS = ("classify", "multilabel", "tag"), ("classify", "multilabel", "regress", "choice")
"""Kinds whose outputs have names, and those that read one vector per text."""
OUTPUT = {"tie_embeddings": True, "output_bias": False, "output_transform": False, "logit_cap": 0.0}
"""Fields of output layers over the vocabulary, which no head reads, and their values without one."""
LONGEST = 512
"""Tokens of a row that a head is given, where the model could read more."""


def suffix_of(theirs: Config) -> str:
    """Which of KINDS a checkpoint is by its config.json; empty: none, it predicts tokens or is a bare body."""
    names = theirs.get("architectures") or [""]
    return next((kind for kind in KINDS if str(names[0]).endswith(f"For{kind}")), "")


def suffix_for(task: TaskInfo) -> str:
    """The class of `transformers` for a task."""
    return next(suffix for suffix, kinds in KINDS.items() if task.kind in kinds)


def flat(params: Any) -> Any:
    """The tree of a fine-tuned run as the tables name it: the body's own modules beside `task_head`."""
    return {**params["body"], "task_head": params["task_head"]}


def nested(params: Any) -> Any:
    """`flat` backwards."""
    return {
        "body": {name: inner for name, inner in params.items() if name != "task_head"},
        "task_head": params["task_head"],
    }


def task_of(family: Family, theirs: Config, cfg: TransformerConfig, name: str) -> TaskInfo:
    """What an imported head was tuned for.

    Raises:
      InputError: the family has no such head, or its labels are not numbered and named one by one.
    """
    suffix = suffix_of(theirs)
    if suffix not in family.tasks:
        raise InputError(f"config.json: a {family.name} with a head for {suffix} is not supported")
    count = len(theirs.get("id2label") or range(theirs.get("num_labels", 2)))
    labels = {int(number): str(label) for number, label in (theirs.get("id2label") or {}).items()}
    if sorted(labels) != list(range(len(labels))):
        raise InputError(f"config.json: id2label must number its labels from 0, and has {sorted(labels)[:12]}")
    named = tuple(labels[i] for i in sorted(labels)) or tuple(f"LABEL_{i}" for i in range(count))
    kind = KINDS[suffix][0]
    if suffix == "SequenceClassification" and (theirs.get("problem_type") == "regression" or len(named) == 1):
        kind = "regress"
    if suffix == "SequenceClassification" and theirs.get("problem_type") == "multi_label_classification":
        kind = "multilabel"
    if kind in LABELLED and len(set(named)) != len(named):
        raise InputError(f"config.json: id2label gives two classes one name: {', '.join(named[:12])}")
    head = family.tasks[suffix]
    pool = _pool_of(head, theirs)
    return TaskInfo(
        name,
        kind,
        named if kind in LABELLED else (),
        min(cfg.context_length, LONGEST),
        METRICS[kind],
        pool if kind in OF_TEXTS else "token",
        head.hidden,
        head.hidden_norm,
        head.hidden_bias,
        "vocabulary",
    )


def _pool_of(head: Head, theirs: Config) -> str:
    words = list(head.pools.values())
    said = theirs.get(head.pool_key, words[0])
    if said not in words:
        raise InputError(
            f"config.json: {head.pool_key} is {said!r}; a head with that is not supported, only {', '.join(words)}"
        )
    return next(ours for ours, word in head.pools.items() if word == said)


def body_config(family: Family, suffix: str, cfg: TransformerConfig) -> TransformerConfig:
    """The configuration of what a head reads: without output layers over the vocabulary."""
    keeps = {"masked_head": False} if family.ours == "bert" else {}
    return dataclasses.replace(cfg, **keeps, **OUTPUT, next_sentence=False, pooler=family.tasks[suffix].pooler)


def layout_of(family: Family, suffix: str, cfg: TransformerConfig) -> Layout:
    """The family's layout of a model with the head's stems in place of those of other heads."""
    head, whole = family.tasks[suffix], family.layout_for(cfg)
    table = whole.table
    body = {stem: ours for stem, ours in table.items() if ours.startswith(("body/", "block/"))}
    body |= {stem: ours for stem, ours in table.items() if head.pooler and ours == "nsp/pooler"}
    if head.prefix:
        body = {head.prefix + stem.removeprefix(family.prefix): ours for stem, ours in body.items()}
    return dataclasses.replace(whole, table=body | head.table)


def without_other_heads(family: Family, suffix: str, tensors: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's tensors but those of layers that the family knows and this head does not read, as a pooler that was
    saved beside it."""
    read = {*family.tasks[suffix].table, *(["nsp/pooler"] if family.tasks[suffix].pooler else [])}
    read |= {stem for stem, ours in family.layout.table.items() if ours in read}
    others = [stem for stem, ours in family.layout.table.items() if not ours.startswith(("body/", "block/"))]
    others = [stem for stem in others if not any(s == stem or s.startswith(f"{stem}.") for s in read)]
    return {name: t for name, t in tensors.items() if name.rpartition(".")[0] not in others}


def absent(family: Family, suffix: str, cfg: TransformerConfig) -> set[str]:
    """Tensors that a checkpoint with this head does not have: a first norm, the bias of a decoder's scores."""
    head = family.tasks[suffix]
    return family.absent(cfg) | (set() if head.bias else {f"{stem}.bias" for stem in head.table})


def differences(family: Family, task: TaskInfo, cfg: TransformerConfig, bias: np.ndarray, ends_in_pad: bool) -> list[str]:
    """Why a family cannot hold a fine-tuned run; empty if it can.

    Args:
      bias: of our head's output layer.
      ends_in_pad: texts of this task end with the token that pads.
    """
    suffix = suffix_for(task)
    if suffix not in family.tasks:
        return [f"no head for {suffix}"]
    head, found = family.tasks[suffix], family.differences(body_config(family, suffix, cfg), tuple(OUTPUT))
    for field in ("hidden", "hidden_bias", "hidden_norm"):
        mine, theirs = getattr(task, field), getattr(head, field)
        found += [] if mine == theirs else [f"a head with {field}={theirs}, not {mine}"]
    pools = task.kind in OF_TEXTS
    if pools and task.pool not in head.pools:
        found.append(f"a head with pool={' or '.join(head.pools)}, not {task.pool}")
    if pools and family.ours == "bert" and cfg.pooled != head.pooler:
        found.append(f"a head that reads {'the pooler' if head.pooler else 'the first token'}")
    if not head.bias and np.any(bias):
        found.append("a head without a bias")
    if pools and family.ours == "gpt" and ends_in_pad:
        found.append("a head that reads the last token other than the one that pads, with which texts end here")
    return found


def labels_json(task: TaskInfo) -> Config:
    """The keys of config.json that say what a head's outputs are."""
    if task.labels:
        return {
            "id2label": {str(i): label for i, label in enumerate(task.labels)},
            "label2id": {label: i for i, label in enumerate(task.labels)},
            **({"problem_type": "multi_label_classification"} if task.kind == "multilabel" else {}),
        }
    if task.kind == "regress":
        return {"problem_type": "regression", "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return {}


def config_json(family: Family, task: TaskInfo, cfg: TransformerConfig) -> Config:
    """config.json of a fine-tuned run as the family publishes it."""
    suffix = suffix_for(task)
    theirs = family.config_json(body_config(family, suffix, cfg))
    stem = family.classes or theirs["architectures"][0]
    theirs["architectures"] = [f"{stem}For{suffix}"]
    head = family.tasks[suffix]
    if head.pool_key:
        theirs[head.pool_key] = head.pools[task.pool]
    return theirs | labels_json(task)
