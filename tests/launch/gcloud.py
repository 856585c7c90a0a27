"""A stand-in for `gcloud`: its storage is the one at STORAGE_EMULATOR_HOST, its slices are processes of this machine.

A slice has a folder in $CLOUD: the state of its queued resource, and for each host a disk, which is the HOME of a process
that runs the startup script. Hosts have nothing in common but the network.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import quote

HOSTS = {"v5litepod-8": (2, 1), "v5litepod-16": (1, 16)}
"""How many hosts a slice has here, and how many devices each."""


def ask(method: str, path: str, body: bytes | None = None, kind: str = "application/octet-stream") -> bytes:
    url = os.environ["STORAGE_EMULATOR_HOST"] + path
    with urllib.request.urlopen(urllib.request.Request(url, body, {"Content-Type": kind}, method=method)) as reply:
        return reply.read()


def at(url: str) -> str:
    """The address of an object, or of a bucket."""
    bucket, _, name = url.removeprefix("gs://").partition("/")
    return f"/storage/v1/b/{bucket}" + (f"/o/{quote(name, '')}" if name else "")


def put(file: Path, url: str) -> None:
    bucket, _, name = url.removeprefix("gs://").partition("/")
    ask("POST", f"/upload/storage/v1/b/{bucket}/o?uploadType=media&name={quote(name, '')}", file.read_bytes())


def copy(sources: list[str], target: str, recursive: bool) -> None:
    for source in sources:
        path = Path(source)
        if source.startswith("gs://"):
            into = Path(target)
            (into / source.rpartition("/")[2] if into.is_dir() else into).write_bytes(
                ask("GET", f"{at(source)}?alt=media")
            )
        elif path.is_dir():
            assert recursive, f"{source} is a directory"
            for file in sorted(p for p in path.rglob("*") if p.is_file()):
                put(file, f"{target}{file.relative_to(path.parent)}")
        else:
            put(path, f"{target}{path.name}" if target.endswith("/") else target)


def storage(verb: str, names: list[str], flags: dict[str, str]) -> None:
    if verb == "buckets":
        ask("POST", "/storage/v1/b", b'{"name": "%s"}' % names[1].removeprefix("gs://").encode(), "application/json")
    elif verb == "cp":
        copy(names[:-1], names[-1], "recursive" in flags)
    elif verb == "cat":
        for name in names:
            sys.stdout.buffer.write(ask("GET", f"{at(name)}?alt=media"))
    elif verb in ("ls", "rm"):
        for name in names:
            ask("GET" if verb == "ls" else "DELETE", at(name))
    else:
        raise SystemExit(f"gcloud storage {verb}?")


def create(slice_: Path, flags: dict[str, str]) -> None:
    """Boots the hosts of a slice."""
    count, devices = HOSTS[flags["accelerator-type"]]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    script = Path(flags["metadata-from-file"].removeprefix("startup-script=")).read_text()
    slice_.mkdir(parents=True)
    pids = []
    for index in range(count):
        disk = slice_ / f"host-{index}"
        disk.mkdir()
        own = {"HOME": str(disk), "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        own |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(count)}
        own |= {"JAX_PROCESS_ID": str(index)}
        with Path(os.environ["CLOUD"], f"{slice_.name}-{index}.log").open("ab") as log:
            host = subprocess.Popen(
                ["bash", "-c", script], env=os.environ | own, cwd=disk, stdout=log, stderr=log, start_new_session=True
            )
        pids.append(host.pid)
    (slice_ / "pids").write_text("\n".join(map(str, pids)))
    (slice_ / "state").write_text("ACTIVE\n")


def halt(slice_: Path) -> None:
    """The machines are gone, and what was on their disks."""
    for pid in (slice_ / "pids").read_text().split():
        try:
            os.killpg(int(pid), signal.SIGKILL)
        except ProcessLookupError:
            pass
    for disk in slice_.glob("host-*"):
        shutil.rmtree(disk, ignore_errors=True)


def preempt(slice_: Path) -> None:
    halt(slice_)
    (slice_ / "state").write_text("SUSPENDED\n")


def slices(verb: str, name: str, flags: dict[str, str]) -> None:
    slice_ = Path(os.environ["CLOUD"], name)
    if verb == "create":
        create(slice_, flags)
    elif not (slice_ / "state").exists():
        raise SystemExit(f"NOT_FOUND: {name}")
    elif verb == "describe":
        print((slice_ / "state").read_text(), end="")
    elif verb == "delete":
        halt(slice_)
        shutil.rmtree(slice_)
    else:
        raise SystemExit(f"gcloud compute tpus queued-resources {verb}?")


def main(words: list[str]) -> None:
    names, flags = [], {}
    rest = iter(words)
    for word in rest:
        if not word.startswith("--"):
            names.append(word)
        elif word in ("--quiet", "--recursive", "--spot", "--force"):
            flags[word[2:]] = ""
        else:
            flags[word[2:]] = next(rest)
    if names[0] in ("auth", "config", "services"):
        return
    if names[0] == "storage":
        storage(names[1], names[2:], flags)
    elif names[:3] == ["compute", "tpus", "queued-resources"]:
        slices(names[3], names[4], flags)
    elif names[:4] == ["compute", "tpus", "tpu-vm", "ssh"]:
        print(Path(os.environ["CLOUD"], f"{names[4]}-{flags['worker']}.log").read_text(), end="")
    else:
        raise SystemExit(f"gcloud {' '.join(names)}?")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except urllib.error.HTTPError as e:
        sys.exit(f"ERROR: {e} at {e.url}")
