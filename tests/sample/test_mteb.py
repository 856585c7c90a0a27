"""A run as a model of mteb, on tasks made here: the real library, nothing downloaded."""

import json
import logging

import numpy as np
import pytest

from bothways.embedding import EmbeddingInfo

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", autouse=True)
def mteb():
    """Imported when it is needed: each worker collects this file, and one runs it."""
    pytest.importorskip("datasets", reason="datasets is not installed")
    return pytest.importorskip("mteb", reason="mteb is not installed: the adapter was not run")


class Letters:
    """Counts letters, and remembers what was put before the texts."""

    embedding = EmbeddingInfo(prompts={"query": "Q", "document": "D"})

    def __init__(self, tmp_path):
        self.run, self.prompts = type("R", (), {"home": tmp_path / "letters", "step": 3}), set()

    def embed(self, texts, prompt=""):
        self.prompts.add(prompt)
        return np.array([[text.count(c) for c in "abcdefghijklmnopqrstuvwxyz"] for text in texts], np.float32)


@pytest.mark.parametrize(("task", "used"), [("MadeSTS", {""}), ("MadeRetrieval", {"query", "document"})])
def test_scores_of_made_up_tasks(task, used, tmp_path):
    from bothways.sample.mteb_backend import measured
    from tests.sample import mteb_tasks

    made = getattr(mteb_tasks, task)
    logging.getLogger("mteb").setLevel(logging.ERROR)
    model = Letters(tmp_path)
    (figure,) = measured(model, made())
    assert figure.suite == f"mteb:{made.metadata.name}/test"
    assert figure.metric == made.metadata.main_score
    assert figure.value == pytest.approx(1.0) if task == "MadeRetrieval" else 0.5 < figure.value <= 1
    assert model.prompts == used


def test_it_is_an_encoder_to_mteb(mteb, tmp_path):
    from bothways.sample.mteb_backend import BothwaysEncoder

    encoder = BothwaysEncoder(Letters(tmp_path))
    assert isinstance(encoder, mteb.models.EncoderProtocol)
    assert encoder.mteb_model_meta.name == "bothways/letters"
    rows = np.array([[3.0, 4.0], [0.0, 2.0]])
    np.testing.assert_allclose(encoder.similarity(rows, rows), [[1, 0.8], [0.8, 1]])
    np.testing.assert_allclose(encoder.similarity_pairwise(rows, rows), [1, 1])
    assert json.dumps(encoder.similarity(rows[0], rows[1]).tolist()) == "[[0.8]]"
