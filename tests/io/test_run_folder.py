"""A run's folder on a disk, and in a bucket: here one in memory, which epath takes for gs://."""

from __future__ import annotations

import json

import fsspec
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from sapo_jax.errors import FolderError
from sapo_jax.io.files import read_rows
from sapo_jax.io.run_folder import as_path, open_folder
from sapo_jax.io.run_log import open_log


class Bucket(MemoryFileSystem):
    protocol = ("gs", "gcs")
    store: dict = {}
    pseudo_dirs = [""]

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(
            str(path).removeprefix("gs://").removeprefix("/gs/")
        )


@pytest.fixture
def bucket(monkeypatch) -> epath.Path:
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    monkeypatch.setattr(Bucket, "store", {})
    monkeypatch.setattr(Bucket, "pseudo_dirs", [""])
    return as_path("gs://bucket/runs/a")


def rows(path: epath.Path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_paths():
    assert str(as_path("gs://bucket/runs/a") / "tb") == "gs://bucket/runs/a/tb"
    assert as_path("runs/a").parent.name == "runs"


def test_a_run_in_a_bucket_is_found_again(bucket):
    """Logs reach the bucket when published, and the next job goes on from there; so do TensorBoard's files."""
    for first in (0, 2):
        with open_folder(bucket) as folder, open_log(folder, ["tensorboard"]) as log:
            assert [row["step"] for row in log.rows("rl")] == list(range(first))
            log.write("rl", first, {"loss": 0.1})
            folder.publish()
            assert [row["step"] for row in rows(bucket)] == [*range(first + 1)]
            log.write("rl", first + 1, {"loss": 0.2})  # not for long: it waits for the next upload
            assert len(rows(bucket)) == first + 1
        assert len(rows(bucket)) == first + 2  # the end uploads all
        assert not folder.logs.exists()
    assert len(list((bucket / "tb" / "rl").iterdir())) == 1  # it holds the rows of both


def test_uploads_take_what_changed_alone(bucket, monkeypatch):
    with open_folder(bucket) as folder:
        (folder.logs / "config.yaml").write_text("a: 1")
        folder.publish()
        (bucket / "config.yaml").write_text("untouched")
        (folder.logs / "samples.jsonl").write_text("{}\n")
        folder.publish()
        assert (bucket / "config.yaml").read_text() == "untouched"
        assert (bucket / "samples.jsonl").read_text() == "{}\n"


def test_the_job_that_opened_a_bucket_last_owns_it(bucket):
    with (
        pytest.raises(FolderError, match="another job has opened gs://bucket/runs/a"),
        open_folder(bucket) as old,
    ):
        with open_folder(bucket) as new:
            (old.logs / "metrics.jsonl").write_text("old\n")
            with pytest.raises(FolderError, match="another job"):
                old.publish()
            (new.logs / "metrics.jsonl").write_text('{"stage": "rl", "step": 0}\n')
        assert [row["step"] for row in rows(bucket)] == [0]
    assert not old.logs.exists()


def test_a_reader_claims_nothing(bucket):
    with open_folder(bucket) as owner, open_folder(bucket, write=False) as reader:
        (reader.logs / "evaluations.jsonl").write_text("{}\n")
        reader.publish()
        (owner.logs / "summary.json").write_text("{}")
        owner.publish()
    assert {file.name for file in bucket.iterdir()} == {
        "claim",
        "evaluations.jsonl",
        "summary.json",
    }


def test_a_folder_on_a_disk_is_locked_and_is_its_own_log(tmp_path):
    with open_folder(tmp_path / "run") as folder:
        assert folder.logs == folder.path == tmp_path / "run"
        with (
            pytest.raises(FolderError, match="another process is working in"),
            open_folder(tmp_path / "run"),
        ):
            pass
        with open_log(folder, ["tensorboard"]) as log:
            log.write("rl", 0, {"loss": 0.5})
        folder.publish()
        assert read_rows(tmp_path / "run" / "metrics.jsonl")[0]["loss"] == 0.5
    with open_folder(tmp_path / "run"):
        pass
