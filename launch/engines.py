"""Launchers that exist, each as a pure function: a job -> files to write and commands to run. No scheduler of our own."""

import dataclasses
import json
import shlex
from collections.abc import Callable
from typing import Any

from bothways.chips import Topology
from bothways.errors import InputError
from bothways.launch.job import GPUs, Job, host_script

# Cloud TPU's images (docs.cloud.google.com/tpu/docs/runtimes).
RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5e": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}


@dataclasses.dataclass(frozen=True)
class Launch:
    """Files by name, and commands that run where they lie, in order. Shell words are quoted already."""

    files: dict[str, str]
    commands: tuple[str, ...]
    needs: tuple[str, ...]
    """Programs that the commands call."""
    stop: str
    """The command that ends it all."""


def _begin_anew(job: Job) -> str:
    """Takes away the marks of an earlier launch of this name, which would end this one at once."""
    marks = [f"{job.home}/{mark}" for mark in ("done", "failed")]
    return f"{shlex.join(['gcloud', 'storage', 'rm', '--quiet', *marks])} 2>/dev/null || true"


def _upload(job: Job, *names: str) -> str:
    copy = ["gcloud", "storage", "cp"]
    sent = shlex.join([*copy, job.code_name, "recipe.json", *names, f"{job.home}/"])
    return f"{shlex.join([*copy, '--recursive', 'text', f'{job.home}/'])} && {sent}" if job.text else sent


def _tpu(job: Job) -> Topology:
    if not isinstance(job.topology, Topology) or job.topology.chip_name == "cpu":
        raise InputError(f"--topology {job.topology.name} is no TPU; give one such as v5e-256, or --on slurm for GPUs")
    return job.topology


def cloud_tpu(job: Job) -> Launch:
    """A queued resource of Cloud TPU. Its startup script runs at each boot of each host.

    A preempted queued resource stays suspended for ever; `watch.sh` deletes it and asks anew until the run is done.
    """
    topology = _tpu(job)
    if topology.chip_name not in RUNTIMES:
        raise InputError(f"{topology.chip_name} is to be had through GKE only: --on gke")
    if not job.project or not job.zone:
        raise InputError("a queued resource wants --project and --zone, such as --project my-project --zone us-west4-a")
    where = ["--project", job.project, "--zone", job.zone]
    resource = ["gcloud", "compute", "tpus", "queued-resources"]
    create = [*resource, "create", job.name, *where]
    create += ["--accelerator-type", topology.accelerator_type, "--runtime-version", RUNTIMES[topology.chip_name]]
    create += ["--node-count", str(topology.slices), "--node-prefix", job.name] if topology.slices > 1 else []
    create += ["--node-id", job.name] if topology.slices == 1 else []
    create += ["--spot"] if job.spot else []
    create += ["--metadata-from-file", "startup-script=host.sh"]
    delete = [*resource, "delete", job.name, *where, "--force", "--quiet"]
    describe = [*resource, "describe", job.name, *where, "--format", "value(state.state)"]
    watch = "\n".join(
        [
            "#!/bin/bash",
            "# Asks for the slice, and asks again whenever it is taken away, until the run is done.",
            "set -u",
            'cd "$(dirname "$0")" || exit 1  # host.sh lies here',
            f"over() {{ gcloud storage ls {shlex.quote(job.home)}/$1 >/dev/null 2>&1; }}",
            "until over done || over failed; do",
            f"  state=$({shlex.join(describe)} 2>/dev/null)",
            '  case "$state" in',
            f'    "") {shlex.join(create)} ;;',
            f"    SUSPENDED|FAILED) {shlex.join(delete)} ;;",
            "  esac",
            '  echo "$(date -u +%FT%TZ) ${state:-asked for}"',
            "  sleep 60",
            "done",
            f"if {shlex.join(describe)} >/dev/null 2>&1; then {shlex.join(delete)}; fi",
            "",
        ]
    )
    files = {"host.sh": host_script(job, "tpu"), "watch.sh": watch}
    return Launch(files, (_begin_anew(job), _upload(job), "bash watch.sh"), ("gcloud",), shlex.join(delete))


def gke(job: Job) -> Launch:
    """A JobSet on a GKE cluster that has the JobSet controller and a node pool of the topology.

    Each slice is a Job, each host a Pod. A Pod that fails takes its JobSet down, which starts again as a whole, from
    the last checkpoint; exit codes 2 and 3, bad input and a loss that diverged, end it for good.
    """
    topology = _tpu(job)
    chip, shape = topology.chip, topology.name.split(":")[1]
    selector = {"cloud.google.com/gke-tpu-accelerator": chip.gke, "cloud.google.com/gke-tpu-topology": shape}
    if job.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    container = {
        "name": "bothways",
        "image": "google/cloud-sdk:slim",
        "command": ["bash", "-c", host_script(job, "tpu")],
        "ports": [{"containerPort": 8471}, {"containerPort": 8080}],
        "resources": {
            "limits": {"google.com/tpu": min(chip.host, topology.chips // topology.slices)},
            "requests": {"google.com/tpu": min(chip.host, topology.chips // topology.slices)},
        },
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 120,
        "nodeSelector": selector,
        "tolerations": [{"key": "google.com/tpu", "operator": "Exists", "effect": "NoSchedule"}],
        "containers": [container],
    }
    bad_input = {"action": "FailJob", "onExitCodes": {"containerName": "bothways", "operator": "In", "values": [2, 3]}}
    replicated = {
        "name": "slice",
        "replicas": topology.slices,
        "template": {
            "spec": {
                "parallelism": topology.hosts,
                "completions": topology.hosts,
                "completionMode": "Indexed",
                "backoffLimit": 0,
                "podFailurePolicy": {"rules": [bad_input]},
                "template": {"spec": pod},
            }
        },
    }
    manifest: dict[str, Any] = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": job.name,
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "network": {"enableDNSHostnames": True},
            "failurePolicy": {
                "maxRestarts": 100,
                "rules": [{"name": "badInput", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [replicated],
        },
    }
    files = {"jobset.json": json.dumps(manifest, indent=2) + "\n"}
    stop = shlex.join(["kubectl", "delete", "jobset", job.name])
    return Launch(files, (_begin_anew(job), _upload(job), "kubectl apply -f jobset.json"), ("gcloud", "kubectl"), stop)


def sky(job: Job) -> Launch:
    """A managed job of SkyPilot, which finds the machines and, when they are taken away, others."""
    resources: dict[str, Any]
    together = ""
    if isinstance(job.topology, GPUs):
        extra, nodes = "gpu", job.topology.nodes
        if nodes > 1:  # what JAX wants to know, in SkyPilot's words
            together = (
                'export JAX_COORDINATOR_ADDRESS="$(echo "$SKYPILOT_NODE_IPS" | head -n 1):8476"\n'
                "export JAX_NUM_PROCESSES=$SKYPILOT_NUM_NODES JAX_PROCESS_ID=$SKYPILOT_NODE_RANK\n"
            )
        resources = {"accelerators": f"{job.topology.kind.upper()}:{job.topology.per_node}"}
    else:
        topology = _tpu(job)
        if topology.chip_name not in RUNTIMES:
            raise InputError(f"{topology.chip_name} is to be had through GKE only: --on gke")
        if topology.slices > 1:
            raise InputError(f"SkyPilot starts one slice, not {topology.slices}; take --on tpu or --on gke")
        extra, nodes = "tpu", 1
        runtime = {"runtime_version": RUNTIMES[topology.chip_name]}
        resources = {"accelerators": f"tpu-{topology.accelerator_type}", "accelerator_args": runtime}
    resources |= {"infra": f"gcp/{'-'.join(job.zone.split('-')[:2])}/{job.zone}"} if job.zone else {"infra": "gcp"}
    task = {
        "name": job.name,
        "num_nodes": nodes,
        "resources": resources | {"use_spot": job.spot, "job_recovery": {"max_restarts_on_errors": 3}},
        "run": together + host_script(job, extra),
    }
    files = {"task.yaml": json.dumps(task, indent=2) + "\n"}  # JSON is YAML
    start = shlex.join(["sky", "jobs", "launch", "--yes", "--detach-run", "--name", job.name, "task.yaml"])
    stop = shlex.join(["sky", "jobs", "cancel", "--yes", "--name", job.name])
    return Launch(files, (_begin_anew(job), _upload(job), start), ("gcloud", "sky"), stop)


def slurm(job: Job) -> Launch:
    """A batch job of Slurm, one process per GPU; it puts itself back into the queue when its time is up."""
    if not isinstance(job.topology, GPUs):
        raise InputError(f"--on slurm starts GPUs, not {job.topology.name}: give --topology h100:4x8, 4 nodes of 8")
    gpus, q = job.topology, shlex.quote
    kind = "" if gpus.kind == "gpu" else f"{gpus.kind}:"
    head = [
        "#!/bin/bash",
        f"#SBATCH --job-name={job.name}",
        f"#SBATCH --nodes={gpus.nodes}",
        f"#SBATCH --ntasks-per-node={gpus.per_node}",
        f"#SBATCH --gpus-per-node={kind}{gpus.per_node}",
        *([f"#SBATCH --partition={job.partition}"] if job.partition else []),
        f"#SBATCH --time={job.hours}:00:00",
        "#SBATCH --signal=TERM@180  # three minutes before the time is up: save, end with 143",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        "#SBATCH --output=%x-%j.log",
    ]
    home = q(job.home)
    body = [
        f"srun --kill-on-bad-exit=1 bash {home}/host.sh",
        "code=$?",
        f"if [ ! -e {home}/done ] && [ ! -e {home}/failed ]; then",
        '  scontrol requeue "$SLURM_JOB_ID"  # preempted, out of time, or a node was lost: on from the last checkpoint',
        "fi",
        "exit $code",
    ]
    files = {"host.sh": host_script(job, "gpu", fetch=False), "batch.sh": "\n".join([*head, "", *body, ""])}
    commands = (
        shlex.join(["mkdir", "-p", job.home]),
        shlex.join(["rm", "-f", f"{job.home}/done", f"{job.home}/failed"]),
        shlex.join(["cp", job.code_name, "recipe.json", "host.sh", "batch.sh", job.home]),
        f"ONLY_ENVIRONMENT=1 bash {home}/host.sh",
        shlex.join(["sbatch", f"--chdir={job.home}", f"{job.home}/batch.sh"]),
    )
    return Launch(files, commands, ("sbatch",), shlex.join(["scancel", "--name", job.name]))


ENGINES: dict[str, Callable[[Job], Launch]] = {"tpu": cloud_tpu, "gke": gke, "sky": sky, "slurm": slurm}
