"""What --topology names: TPUs by the names of Cloud TPU, any GPU, and a clear message for what is neither."""

import dataclasses
import json

import pytest

from bothways.config import MeshConfig
from bothways.configs import find
from bothways.errors import InputError
from bothways.launch.job import GPUs
from bothways.launch.start import prepare
from bothways.recipes import Recipe

GCP = {"bucket": "gs://some-bucket", "project": "some-project", "zone": "us-west4-a"}


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    found = find("gpt2_small")
    data = dataclasses.replace(found.data, corpus="gs://some-bucket/text")
    return dataclasses.replace(found, data=data, mesh=MeshConfig(data=-1, fsdp=8))


def test_gpus_are_nodes_times_gpus():
    assert GPUs.parse("H100:4x8") == GPUs("h100", 4, 8)
    assert GPUs.parse("A100-80GB:4x8") == GPUs("a100-80gb", 4, 8)
    assert GPUs.parse("h100:4x8").devices_count == 32


@pytest.mark.parametrize("kind", ["a100-80gb", "h100", "t4", "v100", "rtx4090", "l40s", "mi300x"])
def test_skypilot_is_asked_for_any_gpu(recipe, kind):
    task = json.loads(prepare(recipe, "sky", f"{kind}:1x8", **GCP)[1].files["task.yaml"])
    assert task["resources"]["accelerators"] == f"{kind.upper()}:8"


@pytest.mark.parametrize("topology", ["v5e:4x4", "tpu-v5e:4x4", "v5litepod:4x4", "v5litepod-16", "v4:2x2x4", "V4-32"])
def test_skypilot_is_asked_for_tpus_by_their_names(recipe, topology):
    task = json.loads(prepare(recipe, "sky", topology, **GCP)[1].files["task.yaml"])
    assert task["resources"]["accelerators"] in ("tpu-v5litepod-16", "tpu-v4-32")


@pytest.mark.parametrize(
    ("on", "topology", "said"),
    [
        ("tpu", "h100:2x8", "'h100' is no TPU; there are v4, v5e, v5p, v6e, 7x. GPUs: --on slurm or --on sky"),
        ("gke", "a100-80gb:2x8", "'a100' is no TPU; .* GPUs: --on slurm or --on sky"),
        ("tpu", "v5x:4x4", "'v5x' is no TPU; there are v4, v5e"),
        ("gke", "v5x:4x4x4", "'v5x' is no TPU; there are v4, v5e"),
        ("gke", "v5x-16", "'v5x' is no TPU; there are v4, v5e"),
        ("tpu", "cpu:8", "'cpu' is no TPU"),
        ("tpu", "", "'' is no TPU"),
        ("sky", "v5x-16", "TPUs are v4, v5e"),
        ("sky", "v5x:4x4x4", "TPUs are v4, v5e"),
        ("sky", "t4:8", "GPUs are given as KIND:NODESxGPUS, such as h100:4x8"),
        ("sky", "a100-80gb", "GPUs are given as KIND:NODESxGPUS, such as h100:4x8"),
        ("sky", "v5e:4x4x4", "v5e comes as 2x2, 2x4"),
        ("slurm", "v5e-16", "GPUs are given as KIND:NODESxGPUS"),
    ],
)
def test_what_is_neither_says_what_there_is(recipe, on, topology, said):
    with pytest.raises(InputError, match=said):
        prepare(recipe, on, topology, **GCP)
