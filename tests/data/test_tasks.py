"""Labelled tasks: what files become items, which splits they make, and what is refused, with its place."""

import json
import re
from pathlib import Path

import pytest

from bothways.data import plays, tasks
from bothways.errors import InputError

RECORDS = [{"text": f"text {i}", "label": "good" if i % 3 else "bad"} for i in range(20)]


def write(path, records: list[dict]):
    """Records as a JSONL file or a table, whichever the name asks for."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path
    between = "\t" if path.suffix == ".tsv" else ","
    rows = [list(records[0]), *(record.values() for record in records)]
    path.write_text("".join(between.join(str(value) for value in row) + "\n" for row in rows))
    return path


def load(path, **fields) -> tasks.Task:
    return tasks.load(str(path), **fields)


def everything(task: tasks.Task) -> list:
    return [item for items in task.splits.values() for item in items]


# ---- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_texts_with_labels(tmp_path, suffix):
    task = load(write(tmp_path / f"mood{suffix}", RECORDS))
    assert (task.name, task.kind, task.labels) == ("mood", "classify", ("bad", "good"))
    assert task.metrics == ("accuracy", "macro_f1")
    assert sorted(everything(task), key=lambda item: int(item["text"][5:])) == RECORDS
    assert (task.selected_on, task.tested_on) == ("2 other items held out of train", "2 items held out of train")


def test_columns_may_have_other_names(tmp_path):
    records = [{"first": f"a{i}", "second": f"b{i}", "same": i % 2} for i in range(20)]
    task = load(write(tmp_path / "pairs.csv", records), text="first", pair="second", label="same")
    assert (task.kind, task.labels) == ("classify", ("0", "1"))
    for item in everything(task):
        assert item["text"][1:] == item["text_b"][1:]
        assert item["label"] == str(int(item["text"][1:]) % 2)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_numbers_with_a_point_are_regressed(tmp_path, suffix):
    task = load(write(tmp_path / f"scores{suffix}", [{"text": f"t{i}", "label": i / 2} for i in range(20)]))
    assert (task.kind, task.labels, task.metrics) == ("regress", (), ("pearson", "spearman"))
    assert sorted(item["label"] for item in everything(task)) == [i / 2 for i in range(20)]


def test_words_with_labels_are_tagged(tmp_path):
    records = [{"words": ["king", f"n{i}"], "labels": ["B-x", "O"]} for i in range(20)]
    task = load(write(tmp_path / "names.jsonl", records))
    assert (task.kind, task.labels, task.metrics) == ("tag", ("B-x", "O"), ("entity_f1", "accuracy"))
    assert {"words": ["king", "n7"], "label": ["B-x", "O"]} in everything(task)


def test_tags_that_are_numbers_are_refused(tmp_path):
    path = write(tmp_path / "names.jsonl", [{"words": ["king", "lear"], "labels": [3, 0]}] * 20)
    with pytest.raises(InputError, match="names.jsonl, line 1: a tag that is no string"):
        load(path)


def test_a_task_behind_a_url_has_its_name(tmp_path):
    import fsspec

    content = write(tmp_path / "moods.jsonl", RECORDS).read_text()
    fsspec.filesystem("memory").pipe("/task/moods.jsonl", content.encode())
    assert load("memory://task/moods.jsonl").name == "moods"


def test_tags_without_entities_are_not_measured_by_them(tmp_path):
    records = [{"words": ["king", f"n{i}"], "labels": ["NOUN", "X"]} for i in range(20)]
    assert load(write(tmp_path / "speech.jsonl", records)).metrics == ("accuracy", "macro_f1")


def test_questions_on_documents(tmp_path):
    answers = [{"start": 4, "text": "king"}, {"start": 0, "text": "the king"}]
    records = [{"question": f"q{i}", "context": "the king", "answers": answers[: i % 3]} for i in range(20)]
    task = load(write(tmp_path / "who.jsonl", records))
    assert (task.kind, task.labels, task.metrics) == ("span", (), ("span_f1", "exact_match"))
    for item in everything(task):
        wanted = [(4, "king"), (0, "the king")][: int(item["text"][1:]) % 3]
        assert (item["text_b"], item["answers"]) == ("the king", wanted)


def test_choices(tmp_path):
    records = [{"text": f"t{i}", "choices": ["yes", "no"], "label": i % 2} for i in range(20)]
    task = load(write(tmp_path / "which.jsonl", records))
    assert (task.kind, task.labels, task.metrics) == ("choice", (), ("accuracy",))
    assert {"text": "t3", "choices": ["yes", "no"], "label": 1} in everything(task)


# ---- splits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", ["valid", "validation", "dev", "val", "Val-2"])
def test_files_are_splits_by_their_names(tmp_path, held):
    for name, part in (("train", RECORDS[:10]), (held, RECORDS[10:14]), ("test", RECORDS[14:])):
        write(tmp_path / f"mood.{name}.jsonl", part)
    task = load(tmp_path / "mood.*.jsonl")
    assert task.splits == {"train": RECORDS[:10], "validation": RECORDS[10:14], "test": RECORDS[14:]}


@pytest.mark.parametrize(("given", "called"), [("dev", "validation"), ("test", "test")])
def test_what_is_reported_chooses_nothing(tmp_path, given, called):
    """Where there is one held-out file it is reported, and part of train chooses."""
    write(tmp_path / "train.csv", RECORDS[:15])
    write(tmp_path / f"{given}.csv", RECORDS[15:])
    task = load(tmp_path / "*.csv")
    assert task.splits["test"] == RECORDS[15:]
    assert len(task.splits["validation"]) == 1
    assert sorted(task.splits["train"] + task.splits["validation"], key=RECORDS.index) == RECORDS[:15]
    assert (task.selected_on, task.tested_on) == ("1 items held out of train", called)


@pytest.mark.parametrize("name", ["glue/rte", "squad"])
def test_of_published_tasks_validation_is_reported_and_part_of_train_chooses(monkeypatch, name):
    class Names:
        def int2str(self, i):
            return ("no", "yes")[i]

    def record(i):
        answers = {"answer_start": [4], "text": [b"king"]}
        texts = {
            "sentence1": f"a{i}".encode(),
            "sentence2": b"b",
            "question": b"who",
            "context": b"the king of %d" % (i // 4),
        }
        return texts | {"label": i % 2, "answers": answers}

    records = {"train": [record(i) for i in range(80)], "validation": [record(i) for i in range(800, 807)]}
    monkeypatch.setattr(tasks, "tfds_splits", lambda *_: (records, {"label": Names()}))
    task = tasks.load(name)
    assert {split: len(items) for split, items in task.splits.items()} == {"train": 72, "validation": 8, "test": 7}
    texts = {split: {item["text"] + item["text_b"] for item in items} for split, items in task.splits.items()}
    assert not texts["validation"] & (texts["test"] | texts["train"])  # questions on one document stay together
    assert (task.selected_on, task.tested_on) == ("8 items held out of train", "validation")
    assert not task.no_answer


def test_a_label_stays_in_train_when_items_are_held_out(tmp_path):
    rare = [{"text": f"text {i}", "label": "rare" if i == 7 else "often"} for i in range(20)]
    for seed in range(20):
        assert load(write(tmp_path / "a.csv", rare), seed=seed).labels == ("often", "rare")


@pytest.mark.parametrize("name", ["mood.csv", "latest.csv", "devices.csv"])
def test_of_a_single_file_a_tenth_each_is_held_out(tmp_path, name):
    task = load(write(tmp_path / name, RECORDS))
    assert {split: len(items) for split, items in task.splits.items()} == {"train": 16, "validation": 2, "test": 2}
    assert len({item["text"] for item in everything(task)}) == 20
    assert load(tmp_path / name, seed=0).splits == task.splits
    assert load(tmp_path / name, seed=1).splits != task.splits


def test_a_file_named_train_trains_whatever_else_is_in_its_name(tmp_path):
    write(tmp_path / "latest_train.csv", RECORDS[:15])
    write(tmp_path / "latest_test.csv", RECORDS[15:])
    splits = load(tmp_path / "*.csv").splits
    assert len(splits["train"] + splits["validation"]) == 15
    assert splits["test"] == RECORDS[15:]


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["latest", "contest", "device_reviews"], ["train", "train", "train"]),
        (["a", "test_untrained"], ["train", "test"]),
        (["my-train", "devSet", "eval_1"], ["train", "validation", "test"]),
    ],
)
def test_only_whole_words_of_a_name_say_its_split(names, splits):
    assert list(tasks.splits_of([Path(f"{name}.csv") for name in names]).values()) == splits


@pytest.mark.parametrize(
    ("names", "message"), [(["train", "other"], "other.csv: beside"), (["train_test", "b"], "train_test.csv names two")]
)
def test_names_that_leave_the_split_open_are_refused(names, message):
    with pytest.raises(InputError, match=message):
        tasks.splits_of([Path(f"{name}.csv") for name in names])


def test_what_is_no_table_is_left_out_of_a_folder(tmp_path):
    write(tmp_path / "train.csv", RECORDS[:15])
    write(tmp_path / "test.csv", RECORDS[15:])
    (tmp_path / "README.md").write_text("a set")
    assert load(tmp_path).splits["test"] == RECORDS[15:]


@pytest.mark.parametrize("bad", ["nan", "inf", "NaN"])
def test_a_label_that_is_not_finite_is_refused(tmp_path, bad):
    rows = [{"text": f"t {i}", "label": str(i % 3) + ".5"} for i in range(20)]
    with pytest.raises(InputError, match="line 4: the label (nan|inf), which is no finite number"):
        load(write(tmp_path / "a.csv", [*rows[:2], {"text": "t", "label": bad}, *rows[2:]]))


def test_a_space_behind_a_label_makes_no_class(tmp_path):
    rows = [{"text": f"t {i}", "label": "pos " if i % 2 else "pos"} for i in range(20)]
    assert load(write(tmp_path / "a.csv", rows)).labels == ("pos",)


# ---- refusals ------------------------------------------------------------------------------------------------------

OTHER = [{"body": f"text {i}", "label": "x"} for i in range(4)]
TAGS = {"words": ["a", "b"], "labels": ["O", "O"]}
SPAN = {"question": "q", "context": "the king", "answers": [{"start": 4, "text": "king"}]}
CHOICE = {"text": "t", "choices": ["yes", "no"], "label": 1}


@pytest.mark.parametrize(
    ("records", "line", "message"),
    [
        (OTHER, 1, "KeyError 'text'; the fields are body, label; name them with --text-field, --pair-field and"),
        ([{"text": "t", "mood": "x"}] * 4, 1, "KeyError 'label'; the fields are text, mood"),
        ([*RECORDS[:2], {"text": "", "label": "good"}], 3, "an empty field"),
        ([*RECORDS[:2], {"text": "t", "label": ""}], 3, "an empty field"),
        ([*RECORDS[:2], {"text": "t", "label": None}], 3, "an empty field"),
        ([*RECORDS[:2], {"text": 5, "label": "good"}], 3, "a text that is no string"),
        ([TAGS, TAGS, TAGS | {"labels": ["O"]}], 3, "2 words and 1 labels"),
        ([TAGS, {"words": ["a"]}], 2, "KeyError 'labels'; the fields are words"),
        ([SPAN, SPAN | {"answers": [{"start": 3, "text": "king"}]}], 2, "an answer that does not stand at its start"),
        ([SPAN, SPAN | {"answers": None}], 2, "TypeError"),
        ([CHOICE, CHOICE | {"label": 2}], 2, "label 2 among 2 choices"),
        ([CHOICE, CHOICE | {"label": "yes"}], 2, "ValueError"),
    ],
)
def test_a_bad_record_is_refused_with_its_line(tmp_path, records, line, message):
    path = write(tmp_path / "data.jsonl", records)
    with pytest.raises(InputError, match=re.escape(f"{path}, line {line}: ")) as refused:
        load(path)
    assert message in str(refused.value)


def test_a_row_cut_short_is_refused_with_its_line(tmp_path):
    (tmp_path / "data.csv").write_text("text,label\na,x\nb\nc,x\n")
    with pytest.raises(InputError, match="data.csv, line 3: an empty field"):
        load(tmp_path / "data.csv")


def test_a_number_that_is_none_is_refused_with_its_line(tmp_path):
    write(tmp_path / "train.csv", [{"text": "t", "label": 0.5}] * 4)
    write(tmp_path / "test.csv", [{"text": "t", "label": 0.5}, {"text": "t", "label": "half"}])
    with pytest.raises(InputError, match=r"test.csv, line 3: ValueError .*'half'"):
        load(tmp_path / "*.csv")


def test_a_label_that_training_never_shows_is_named(tmp_path):
    write(tmp_path / "train.csv", RECORDS)
    write(tmp_path / "test.csv", [*RECORDS[:3], {"text": "t", "label": "ugly"}])
    with pytest.raises(InputError, match="item 4 of test has the label 'ugly', .* training has bad, good"):
        load(tmp_path / "*.csv")
    write(tmp_path / "train.jsonl", [TAGS] * 3)
    write(tmp_path / "dev.jsonl", [TAGS, TAGS | {"labels": ["O", "B-x"]}])
    with pytest.raises(InputError, match="item 2 of validation has the label 'B-x', which training never shows"):
        load(tmp_path / "*.jsonl")


@pytest.mark.parametrize(
    "record", [{"words": ["a", " "], "labels": ["O", "O"]}, {"words": [], "labels": []}], ids=["blank", "none"]
)
def test_words_of_nothing_are_refused(tmp_path, record):
    write(tmp_path / "train.jsonl", [TAGS, record])
    write(tmp_path / "test.jsonl", [TAGS])
    with pytest.raises(InputError, match="train.jsonl, line 2: an empty field"):
        load(tmp_path / "*.jsonl")


def test_too_few_records_are_refused(tmp_path):
    with pytest.raises(InputError, match="2 items to train on are too few to hold some out"):
        load(write(tmp_path / "data.csv", RECORDS[:2]))
    (tmp_path / "none.csv").write_text("text,label\n")
    with pytest.raises(InputError, match="no labelled records to train on"):
        load(tmp_path / "none.csv")


def test_plain_text_has_no_labels(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(InputError, match="a labelled file is .csv, .tsv or .jsonl"):
        load(tmp_path / "a.txt")


@pytest.mark.parametrize("name", ["nonsense", "glue/nonsense", "squad/v7"])
def test_an_unknown_task_is_refused_with_those_there_are(name):
    with pytest.raises(InputError, match=f"no task '{name}'; there are ") as refused:
        tasks.load(name)
    for known in ("shakespeare_genre", "glue/cola", "glue/wnli", "squad/v2.0", "conll2003", "JSONL"):
        assert known in str(refused.value)


# ---- TFDS ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["glue/rte", "squad", "conll2003"])
@pytest.mark.parametrize(
    ("error", "why"),
    [
        (ModuleNotFoundError("No module named 'tensorflow'"), "unpacks with TensorFlow"),
        (ConnectionError("Max retries exceeded"), "could not be downloaded"),
    ],
    ids=["tensorflow", "network"],
)
def test_a_set_that_cannot_be_had_says_why(monkeypatch, name, error, why):
    import tensorflow_datasets

    def builder(*args, **kwargs):
        raise error

    monkeypatch.setattr(tensorflow_datasets, "builder", builder)
    with pytest.raises(InputError, match=f"TFDS dataset '{name}.*cannot be had here: .*{why}"):
        tasks.load(name)


# ---- Shakespeare ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=tasks.EMBEDDED)
def embedded(request) -> tasks.Task:
    return tasks.load(request.param)


def test_every_label_is_in_every_split_and_no_speech_in_two(embedded):
    assert len(embedded.labels) == {"shakespeare_genre": 6, "shakespeare_speaker": 10}[embedded.name]
    for items in embedded.splits.values():
        assert {item["label"] for item in items} == set(embedded.labels)
        assert all(len(item["text"].split()) >= 20 for item in items)
    texts = {split: {item["text"] for item in items} for split, items in embedded.splits.items()}
    assert not texts["train"] & texts["test"]
    assert not texts["train"] & texts["validation"]
    assert not texts["validation"] & texts["test"]


def test_genres_are_tested_on_plays_that_training_never_shows():
    task = tasks.load("shakespeare_genre")
    held = "\n".join(text for name, _, text in plays.plays() if plays.split_of(name) != "train")
    shown = "\n".join(text for name, _, text in plays.plays() if plays.split_of(name) == "train")

    def within(item, text):
        return all(line in text for line in item["text"].splitlines() if len(line) > 30)

    assert all(within(item, held) for item in task.splits["test"][::20])
    assert all(within(item, shown) for split in ("train", "validation") for item in task.splits[split][::20])
    assert not any(within(item, held) for item in task.splits["train"][::20])
    assert all(len(item["text"].split()) >= 80 for items in task.splits.values() for item in items)


def test_of_genres_every_fourth_passage_is_labelled():
    all_of_them, fourth = tasks.genre(labelled=1).splits, tasks.genre().splits
    assert len(all_of_them["train"]) > 3.9 * len(fourth["train"])
    assert {item["text"] for item in fourth["train"]} < {item["text"] for item in all_of_them["train"]}
    assert all_of_them["test"] == fourth["test"]
