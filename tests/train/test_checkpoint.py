"""A checkpoint is whole or is never chosen: sealed last, verified by hash, on any filesystem that pyarrow opens."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs as pafs

from dtrpo_ray.errors import CheckpointError
from dtrpo_ray.train import checkpoint
from dtrpo_ray.train.checkpoint import (
    COMPLETE,
    CheckpointFacts,
    Place,
    facts_of,
    folder_name,
    open_storage,
    places,
    verify,
)

LOCAL = pafs.LocalFileSystem()


def facts(step: int, **metrics: float) -> CheckpointFacts:
    return {
        "step": step,
        "num_workers": 2,
        "zero_stage": 2,
        "precision": "fp32",
        "label": "train-1",
        "base": "base",
        "identity": {"base": "b", "table": "t"},
        "config": {},
        "seed": 0,
        "plan": {"digest": "a plan", "consumed": [step]},
        "metrics": metrics,
    }


def rank_folder(tmp_path: Path, rank: int) -> Path:
    folder = tmp_path / f"scratch-{rank}"
    (folder / "deepspeed").mkdir(parents=True, exist_ok=True)
    (folder / "deepspeed" / f"optim-{rank}.pt").write_bytes(bytes([rank]) * 5_000_000)
    return folder


def write(tmp_path: Path, root: str, step: int, attempt: int = 0, ranks: int = 2, filesystem: Any = LOCAL) -> str:
    path = f"{root}/{folder_name(step, attempt)}"
    for rank in range(ranks):
        checkpoint.write(rank_folder(tmp_path, rank), filesystem, path, rank, facts(step))
    return path


def newest_whole(filesystem: Any, root: str, warn: Callable[[str], None]) -> tuple[Place, dict[str, Any]] | None:
    """As `recovery.choose` on one rank."""
    for place in places(filesystem, root):
        try:
            return place, verify(filesystem, place)
        except CheckpointError as error:
            warn(f"skipped checkpoint {error}")
    return None


def test_what_was_written_verifies_and_the_newest_is_found(tmp_path: Path) -> None:
    root = str(tmp_path / "run")
    for step, attempt in ((4, 0), (8, 0), (8, 2)):
        write(tmp_path, root, step, attempt)
    assert [(p.step, p.attempt, Path(p.path).name) for p in places(LOCAL, root)] == [
        (8, 2, "step-00000008-2"), (8, 0, "step-00000008"), (4, 0, "step-00000004"),
    ]  # fmt: skip
    found = newest_whole(LOCAL, root, pytest.fail)
    assert found is not None
    assert (found[0].attempt, found[1]["step"], found[1]["zero_stage"]) == (2, 8, 2)
    assert newest_whole(LOCAL, str(tmp_path / "nothing"), pytest.fail) is None


def test_complete_is_written_by_the_last_rank_and_not_before(tmp_path: Path) -> None:
    path = write(tmp_path, str(tmp_path / "run"), 4, ranks=1)
    with pytest.raises(CheckpointError, match=f"no {COMPLETE}: it was never finished"):
        facts_of(LOCAL, Place(4, 0, path))
    checkpoint.write(rank_folder(tmp_path, 1), LOCAL, path, 1, {"step": 4, "num_workers": 2})
    assert facts_of(LOCAL, Place(4, 0, path))["ranks"].keys() == {"rank-0.json", "rank-1.json"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("flip", "optim-1.pt has changed"),
        ("cut", "optim-1.pt has 10 bytes, 5000000 were written"),
        ("remove", "optim-1.pt has None bytes"),
        ("list", "rank-1.json is not the list"),
        ("no list", "rank-1.json is missing"),
        ("half seal", "COMPLETE is damaged"),
        ("bare seal", "COMPLETE is damaged (lacks plan)"),
        ("no seal", "no COMPLETE: it was never finished"),
        ("future", "schema 99"),
    ],
)
def test_a_damaged_newest_one_is_skipped_with_a_warning(tmp_path: Path, damage: str, message: str) -> None:
    root = str(tmp_path / "run")
    write(tmp_path, root, 4)
    newest = Path(write(tmp_path, root, 8))
    file, listing, seal = newest / "deepspeed" / "optim-1.pt", newest / "rank-1.json", newest / COMPLETE
    match damage:
        case "flip":
            content = bytearray(file.read_bytes())
            content[4_999_999] ^= 1
            file.write_bytes(content)
        case "cut":
            file.write_bytes(b"x" * 10)
        case "remove":
            file.unlink()
        case "list":
            listing.write_text(listing.read_text() + " ")
        case "no list":
            listing.unlink()
        case "half seal":
            seal.write_text(seal.read_text()[:20])
        case "bare seal":
            seal.write_text(json.dumps({k: v for k, v in json.loads(seal.read_text()).items() if k != "plan"}))
        case "no seal":
            seal.unlink()
        case "future":
            seal.write_text(json.dumps(json.loads(seal.read_text()) | {"schema": 99}))
    said: list[str] = []
    found = newest_whole(LOCAL, root, said.append)
    assert found is not None
    assert found[0].step == 4
    assert len(said) == 1
    assert message in said[0]


def test_ranks_share_the_work_of_verifying(tmp_path: Path) -> None:
    path = Path(write(tmp_path, str(tmp_path / "run"), 4))
    (path / "deepspeed" / "optim-1.pt").write_bytes(b"\x02" * 5_000_000)
    place = Place(4, 0, str(path))
    verify(LOCAL, place, 0, 2)
    with pytest.raises(CheckpointError, match=r"optim-1\.pt has changed"):
        verify(LOCAL, place, 1, 2)


def test_a_filesystem_that_is_not_local_holds_checkpoints_too(tmp_path: Path) -> None:
    """pyarrow's in-memory filesystem stands for an object store: no rename, no local path."""
    remote = pafs._MockFileSystem()
    write(tmp_path, "bucket/run", 4, filesystem=remote)
    found = newest_whole(remote, "bucket/run", pytest.fail)
    assert found is not None
    checkpoint.download(remote, found[0].path, tmp_path / "back")
    assert (tmp_path / "back" / "deepspeed" / "optim-1.pt").read_bytes() == b"\x01" * 5_000_000
    checkpoint.remove(remote, found[0])
    assert places(remote, "bucket/run") == []


def test_a_write_error_is_tried_again_and_then_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(checkpoint.time, "sleep", pauses.append)
    real, failures = checkpoint._copy, [OSError(28, "No space left on device")] * 2

    def flaky(*args: Any) -> None:
        if failures:
            raise failures.pop()
        real(*args)

    monkeypatch.setattr(checkpoint, "_copy", flaky)
    verify(LOCAL, Place(4, 0, write(tmp_path, str(tmp_path / "run"), 4)))
    assert pauses == [1, 2]
    failures += [OSError(28, "No space left on device")] * 9
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, str(tmp_path / "run"), 8)
    found = newest_whole(LOCAL, str(tmp_path / "run"), lambda text: None)
    assert found is not None
    assert found[0].step == 4


def test_storage_is_a_path_or_a_uri(tmp_path: Path) -> None:
    assert open_storage(str(tmp_path)) == (LOCAL, str(tmp_path))
    assert open_storage(f"file://{tmp_path}")[1] == str(tmp_path)
    with pytest.raises(CheckpointError, match="nonsense"):
        open_storage("nonsense://bucket")


def test_retention_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    root = str(tmp_path / "run")
    for step, loss in ((2, 0.5), (4, 0.2), (6, 0.4), (8, 0.3)):
        path = write(tmp_path, root, step)
        seal = Path(path) / COMPLETE
        seal.write_text(json.dumps(json.loads(seal.read_text()) | {"metrics": {"loss": loss, "margin": loss}}))
    write(tmp_path, root, 10, ranks=1)
    assert [p.step for p in checkpoint.prune(LOCAL, root, 2, "loss")] == [2]
    assert [p.step for p in places(LOCAL, root)] == [10, 8, 6, 4]
    assert [p.step for p in checkpoint.prune(LOCAL, root, 1, "margin")] == [4]
    assert [p.step for p in checkpoint.prune(LOCAL, root, 1, None)] == [6]
    assert [p.step for p in places(LOCAL, root)] == [10, 8]


def test_a_checkpoint_waits_for_its_validation_and_the_best_is_kept(tmp_path: Path) -> None:
    root = str(tmp_path / "run")
    for step, accuracy in ((2, 0.5), (4, 0.9), (6, 0.7), (8, None), (10, None)):
        path = write(tmp_path, root, step)
        if accuracy is not None:
            checkpoint.write_validation(LOCAL, path, {"accuracy": accuracy})
    assert [p.step for p in checkpoint.prune(LOCAL, root, 1, "accuracy", validated=True)] == [6, 2]
    assert [p.step for p in places(LOCAL, root)] == [10, 8, 4]  # the newest, the one to come, the best
    assert newest_whole(LOCAL, root, pytest.fail) is not None
    assert checkpoint.verify(LOCAL, places(LOCAL, root)[2])["step"] == 4  # still sealed
    checkpoint.write_validation(LOCAL, f"{root}/step-00000006", {"accuracy": 1.0})  # came too late
    assert [p.step for p in places(LOCAL, root)] == [10, 8, 4]


def test_ranks_that_seal_at_once_write_the_same_seal(tmp_path: Path) -> None:
    """Each rank has times of its own in its metrics; whoever writes COMPLETE, it says what rank 0 said."""
    root, sealed = str(tmp_path / "run"), set()
    for attempt, last in enumerate((0, 1)):
        path = f"{root}/{folder_name(4, attempt)}"
        for rank in (1 - last, last):
            checkpoint.write(rank_folder(tmp_path, rank), LOCAL, path, rank, facts(4, seconds=rank + 0.25))
        sealed.add((Path(path) / COMPLETE).read_text())
    assert len(sealed) == 1
    assert json.loads(sealed.pop())["metrics"] == {"seconds": 0.25}


def test_ranks_that_seal_at_once_leave_a_whole_checkpoint(tmp_path: Path) -> None:
    """A hundred times two threads; written in place and with two texts, one in twenty was torn."""
    for step in range(1, 101):
        path, together = str(tmp_path / folder_name(step, 0)), threading.Barrier(2)

        def rank(r: int, step: int = step, path: str = path, together: threading.Barrier = together) -> None:
            folder = tmp_path / f"small-{r}"
            folder.mkdir(exist_ok=True)
            (folder / f"optim-{r}.pt").write_bytes(b"x")
            together.wait()
            checkpoint.write(folder, LOCAL, path, r, facts(step, seconds=0.5 if r else 1 / 3))

        threads = [threading.Thread(target=rank, args=(r,)) for r in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert verify(LOCAL, Place(step, 0, path))["metrics"] == {"seconds": 1 / 3}
        assert not list(Path(path).glob("*.partial"))


def test_what_was_written_before_a_resume_goes_before_what_came_after(tmp_path: Path) -> None:
    """Steps 8 and 6 are damaged, attempt 1 goes on from 4: its checkpoints are the newest, whatever their steps."""
    root = str(tmp_path / "run")
    for step in (4, 6, 8):
        write(tmp_path, root, step)
    for step in (6, 8):
        (Path(root) / folder_name(step, 0) / "deepspeed" / "optim-1.pt").write_bytes(b"")
    write(tmp_path, root, 5, attempt=1)
    assert [(p.step, p.attempt) for p in checkpoint.prune(LOCAL, root, 2, None)] == [(6, 0), (4, 0)]
    found = newest_whole(LOCAL, root, lambda text: None)
    assert found is not None
    assert (found[0].step, found[0].attempt) == (5, 1)


def test_a_validation_that_is_half_written_or_failed(tmp_path: Path) -> None:
    root = str(tmp_path / "run")
    paths = [write(tmp_path, root, step) for step in (2, 4, 6)]
    (Path(paths[0]) / checkpoint.SCORES_FILE).write_text('{"accu')
    assert checkpoint.validation_of(LOCAL, Place(2, 0, paths[0])) is None
    assert checkpoint.prune(LOCAL, root, 1, "accuracy", validated=True) == []  # all three wait
    checkpoint.write_validation(LOCAL, paths[1], {})  # it failed, and those before it will not be asked again
    assert [p.step for p in checkpoint.prune(LOCAL, root, 1, "accuracy", validated=True)] == [4, 2]


def test_checkpoints_that_wait_for_validation_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = str(tmp_path / "run")
    monkeypatch.setattr(checkpoint, "MAX_PENDING", 2)
    for step in (2, 4, 6, 8, 10):
        write(tmp_path, root, step)
    assert [p.step for p in checkpoint.prune(LOCAL, root, 1, None, validated=True)] == [8, 6]  # 2 and 4 are next


def test_an_object_store_holds_checkpoints_and_gives_them_back(tmp_path: Path, remote: str) -> None:
    filesystem, root = open_storage(f"{remote}/kept")
    assert filesystem.type_name in ("s3", "gcs")
    for step in (2, 4, 6):
        write(tmp_path / str(step), root, step, filesystem=filesystem)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "optim-0.pt").write_bytes(b"half")
    checkpoint._copy(tmp_path / "half" / "optim-0.pt", filesystem, f"{root}/step-00000008/optim-0.pt")
    found = newest_whole(filesystem, root, lambda text: None)
    assert found is not None
    assert found[0].step == 6
    with checkpoint.local_folder(f"{remote}/kept/step-00000006") as folder:
        assert (folder / "deepspeed" / "optim-1.pt").read_bytes() == b"\x01" * 5_000_000
    with filesystem.open_output_stream(f"{root}/step-00000006/deepspeed/optim-1.pt") as out:
        out.write(b"\x02" * 5_000_000)
    warned: list[str] = []
    found = newest_whole(filesystem, root, warned.append)
    assert found is not None
    assert found[0].step == 4
    assert "has changed since it was written" in warned[-1]
    checkpoint.prune(filesystem, root, 1, None)
    assert [place.step for place in places(filesystem, root) if place.step < 8] == [6]
    with filesystem.open_output_stream(f"{root}/step-00000010/rank-0.json") as out:  # in a folder that nobody made
        out.write(b"{}")
    made_by_none = places(filesystem, root)[0]
    assert made_by_none == Place(10, 0, f"{root}/step-00000010")
    checkpoint.remove(filesystem, made_by_none)
    assert places(filesystem, root)[0].step == 8
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "step-00000004").touch()  # a file is no checkpoint
    assert places(LOCAL, str(tmp_path / "local")) == []


def test_a_uri_is_downloaded_for_the_time_of_a_block(tmp_path: Path) -> None:
    path = write(tmp_path, str(tmp_path / "run"), 4)
    with checkpoint.local_folder(f"file://{path}") as folder:
        assert folder.name == "step-00000004"
        assert (folder / "deepspeed" / "optim-1.pt").stat().st_size == 5_000_000
    assert not folder.exists()
    with checkpoint.local_folder(path) as folder:
        assert folder == Path(path)
    with pytest.raises(CheckpointError, match="cannot be downloaded"), checkpoint.local_folder("file:///nowhere/x"):
        pass
