"""Small files of a run: never half, and an error that names the one that cannot be read."""

import errno
import json
from pathlib import Path

import pytest

from bothways import rundir
from bothways.errors import InputError
from bothways.files import read_json, write_whole
from bothways.train.report import Reporter
from tests.conftest import plotting


@pytest.fixture
def full_disk(monkeypatch):
    """A disk that takes half of each file."""
    write = Path.write_bytes

    def half(self, data):
        write(self, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", half)


def test_a_file_is_there_as_it_was_where_the_disk_is_full(tmp_path, request):
    path = tmp_path / "task.json"
    write_whole(path, "before")
    request.getfixturevalue("full_disk")
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "what comes after")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_written_is_read_in_any_locale(tmp_path, monkeypatch):
    """Text is UTF-8, whatever Python takes for the system's encoding."""
    write = Path.write_text
    monkeypatch.setattr(
        Path, "write_text", lambda self, text, encoding="latin-1", **more: write(self, text, encoding, **more)
    )
    write_whole(tmp_path / "x.json", '{"name": "\u00e9"}')
    assert read_json(tmp_path / "x.json") == {"name": "\u00e9"}


def test_the_curves_so_far_stay_where_the_disk_is_full(tmp_path, request):
    lines = "".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (1, 2, 3))
    (tmp_path / "metrics.jsonl").write_text(lines)
    request.getfixturevalue("full_disk")
    with pytest.raises(OSError, match="No space left"):
        Reporter(tmp_path, 5, 2, True, "none")
    assert (tmp_path / "metrics.jsonl").read_text() == lines


def test_a_loss_that_is_not_finite_is_null_among_the_metrics(tmp_path):
    reporter = Reporter(tmp_path, 3, 0, True, "none")
    reporter.log(1, {"loss": float("nan"), "grad_norm": float("inf")}, "")
    reporter.log(2, {"loss": 1.5}, "")
    reporter.close()
    with plotting():
        reporter.plot()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines == ['{"step": 1, "loss": null, "grad_norm": null}', '{"step": 2, "loss": 1.5}']
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"null"])
def test_a_file_that_is_no_json_object_is_named(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.json .*put back a copy"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("name", "content", "read"),
    [
        ("recipe.json", "{", rundir.read_recipe),
        ("recipe.json", '{"family": "gtp"}', rundir.read_recipe),
        ("recipe.json", '{"model": {"norm": "batch"}}', rundir.read_recipe),
        ("recipe.json", '{"optimizer": {"learning_rate": NaN}}', rundir.read_recipe),
        ("task.json", '{"name": "x"}', rundir.read_task),
        (
            "task.json",
            '{"name": "x", "kind": "tag", "labels": [], "length": 1, "metrics": [], "later": 1}',
            rundir.read_task,
        ),
        ("task.json", '{"name": "x", "kind": "tag", "labels": null, "length": 1, "metrics": []}', rundir.read_task),
        ("corpus.json", "", lambda home: rundir.trained_on(home, "x")),
        ("adapters.json", "{}", rundir.base_of),
    ],
)
def test_a_damaged_file_of_a_run_is_named(tmp_path, name, content, read):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        read(tmp_path)


def test_an_empty_name_is_no_directory():
    """As --workdir "$DIR" gives where DIR is not set; the current one would get the run."""
    for named in (rundir.directory, rundir.on_disk):
        with pytest.raises(InputError, match="is empty"):
            named("")
