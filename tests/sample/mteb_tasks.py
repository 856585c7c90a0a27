"""Tasks of mteb that are made here. Importing it imports mteb, which takes seconds."""

import datasets
import mteb

WORDS = "king queen fool storm ship crown dog sea".split()


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
