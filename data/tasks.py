"""Labelled tasks: GLUE, SQuAD and CoNLL through TFDS, files of the user's, and two on Shakespeare's plays."""

import collections
import dataclasses
import itertools
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bothways.data import files, plays
from bothways.data.corpora import quiet_tfds, unavailable
from bothways.data.hold_out import Item, labels_of, with_held_out
from bothways.errors import InputError

# name: fields of the text or pair, metrics (the first one leads), validation split. The test labels are not public.
GLUE: dict[str, tuple[tuple[str, ...], tuple[str, ...], str]] = {
    "cola": (("sentence",), ("matthews",), "validation"),
    "sst2": (("sentence",), ("accuracy",), "validation"),
    "mrpc": (("sentence1", "sentence2"), ("f1", "accuracy"), "validation"),
    "stsb": (("sentence1", "sentence2"), ("pearson", "spearman"), "validation"),
    "qqp": (("question1", "question2"), ("f1", "accuracy"), "validation"),
    "mnli": (("premise", "hypothesis"), ("accuracy",), "validation_matched"),
    "qnli": (("question", "sentence"), ("accuracy",), "validation"),
    "rte": (("sentence1", "sentence2"), ("accuracy",), "validation"),
    "wnli": (("sentence1", "sentence2"), ("accuracy",), "validation"),
}


@dataclasses.dataclass(frozen=True)
class Task:
    """Items by split, and what they ask.

    An item holds, by kind:
      classify: text, text_b (pairs), label (a name);   regress: the same with a number;   multilabel: with a list of names
      tag: words, label (a name per word)
      span: text (the question), text_b (the document), answers: [(first character, text)], none if unanswerable
      choice: text, choices, label (the index of the right one)
    """

    name: str
    kind: str
    splits: dict[str, list[Item]]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    selected_on: str = "validation"
    """What epoch, learning rate and seed are chosen on: never what is reported."""
    tested_on: str = "test"
    """What is reported."""

    @property
    def no_answer(self) -> bool:
        """Whether some questions of training have no answer: of SQuAD those of 2.0, not of 1.1."""
        return self.kind == "span" and any(not item["answers"] for item in self.splits["train"])


def load(name: str, *, text: str = "text", pair: str = "text_b", label: str = "label", seed: int = 0) -> Task:
    """The task of this name: an embedded one, `glue/NAME`, `squad`, `squad/v2.0`, `conll2003`, or a file.

    Args:
      text, pair, label: columns of a CSV, TSV or JSONL file.

    Raises:
      InputError: no such task, unreadable files, empty fields, or a set that cannot be had here (and why).
    """
    if name in EMBEDDED:
        return EMBEDDED[name]()
    if files.looks_like_files(name):
        return from_file(name, text, pair, label, seed)
    if name.startswith("glue/") and name[5:] in GLUE:
        return glue(name[5:])
    if name in ("squad", "squad/v1.1", "squad/v2.0"):
        return squad(name)
    if name in ("conll2003", "conll2003/conll2003"):
        return conll()
    known = [*EMBEDDED, *(f"glue/{g}" for g in GLUE), "squad", "squad/v2.0", "conll2003"]
    raise InputError(f"no task {name!r}; there are {', '.join(known)}, and any CSV, TSV or JSONL file")


def checked(task: Task) -> Task:
    """The task, with every label of validation and test seen in training.

    Raises:
      InputError: a label that training never shows, an empty text, a split without items.
    """
    for name, items in task.splits.items():
        split = task.tested_on if name == "test" else name  # as its file is called
        if not items:
            raise InputError(f"task {task.name}: the {split} split is empty")
        for i, item in enumerate(items):
            parts = item.get("words") or [item[k] for k in ("text", "text_b") if k in item] + item.get("choices", [])
            if not parts or any(not str(part).strip() for part in parts):
                raise InputError(f"task {task.name}: item {i + 1} of {split} has an empty field: {str(item)[:120]}")
            for label in labels_of(item, task.kind):
                if label not in task.labels:
                    raise InputError(
                        f"task {task.name}: item {i + 1} of {split} has the label {label!r}, which training never shows; "
                        f"training has {', '.join(task.labels[:10])}"
                    )
    return task


def seen_labels(items: list[Item]) -> tuple[str, ...]:
    found: set[str] = set()
    for item in items:
        found |= set(item["label"]) if isinstance(item["label"], list) else {item["label"]}
    return tuple(sorted(found))


def speeches(least_words: int) -> Iterator[tuple[str, str, str, str]]:
    """(play, genre, speaker, text) of every speech with so many words or more."""
    for play, kind, text in plays.plays():
        for block in text.split("\n\n"):
            head, _, body = block.partition("\n")
            if head.endswith(":") and body.strip() and len(body.split()) >= least_words:
                yield play, kind, head[:-1], body.strip()


def genre(least_words: int = 80, labelled: int = 4) -> Task:
    """Passages of speeches in a row, `least_words` or more in all; what to tell is their play's genre, one of six.

    The plays held out of language modelling are the test, one of each genre. The last tenth of each training play is
    validation, and of the rest only each `labelled`-th passage has its label: text is plenty, labels are few.
    """
    found: dict[str, list[Item]] = {"train": [], "validation": [], "test": []}
    for (play, kind), said in itertools.groupby(speeches(1), key=lambda s: s[:2]):
        items, begun = [], []
        for *_, text in said:
            begun.append(text)
            if sum(len(t.split()) for t in begun) >= least_words:
                items.append({"text": "\n".join(begun), "label": kind})
                begun = []
        if plays.split_of(play) != "train":
            found["test"] += items
            continue
        cut = int(len(items) * 0.9)
        found["train"] += items[:cut:labelled]
        found["validation"] += items[cut:]
    return checked(Task("shakespeare_genre", "classify", found, seen_labels(found["train"]), ("accuracy", "macro_f1")))


def speaker(least_words: int = 20, roles: int = 10) -> Task:
    """Speeches of the roles that have most of them; what to tell is who speaks.

    A tenth of each role's speeches is held out for validation and a tenth for test, in blocks.
    """
    by_role: dict[str, list[Item]] = collections.defaultdict(list)
    for play, _, who, text in speeches(least_words):
        role = f"{who.title()} ({play})"
        by_role[role].append({"text": text, "label": role})
    found: dict[str, list[Item]] = {"train": [], "validation": [], "test": []}
    for items in sorted(by_role.values(), key=len, reverse=True)[:roles]:
        a, b = int(len(items) * 0.8), int(len(items) * 0.9)
        for split, part in zip(found, (items[:a], items[a:b], items[b:]), strict=True):
            found[split] += part
    return checked(Task("shakespeare_speaker", "classify", found, seen_labels(found["train"]), ("accuracy", "macro_f1")))


EMBEDDED = {"shakespeare_genre": genre, "shakespeare_speaker": speaker}


SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "development"),
    "test": ("test", "testing", "eval"),
}


def splits_of(paths: list[Path]) -> dict[Path, str]:
    """Which split each file holds, by a word of its name: `my_dev-2.csv` is validation, `latest.csv` no split's.

    Files without such a word are training data, unless another one says that it is.

    Raises:
      InputError: a name with words of two splits, or one without any beside a file that is called train.
    """
    if len(paths) == 1:
        return {paths[0]: "train"}
    found: dict[Path, str] = {}
    for path in paths:
        words = set(re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", path.stem).lower()))
        named = [split for split, its in SPLIT_WORDS.items() if words & set(its)]
        if len(named) > 1:
            raise InputError(
                f"{path.name} names two splits, {' and '.join(named)}; rename it after the one that it holds"
            )
        found[path] = named[0] if named else ""
    unnamed = [path.name for path, split in found.items() if not split]
    if unnamed and "train" in found.values():
        raise InputError(
            f"{', '.join(unnamed[:5])}: beside a file called train, every file's name says its split: "
            "train, validation (val, dev) or test"
        )
    return {path: split or "train" for path, split in found.items()}


def from_file(pattern: str, text: str, pair: str, label: str, seed: int) -> Task:
    """A table or JSONL file: `text`, maybe `text_b`, `label`; or words and labels; question, context, answers; choices.

    Several files are splits by the words in their names (`splits_of`); what there is none of is held out (hold_out.py).
    """
    by_split: dict[str, list[tuple[Path, int, dict]]] = collections.defaultdict(list)
    paths = files.matching(pattern, files.TABLES)
    for path, split in splits_of(paths).items():
        if files.kind(path) not in files.TABLES:
            raise InputError(f"{path}: a labelled file is .csv, .tsv or .jsonl")
        by_split[split] += [(path, number, record) for number, record in files.records(path)]
    records = by_split["train"]
    if not records:
        raise InputError(f"{pattern}: no labelled records to train on")
    fields = records[0][2]
    if "words" in fields:
        kind, make = "tag", lambda r: {"words": list(r["words"]), "label": list(r["labels"])}
    elif "context" in fields and "question" in fields:
        kind = "span"

        def make(r: dict) -> Item:
            answers = [(int(a["start"]), str(a["text"])) for a in r["answers"]]
            return {"text": r["question"], "text_b": r["context"], "answers": answers}

    elif "choices" in fields:
        kind, make = "choice", lambda r: {"text": r[text], "choices": list(r["choices"]), "label": int(r[label])}
    else:
        numbers = all(is_number(str(r.get(label))) for _, _, r in records)
        fractions = (
            any("." in str(r[label]) or not math.isfinite(float(r[label])) for _, _, r in records) if numbers else False
        )
        kind = "regress" if fractions else "classify"
        if any(isinstance(r.get(label), list) for _, _, r in records):
            kind = "multilabel"

        def make(r: dict) -> Item:
            second = {"text_b": r[pair]} if pair in fields else {}
            value = r[label]
            if kind == "multilabel":
                value = sorted({str(name).strip() for name in value}) if isinstance(value, list) else value
            elif value not in (None, ""):
                value = float(value) if kind == "regress" else str(value).strip()
            return {"text": r[text], **second, "label": value}

    def items(records: list[tuple[Path, int, dict]]) -> list[Item]:
        made = []
        for path, number, record in records:
            try:
                item = make(record)
            except (KeyError, TypeError, ValueError) as e:
                raise InputError(
                    f"{path}, line {number}: {type(e).__name__} {e}; the fields are {', '.join(map(str, record))}; "
                    "name them with --text-field, --pair-field and --label-field"
                ) from e
            if any(value in (None, "") for value in item.values()):
                raise InputError(f"{path}, line {number}: an empty field in {str(record)[:100]}")
            wrong = misfit(item, kind)
            if wrong:
                raise InputError(f"{path}, line {number}: {wrong} in {str(record)[:100]}")
            made.append(item)
        return made

    given = {split: items(part) for split, part in by_split.items()}
    splits, selected_on, tested_on = with_held_out(given, kind, seed)
    metrics = {"classify": ("accuracy", "macro_f1"), "regress": ("pearson", "spearman"), "tag": ("entity_f1", "accuracy")}
    metrics |= {"span": ("span_f1", "exact_match"), "choice": ("accuracy",), "multilabel": ("micro_f1", "macro_f1")}
    labels = seen_labels(splits["train"]) if kind in ("classify", "multilabel", "tag") else ()
    if kind == "multilabel" and not labels:
        raise InputError(f"{pattern}: no item to train on has a label: every {label!r} is an empty list")
    if kind == "tag" and not any(
        name.startswith(("B-", "I-")) for name in labels
    ):  # no entities, such as parts of speech
        metrics["tag"] = ("accuracy", "macro_f1")
    name = Path(pattern).stem if Path(pattern).exists() else name_of(files.matching(pattern)[0])
    return checked(Task(name, kind, splits, labels, metrics[kind], selected_on, tested_on))


def name_of(path: files.AnyPath) -> str:
    """Of the first of several files, their folder; of one behind a URL, its own, without its kind."""
    return os.path.basename(str(path)).partition(".")[0] if isinstance(path, files.Remote) else path.parent.name


def misfit(item: Item, kind: str) -> str:
    """What of an item's parts does not fit together; empty if all does."""
    parts = [*item.get("words", []), *(item[k] for k in ("text", "text_b") if k in item), *item.get("choices", [])]
    if not all(isinstance(part, str) for part in parts):
        return "a text that is no string"
    if not parts or not all(part.strip() for part in parts):
        return "an empty field"
    label = item.get("label")
    if kind == "multilabel" and not isinstance(label, list):
        return f"the label {label!r}, which is no list as others are,"
    if kind == "multilabel" and not all(label):
        return "an empty label"
    if isinstance(label, float) and not math.isfinite(label):
        return f"the label {label}, which is no finite number,"
    if kind == "tag" and not all(isinstance(tag, str) for tag in item["label"]):
        return "a tag that is no string (write the names of the tags, such as B-PER, in place of their numbers)"
    if kind == "tag" and len(item["words"]) != len(item["label"]):
        return f"{len(item['words'])} words and {len(item['label'])} labels"
    if kind == "choice" and not 0 <= item["label"] < len(item["choices"]):
        return f"label {item['label']} among {len(item['choices'])} choices, counted from 0,"
    if kind == "span" and any(item["text_b"][first : first + len(text)] != text for first, text in item["answers"]):
        return "an answer that does not stand at its start"
    return ""


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def tfds_splits(name: str, wanted: dict[str, str]) -> tuple[dict[str, list[dict]], Any]:
    """Records of a TFDS set by split, and its features."""
    with quiet_tfds() as tfds:
        import tensorflow_datasets.question_answering
        import tensorflow_datasets.text  # noqa: F401

        try:
            builder = tfds.builder(name, file_format="array_record")
            builder.download_and_prepare()
        except Exception as e:
            raise InputError(unavailable(name, e)) from e
        return {s: list(builder.as_data_source(theirs)) for s, theirs in wanted.items()}, builder.info.features


def glue(name: str) -> Task:
    """A GLUE task (arXiv 1804.07461). Its test labels are not public: its validation split is reported."""
    names, metrics, validation = GLUE[name]
    records, features = tfds_splits(f"glue/{name}", {"train": "train", "validation": validation})
    kind = "regress" if name == "stsb" else "classify"

    def item(r: dict) -> Item:
        label = float(r["label"]) if kind == "regress" else features["label"].int2str(int(r["label"]))
        return {key: r[field].decode() for key, field in zip(("text", "text_b"), names, strict=False)} | {"label": label}

    given = {split: [item(r) for r in part] for split, part in records.items()}
    splits, *chosen_on = with_held_out(given, kind)
    labels = seen_labels(splits["train"]) if kind == "classify" else ()
    return checked(Task(f"glue/{name}", kind, splits, labels, metrics, *chosen_on))


def squad(name: str) -> Task:
    """SQuAD 1.1 (arXiv 1606.05250), or 2.0 with questions that have no answer (arXiv 1806.03822)."""
    full = {"squad": "squad/v1.1"}.get(name, name)
    records, _ = tfds_splits(full, {"train": "train", "validation": "validation"})

    def item(r: dict) -> Item:
        starts, texts = r["answers"]["answer_start"], r["answers"]["text"]
        answers = [(int(s), t.decode()) for s, t in zip(starts, texts, strict=True)]
        return {"text": r["question"].decode(), "text_b": r["context"].decode(), "answers": answers}

    splits, *chosen_on = with_held_out({split: [item(r) for r in part] for split, part in records.items()}, "span")
    return Task(name, "span", splits, (), ("span_f1", "exact_match"), *chosen_on)


def conll() -> Task:
    """CoNLL-2003 named entities."""
    wanted = {"train": "train", "validation": "dev", "test": "test"}
    records, features = tfds_splits("conll2003", wanted)
    names = features["ner"].feature

    def item(r: dict) -> Item:
        return {"words": [w.decode() for w in r["tokens"]], "label": [names.int2str(int(t)) for t in r["ner"]]}

    splits = {split: [item(r) for r in part if len(r["tokens"])] for split, part in records.items()}
    return checked(Task("conll2003", "tag", splits, seen_labels(splits["train"]), ("entity_f1", "accuracy")))
