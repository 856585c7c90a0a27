"""A cloud on this machine: an object store, and slices whose hosts are processes with a disk each."""

import dataclasses
import os
import sys
from pathlib import Path

import pytest

from bothways.platform import without_grpc

UV = """#!/bin/bash
set -e
for word in "$@"; do case $word in
  *file://*) tar -tzf "${word#*file://}" bothways/pyproject.toml bothways/launch/job.py >/dev/null ;;
  env-*/bin/python) environment=$(dirname "$(dirname "$word")") ;;
esac; done
[ "$1" = pip ] || exit 0
mkdir -p "$environment/bin"
printf '#!/bin/bash\\nexec ${BOTHWAYS:-PYTHON -m bothways} "$@"\\n' > "$environment/bin/bothways"
chmod +x "$environment/bin/bothways"
"""
"""An environment that is this one; what should be installed must be there. $BOTHWAYS may stand for its program."""


@dataclasses.dataclass(frozen=True)
class Cloud:
    store: "emulator.Objects"  # noqa: F821
    home: Path
    """The HOME of whoever launches; the slices' folders are in it."""


@pytest.fixture(scope="session")
def machines(tmp_path_factory):
    """What all tests of a process share, since clients keep the address of the store that they found first."""
    pytest.importorskip("gcp_storage_emulator", reason="no object store to rehearse with")
    without_grpc()  # before gcsfs is imported
    gcsfs = pytest.importorskip("gcsfs", reason="gs:// needs gcsfs")
    from tests.launch import emulator, gcloud

    home, tools = tmp_path_factory.mktemp("cloud"), tmp_path_factory.mktemp("tools")
    for name, text in {
        "gcloud": f'#!/bin/bash\nexec PYTHON -I -S {Path(gcloud.__file__)} "$@"\n',
        "uv": UV,
        "sleep": "#!/bin/bash\nexec /bin/sleep 0.2\n",
    }.items():
        (tools / name).write_text(text.replace("PYTHON", sys.executable))
        (tools / name).chmod(0o755)
    gcsfs.GCSFileSystem.clear_instance_cache()
    with emulator.store("some-bucket") as (store, variables):
        yield (
            Cloud(store, home),
            variables | {"CLOUD": str(home), "PATH": f"{tools}:{os.environ['PATH']}", "HOME": str(home)},
        )
    gcsfs.GCSFileSystem.clear_instance_cache()


@pytest.fixture(scope="module")
def cloud(machines):
    """The cloud, which everything that runs here or is started here finds."""
    from tests.launch import gcloud

    found, variables = machines
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        patch.chdir(found.home)
        yield found
        for slice_ in found.home.glob("*/pids"):
            gcloud.halt(slice_.parent)
