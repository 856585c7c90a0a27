"""Search: exact at any size of block, measured as BEIR does, and what the command prints and refuses."""

import json
import logging

import numpy as np
import pytest

import bothways
from bothways.data.retrieval import write_beir
from bothways.errors import InputError
from bothways.recipes import Recipe
from bothways.rundir import TaskInfo
from bothways.sample import search as of
from bothways.sample.predict import TaskPredictor

WORDS = "king queen fool storm ship crown dog sea".split()


@pytest.mark.parametrize(("block", "together"), [(5, 3), (7, 100), (64, 4)])
def test_the_best_are_exact_in_any_blocks(block, together):
    rng = np.random.default_rng(0)
    queries, documents = rng.integers(-2, 3, (7, 3)).astype(np.float32), rng.integers(-2, 3, (23, 3)).astype(np.float32)
    blocks = (documents[i : i + block] for i in range(0, 23, block))
    scores, numbers = of.top_k(queries, blocks, 6, block, together)
    wanted = np.argsort(-(queries @ documents.T), axis=1, kind="stable")[:, :6]  # of equals the earlier one
    np.testing.assert_array_equal(numbers, wanted)
    np.testing.assert_array_equal(scores, np.take_along_axis(queries @ documents.T, wanted, axis=1))


def test_where_there_are_fewer_than_wanted():
    scores, numbers = of.top_k(np.ones((1, 2), np.float32), iter([np.ones((2, 2), np.float32)]), 4, 3)
    assert numbers.tolist() == [[0, 1, -1, -1]]
    assert np.isneginf(scores[0, 2:]).all()


def test_measures_are_those_of_beir():
    ranking = {"a": [("x", 3.0), ("y", 2.0), ("z", 1.0)], "b": [("y", 2.0), ("x", 1.0), ("z", 0.5)]}
    right = {"a": {"x": 1, "z": 2}, "b": {"w": 1, "x": 0}}
    found = {f.metric: f for f in of.measures(ranking, right, 2)}
    dcg, best = 1 + 2 / 2, 2 + 1 / np.log2(3)
    assert found["ndcg@10"].value == pytest.approx((dcg / best + 0) / 2)
    assert found["mrr@10"].value == pytest.approx(0.5)
    assert found["recall@2"].value == pytest.approx((1 / 2 + 0) / 2)
    assert found["mrr@10"].interval == (0.0, 1.0)
    assert found["mrr@10"].n == 2


def test_only_ten_ranks_count():
    ranking = {"a": [(str(i), -float(i)) for i in range(12)]}
    found = {f.metric: f.value for f in of.measures(ranking, {"a": {"10": 1}}, 12)}
    assert found == {"ndcg@10": 0.0, "mrr@10": 0.0, "recall@12": 1.0}


class ByLetters:
    """A model whose vectors count letters, and which says what it was given."""

    def __init__(self):
        self.embedding, self.given = None, []

    def embed(self, texts, prompt=""):
        self.given.append(len(texts))
        return np.array([[text.count(c) for c in "abcdefghijklmnopqrstuvwxyz"] for text in texts], np.float32)


def test_documents_are_embedded_a_block_at_a_time():
    model = ByLetters()
    documents = ((str(i), word) for i, word in enumerate(WORDS))
    ranking = of.search(model, {"q": "gink", "r": "tropms"}, documents, 2, block=3)
    assert model.given == [2, 3, 3, 2]
    assert ranking["q"][0] == ("0", pytest.approx(1))
    assert ranking["r"][0][0] == "3"


def test_vectors_that_are_not_finite_find_nothing():
    model = ByLetters()
    model.embed, model.run = lambda *_, **__: np.full((1, 2), np.nan), type("R", (), {"home": "runs/x"})
    with pytest.raises(InputError, match="the vectors of runs/x are not finite"):
        of.embed_side(model, ["a"], "query")


def test_bm25_finds_by_words_and_says_nothing(caplog):
    bm25s = pytest.importorskip("bm25s", reason="bm25s is not installed")
    bm25s.logger.setLevel(logging.DEBUG)  # as importing it does
    found = of.by_words({"q": "old king"}, iter([("1", "the queen sees"), ("2", "the old king sees")]), 10)
    assert [name for name, _ in found["q"]] == ["2", "1"]
    assert not caplog.records


def test_reranking_keeps_the_order_of_equals():
    scorer = object.__new__(of.TaskPredictor)
    scorer.pair_scores = lambda pairs: [float(len(text)) for _, text in pairs]
    ranking = {"q": [("a", 0.9), ("b", 0.8), ("c", 0.7)]}
    found = of.reranked(scorer, ranking, {"q": "x"}, {"a": "1", "b": "123", "c": "456"})
    assert found["q"] == [("b", 3.0), ("c", 3.0), ("a", 1.0)]


def test_pairs_are_scored_some_at_a_time(monkeypatch):
    scorer, given = object.__new__(of.TaskPredictor), []
    scorer.pair_scores = lambda pairs: given.append(len(pairs)) or [float(text) for _, text in pairs]
    ranking = {query: [(str(i), 0.0) for i in range(4)] for query in "abc"}
    texts = {str(i): str(i) for i in range(4)}
    monkeypatch.setattr(of, "PAIRS", 5)
    found = of.reranked(scorer, ranking, dict.fromkeys("abc", "x"), texts)
    assert given == [5, 5, 2]
    assert [[name for name, _ in found[query]] for query in "abc"] == [["3", "2", "1", "0"]] * 3


# ---- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """BEIR's directory of words, each asked for by its letters in another order; and a run that counts letters."""
    model = ByLetters()
    model.task, model.run, model.recipe = None, type("R", (), {"home": "runs/letters"}), Recipe()
    monkeypatch.setattr(bothways, "load", lambda *_, **__: model)
    queries = {f"q{i}": "".join(sorted(word)) for i, word in enumerate(WORDS)}
    right = {f"q{i}": {f"d{i}": 1} for i in range(len(WORDS))}
    documents = [(f"d{i}", word) for i, word in enumerate(WORDS)]
    write_beir(tmp_path / "set", documents, queries.items(), {"test": right})
    return tmp_path / "set"


def test_figures_with_intervals_where_answers_are_known(folder, capsys):
    assert bothways.main(["search", "runs/letters", str(folder), "--top", "3", "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(f["suite"], f["metric"], f["value"], f["n"]) for f in found] == [
        ("search", name, 1.0, 8) for name in ("ndcg@10", "mrr@10", "recall@3")
    ]


def test_two_systems_are_compared_query_by_query():
    right = {"a": {"x": 1}, "b": {"y": 1}, "c": {"z": 1}}
    one = {"b": [("y", 0.9)], "c": [("q", 0.9)], "a": [("x", 0.9)]}  # whatever the order of the queries
    two = {"a": [("x", 0.9)], "b": [("n", 0.9), ("y", 0.5)], "c": [("q", 0.9)]}
    ndcg, mrr, recall = of.differences(one, two, right, 3, "one-two")
    assert [f.suite for f in (ndcg, mrr, recall)] == ["one-two"] * 3
    assert ndcg.value == pytest.approx((1 - 1 / np.log2(3)) / 3)
    assert mrr.value == pytest.approx(0.5 / 3)
    assert recall.value == 0
    assert mrr.interval[0] == 0 < mrr.interval[1]
    assert recall.interval == (0, 0)


def test_another_run_searches_the_same(folder, capsys):
    assert bothways.main(["search", "runs/letters", str(folder), "--against", "runs/others", "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    values = {(f["suite"], f["metric"]): f["value"] for f in found}
    assert values["against", "mrr@10"] == values["search", "mrr@10"] == 1
    assert values["search-against", "mrr@10"] == 0
    (folder.parent / "asked.txt").write_text("gink\n")
    files = [str(folder / "corpus.jsonl"), str(folder.parent / "asked.txt")]
    assert bothways.main(["search", "runs/letters", *files, "--against", "runs/others"]) == 2
    assert "--against compares by right answers" in capsys.readouterr().err


def test_texts_where_they_are_not(folder, tmp_path, capsys):
    (tmp_path / "asked.txt").write_text("gink\n")
    arguments = ["search", "runs/letters", str(folder / "corpus.jsonl"), str(tmp_path / "asked.txt"), "--top", "2"]
    assert bothways.main([*arguments, "--json"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == {"system": "search", "query": "1", "id": "d0", "score": 1.0, "rank": 1}
    assert second["rank"] == 2
    assert bothways.main(arguments) == 0
    assert capsys.readouterr().out.splitlines()[0] == "search\t1\t1\td0\t1.0000"


def test_what_cannot_be_measured_ends_with_code_2(folder, capsys):
    for arguments, message in (
        (["--top", "0"], "--top is 0"),
        (["--split", "dev"], "no file"),
        (["--rerank", "runs/letters"], "is not fine-tuned on pairs of texts"),
        (["--rerank-top", "7"], "--rerank-top is for --rerank"),
        ([str(folder / "queries.jsonl"), "--split", "dev"], "--split is for BEIR's directory"),
    ):
        assert bothways.main(["search", "runs/letters", str(folder), *arguments]) == 2
        assert message in capsys.readouterr().err
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td0\t1\n")
    assert bothways.main(["search", "runs/letters", str(folder)]) == 2
    assert "has no right answer" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["an answer that is not there", "an empty document", "no scorer of pairs"])
def test_what_is_wrong_is_said_before_any_text_is_embedded(folder, wrong, capsys):
    arguments = ["search", "runs/letters", str(folder)]
    if wrong == "no scorer of pairs":
        arguments += ["--rerank", "runs/letters"]
    elif wrong == "an empty document":
        with (folder / "corpus.jsonl").open("a") as out:
            out.write('{"_id": "last", "text": " "}\n')
    else:
        with (folder / "qrels" / "test.tsv").open("a") as out:
            out.write("q0\tnowhere\t1\n")
    assert bothways.main(arguments) == 2
    capsys.readouterr()
    assert bothways.load("runs/letters").given == []


def test_a_scorer_of_pairs_is_one_that_gives_them_a_score():
    class Tuned(TaskPredictor):
        def __init__(self, kind, labels):
            self.run = type("R", (), {"home": "runs/x"})
            self.task = TaskInfo("x", kind, labels, 8, ("accuracy",))

    for kind, labels in (("regress", ()), ("classify", ("no", "yes"))):
        assert of.pair_scorer(Tuned(kind, labels))
    for kind, labels, says in (("tag", ("a", "b"), "fine-tuned for tag"), ("classify", ("a", "b", "c"), "3 labels")):
        with pytest.raises(InputError, match=says):
            of.pair_scorer(Tuned(kind, labels))


def test_prompts_are_those_of_each_side():
    from bothways.embedding import EmbeddingInfo

    class Prompted(ByLetters):
        def embed(self, texts, prompt=""):
            return super().embed([prompt + text for text in texts])

    model = Prompted()
    model.embedding = EmbeddingInfo(prompts={"query": "q: ", "passage": "p: "})
    for side, prompt in (("query", "query"), ("document", "passage")):
        wanted = super(Prompted, model).embed([prompt + "x"])
        np.testing.assert_allclose(of.embed_side(model, ["x"], side), wanted / np.linalg.norm(wanted))


@pytest.mark.parametrize(
    ("kind", "labels", "answers", "wanted"),
    [
        ("regress", (), [(2.5, None), (-1.0, None)], [2.5, -1]),
        ("classify", ("no", "yes"), [("no", 0.9), ("yes", 0.8)], [0.1, 0.8]),
        ("classify", ("Right", "wrong"), [("wrong", 0.9), ("Right", 0.8)], [0.1, 0.8]),
    ],
)
def test_the_score_of_a_pair_is_a_number_or_a_label_of_two(kind, labels, answers, wanted):
    scorer = object.__new__(of.TaskPredictor)
    scorer.task = type("T", (), {"kind": kind, "labels": labels})
    scorer.run = type("R", (), {"home": "runs/pairs"})
    given = []
    scorer._decide = lambda lines: [given.append(line) or (line, *a) for line, a in zip(lines, answers, strict=True)]
    assert scorer.pair_scores([("a\tb", "c"), ("d", "e")]) == pytest.approx(wanted)
    assert given == ["a b\tc", "d\te"]
    scorer.task.kind, scorer.task.labels = "classify", ("a", "b", "c")
    with pytest.raises(InputError, match="runs/pairs tells 3 labels apart"):
        scorer.pair_scores([("a", "b")])
    for labels in (("a", "b"), ("1", "yes")):
        scorer.task.labels = labels
        with pytest.raises(InputError, match="which of them says that the texts belong together is not known"):
            scorer.pair_scores([("a", "b")])
