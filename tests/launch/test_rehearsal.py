"""A dress rehearsal: `launch` as a user calls it, a slice of two hosts with a disk each, an object store, a preemption.

All scripts run as they were written. Stand-ins on PATH (tests/launch/conftest.py) are `gcloud`, `uv`, which makes an
environment that is this one, and `sleep`, which sleeps for a fraction of a second.
"""

import dataclasses
import json
import threading
import time

import pytest

from bothways.config import MeshConfig, OptimizerConfig, TrainConfig
from bothways.data.config import DataConfig
from bothways.launch import start as launching
from bothways.model.config import TransformerConfig
from bothways.recipes import Recipe
from bothways.train.loop import train

pytest.importorskip("gcp_storage_emulator", reason="no object store to rehearse with")
from tests import forks
from tests.conftest import HANGS
from tests.launch import gcloud

STEPS, SAVE, BEGUN = 8, 2, 2
RECIPE = Recipe(
    name="rehearsal",
    model=TransformerConfig(context_length=16, n_layers=1, d_model=16, n_heads=2),
    data=DataConfig(corpus="text.jsonl", tokenizer="bpe", vocab_size=307),
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2),
    train=TrainConfig(
        batch_size=8, steps=STEPS, save_every=SAVE, eval_every=4, eval_rows=8, log_every=1, max_to_keep=STEPS
    ),
    mesh=MeshConfig(data=-1, fsdp=2),
)


def lines(count: int) -> str:
    """Documents of made-up words, of many lengths."""
    texts = (" ".join(f"word{(i * i * k) % 53}" for k in range(3, 4 + i % 37)) for i in range(count))
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


class Launched:
    """`bothways launch`, which stays until the run is done, in a thread. What TensorBoard shows, the run here writes."""

    def __init__(self, name: str, cloud):
        where = {"bucket": f"gs://{cloud.store.bucket}", "project": "p", "zone": "z", "spot": True}
        recipe = dataclasses.replace(RECIPE, train=dataclasses.replace(RECIPE.train, tracker="none"))
        self.job, launch = launching.prepare(recipe, "tpu", "v5e-8", name=name, **where)
        self.name, self.home = name, cloud.home
        self.thread = threading.Thread(target=self.run, args=(launch,), daemon=True)
        self.thread.start()

    def run(self, launch: launching.Launch) -> None:
        launching.start("tpu", self.job, launch, self.home / "launches" / self.name, dry_run=False)

    def logs(self) -> str:
        return "".join(path.read_text()[-3000:] for path in sorted(self.home.glob(f"{self.name}-?.log")))

    def ends(self) -> None:
        self.thread.join(HANGS)
        assert not self.thread.is_alive(), self.logs()


def losses(store, name: str, kind: str) -> dict[int, float]:
    found = [json.loads(line) for line in store.read(f"{name}/run/metrics.jsonl").splitlines()]
    return {line["step"]: line[kind] for line in found if kind in line}


@pytest.fixture
def started_quickly(cloud, monkeypatch):
    """Hosts import nothing; tests/launch/test_readme.py has one that does."""
    without_grpc = {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
    with forks.server("gcsfs", **without_grpc) as bothways:
        monkeypatch.setenv("BOTHWAYS", " ".join(bothways))
        yield


@pytest.mark.usefixtures("started_quickly")
def test_a_slice_that_is_taken_away_ends_as_one_that_was_left_alone(cloud):
    """A run begins here, on eight devices and text in a file; two slices go on with it from there, on the same text prepared
    on the bucket; one of them is taken away, with its disks, and comes back."""
    store, home = cloud.store, cloud.home
    (home / "text.jsonl").write_text(lines(300))
    train(RECIPE, f"gs://{store.bucket}/here/run")
    begun = [name for name in store.names("here/run/") if "/checkpoints/" not in name or f"/{BEGUN}/" in name]
    for name in ("alone", "killed"):
        for path in begun:
            store.copy(path, path.replace("here/", f"{name}/", 1))
    alone, killed = Launched("alone", cloud), Launched("killed", cloud)
    assert killed.job.recipe.data.corpus == f"gs://{store.bucket}/killed/text"
    while not store.names(f"killed/run/checkpoints/{BEGUN + SAVE}/commit_success"):
        assert killed.thread.is_alive(), killed.logs()
        time.sleep(0.05)
    gcloud.preempt(home / "killed")
    assert "killed/done" not in store
    for run in (alone, killed):
        run.ends()
        assert f"{run.name}/done" in store, run.logs()
        assert f"resumed at step {BEGUN}\n" in run.logs()
        assert "counts the documents" not in run.logs()  # nothing is prepared there
        written = [path for method, path in store.requests if method == "POST" and f"name={run.name}/text/" in path]
        assert len(written) == len(store.names(f"{run.name}/text/")) >= 3
    assert f"resumed at step {BEGUN + SAVE}" in killed.logs()
    for kind, steps in (("loss", range(1, STEPS + 1)), ("eval_loss", (4, 8))):
        here, whole, again = (losses(store, name, kind) for name in ("here", "alone", "killed"))
        assert list(here) == list(steps)
        assert whole == again
        assert whole == pytest.approx(here, rel=1e-3)  # other sums on other devices, of the same rows
