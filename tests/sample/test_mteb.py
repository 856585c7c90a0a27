"""A run as a model of mteb, on tasks made here: the real library, nothing downloaded."""

import json
import logging

import numpy as np
import pytest

mteb = pytest.importorskip("mteb", reason="mteb is not installed: the adapter was not run")
datasets = pytest.importorskip("datasets", reason="datasets is not installed")

from bothways.embedding import EmbeddingInfo  # noqa: E402
from bothways.sample.mteb_backend import BothwaysEncoder, measured  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
WORDS = "king queen fool storm ship crown dog sea".split()


class Letters:
    """Counts letters, and remembers what was put before the texts."""

    embedding = EmbeddingInfo(prompts={"query": "Q", "document": "D"})

    def __init__(self, tmp_path):
        self.run, self.prompts = type("R", (), {"home": tmp_path / "letters", "step": 3}), set()

    def embed(self, texts, prompt=""):
        self.prompts.add(prompt)
        return np.array([[text.count(c) for c in "abcdefghijklmnopqrstuvwxyz"] for text in texts], np.float32)


def metadata(kind, main_score):
    return mteb.TaskMetadata(
        name="Made" + kind,
        description="made up",
        reference=None,
        dataset={"path": "made/up", "revision": "1"},
        type=kind,
        category="t2t",
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score=main_score,
    )


class MadeSTS(mteb.abstasks.AbsTaskSTS):
    metadata = metadata("STS", "cosine_spearman")
    min_score, max_score = 0, 1

    def load_data(self, **_):
        pairs = [(word, word[:i] or word[0], i / len(word)) for word in WORDS for i in (0, 2, len(word))]
        names = ("sentence1", "sentence2", "score")
        columns = dict(zip(names, map(list, zip(*pairs, strict=True)), strict=True))
        self.dataset, self.data_loaded = {"test": datasets.Dataset.from_dict(columns)}, True


class MadeRetrieval(mteb.abstasks.AbsTaskRetrieval):
    metadata = metadata("Retrieval", "ndcg_at_10")

    def load_data(self, **_):
        corpus = [{"id": f"d{i}", "title": "", "text": word} for i, word in enumerate(WORDS)]
        queries = [{"id": f"q{i}", "text": "".join(sorted(word))} for i, word in enumerate(WORDS)]
        right = {f"q{i}": {f"d{i}": 1} for i in range(len(WORDS))}
        split = mteb.abstasks.retrieval_dataset_loaders.RetrievalSplitData(
            corpus=datasets.Dataset.from_list(corpus),
            queries=datasets.Dataset.from_list(queries),
            relevant_docs=right,
            top_ranked=None,
        )
        self.dataset, self.data_loaded = {"default": {"test": split}}, True


@pytest.mark.parametrize(("task", "used"), [(MadeSTS, {""}), (MadeRetrieval, {"query", "document"})])
def test_scores_of_made_up_tasks(task, used, tmp_path):
    logging.getLogger("mteb").setLevel(logging.ERROR)
    model = Letters(tmp_path)
    (figure,) = measured(model, task())
    assert figure.suite == f"mteb:{task.metadata.name}/test"
    assert figure.metric == task.metadata.main_score
    assert figure.value == pytest.approx(1.0) if task is MadeRetrieval else 0.5 < figure.value <= 1
    assert model.prompts == used


def test_it_is_an_encoder_to_mteb(tmp_path):
    encoder = BothwaysEncoder(Letters(tmp_path))
    assert isinstance(encoder, mteb.models.EncoderProtocol)
    assert encoder.mteb_model_meta.name == "bothways/letters"
    rows = np.array([[3.0, 4.0], [0.0, 2.0]])
    np.testing.assert_allclose(encoder.similarity(rows, rows), [[1, 0.8], [0.8, 1]])
    np.testing.assert_allclose(encoder.similarity_pairwise(rows, rows), [1, 1])
    assert json.dumps(encoder.similarity(rows[0], rows[1]).tolist()) == "[[0.8]]"
