"""The fault table: what goes wrong in a run, what is lost, and that the weights come out as if nothing had happened.

Two workers on Ray Train with DeepSpeed. The faulty run suffers one fault after another, each once, and must end in the
very weights of the straight run; what a person is told lies in `events.jsonl`.
"""

import functools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.cloudpickle
import torch

from dtrpo_ray import compat
from dtrpo_ray.config.cluster import ClusterConfig
from dtrpo_ray.config.train import Objective, TrainConfig
from dtrpo_ray.errors import TrainError
from dtrpo_ray.files import join_path
from dtrpo_ray.metrics import EVENTS, METRICS, read_metrics
from dtrpo_ray.models.registry import load_model, save_model
from dtrpo_ray.train import checkpoint, driver, loop, worker
from dtrpo_ray.train.recovery import STACKS
from dtrpo_ray.train.run import RunSpec, TrainStage

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers need not find the tests

STEPS = 8
CONFIG = TrainConfig(
    objective=Objective(beta=0.5), lr=1e-2, global_batch=4, micro_batch=2, num_epochs=2, save_every=2, zero_stage=2
)


def write_table(folder: Path) -> Path:
    """16 pairs: four optimizer steps an epoch."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [{name: torch.randint(0, 20, (8,), generator=generator).tolist() for name in columns} for _ in range(16)]
    steps = [0, 1, 0, 1, 2, 2, 3, 3]
    rows = [{"row_id": f"row-{i}", **row, "chosen_steps": steps, "rejected_steps": steps} for i, row in enumerate(rows)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "part-0.parquet")
    return folder


@pytest.fixture(scope="module")
def make_stage(tmp_path_factory: pytest.TempPathFactory, make_model: Any) -> Callable[..., TrainStage]:
    """A stage of a new folder, of the same model and table."""
    folder = tmp_path_factory.mktemp("trainer")
    (folder / "base").mkdir()
    save_model(make_model(), folder / "base")
    table = write_table(folder / "table")

    def make(name: str, **more: Any) -> TrainStage:
        out = folder / f"{name}.partial"
        out.mkdir(exist_ok=True)
        return TrainStage(name, folder / "base", table, out, 0, {"base": "b", "table": "t"}, **more)

    return make


def cluster(**changes: Any) -> ClusterConfig:
    return ClusterConfig(**{"num_workers": 2, "max_failures": 0, "use_gpu": "no", **changes})


def weights(stage: TrainStage) -> dict[str, torch.Tensor]:
    return dict(load_model(stage.out / "model").named_parameters())


def equal(one: TrainStage, other: TrainStage) -> bool:
    theirs = weights(other)
    return all(torch.equal(value, theirs[name]) for name, value in weights(one).items())


def events(stage: TrainStage, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_metrics(stage.out / EVENTS) if event["event"] == kind]


@pytest.fixture(scope="module")
def straight(local_ray: None, make_stage: Any) -> TrainStage:
    stage: TrainStage = make_stage("straight")
    last = driver.train(stage, CONFIG, cluster())
    assert last["step"] == STEPS
    return stage


def once(folder: Path, fault: str) -> bool:
    """Whether this fault is still to come; from now on it is not."""
    if (folder / fault).exists():
        return False
    (folder / fault).touch()
    return True


def until_whole(root: str, step: int) -> None:
    """Wait for the upload of a step's checkpoint: it goes on beside training."""
    filesystem, path = checkpoint.open_storage(root)
    for _ in range(600):
        for place in checkpoint.places(filesystem, path):
            [complete] = filesystem.get_file_info([f"{place.path}/{checkpoint.COMPLETE}"])
            if place.step == step and complete.is_file:
                return
        time.sleep(0.1)


def flip_a_byte_of_the_newest(root: str) -> None:
    filesystem, path = checkpoint.open_storage(root)
    newest = checkpoint.places(filesystem, path)[0]
    file = next(Path(newest.path).rglob("*optim_states.pt"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def faulty(folder: str, spec: RunSpec) -> None:
    """`worker.run_rank` in a world where things go wrong; runs in the worker process."""
    faults, rank = Path(folder), ray.train.get_context().get_world_rank()
    real_seed, real_copy = loop.seed_step, checkpoint._copy

    def seed_step(seed: int, step: int, rank: int) -> None:
        real_seed(seed, step, rank)
        if step in (3, 5, 7):
            until_whole(spec.roots[0], step - 1)
        if step == 3 and rank == 1 and once(faults, "exception"):
            raise RuntimeError("a bug in a worker")
        if step == 5 and rank == 0 and once(faults, "killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        if step == 7 and rank == 1 and once(faults, "memory"):
            limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + 2**28
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
            torch.zeros(2**30)
        if step == 8 and rank == 1 and once(faults, "hang"):
            time.sleep(3600)

    def copy(file: Path, filesystem: Any, path: str) -> None:
        if "step-00000006" in path and rank == 1 and once(faults, "storage"):
            raise OSError(28, "No space left on device")
        real_copy(file, filesystem, path)

    loop.seed_step, checkpoint._copy = seed_step, copy  # type: ignore[assignment]
    checkpoint.ATTEMPTS = 1  # so that one failing write is one checkpoint less
    if rank == 0 and (faults / "killed").exists() and once(faults, "corrupt"):
        flip_a_byte_of_the_newest(spec.roots[0])
    worker.run_rank(spec)


@pytest.fixture(scope="module")
def survived(straight: TrainStage, make_stage: Any, tmp_path_factory: Any) -> TrainStage:
    stage: TrainStage = make_stage("faulty")
    with pytest.MonkeyPatch.context() as patch:
        faults = str(tmp_path_factory.mktemp("faults"))
        patch.setattr(driver, "_train_function", lambda spec: functools.partial(faulty, faults, spec))
        driver.train(stage, CONFIG, cluster(max_failures=9, hang_seconds=20))
    return stage


def test_a_run_that_suffers_every_fault_ends_in_the_weights_of_the_straight_run(
    survived: TrainStage, straight: TrainStage
) -> None:
    assert equal(survived, straight)
    assert [row["step"] for row in read_metrics(survived.out / METRICS)] == list(range(1, STEPS + 1))
    one, other = (read_metrics(stage.out / METRICS) for stage in (survived, straight))
    assert [row["loss"] for row in one] == [row["loss"] for row in other]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("failure", "worker 1 failed: RuntimeError: a bug in a worker"),
        ("failure", "worker 0 failed: "),
        ("failure", "can't allocate memory"),
        ("failure", "worker 1 failed: "),
        ("skipped checkpoint", "has changed since it was written"),
        ("storage error", "No space left on device"),
    ],
)
def test_each_fault_is_told(survived: TrainStage, kind: str, message: str) -> None:
    assert any(message in event["message"] for event in events(survived, kind)), events(survived, kind)


def test_at_most_the_steps_since_the_last_checkpoint_are_lost(survived: TrainStage) -> None:
    """Fault by fault: step 3 -> 2; killed at 5, 4 corrupt -> 2; no 6 written -> 4; 7 -> 6; 8 -> 6."""
    resumed = [event["step"] for event in events(survived, "resume")]
    assert [step for i, step in enumerate(resumed) if not i or resumed[i - 1] != step] == [2, 4, 6]
    assert resumed.count(2) >= 2
    assert resumed.count(6) >= 2


def test_a_rank_that_hangs_leaves_the_stacks_of_its_threads(survived: TrainStage) -> None:
    """A hang is bounded by hang_seconds, and its dump says where each rank stood."""
    dumps = [file.read_text() for file in (survived.out / STACKS).glob("*-rank-1.txt")]
    assert any("most recent call first" in text and "seed_step" in text for text in dumps)


def test_what_no_restart_mends_ends_the_run_at_once(
    local_ray: None, make_stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hopeless(spec: RunSpec) -> None:
        def seed_step(seed: int, step: int, rank: int) -> None:
            if step == 2 and rank == 1:
                raise TrainError("the loss is not finite at step 2; rows of this rank: row-7")

        loop.seed_step = seed_step  # type: ignore[assignment]
        worker.run_rank(spec)

    stage = make_stage("hopeless")
    monkeypatch.setattr(driver, "_train_function", lambda spec: functools.partial(hopeless, spec))
    with pytest.raises(TrainError, match=r"hopeless: the loss is not finite at step 2; rows of this rank: row-7"):
        driver.train(stage, CONFIG, cluster(max_failures=9))
    assert {event["failure"] for event in events(stage, "failure")} == {1}
    assert not events(stage, "resume")


def test_a_driver_that_was_killed_is_run_again_and_goes_on(straight: TrainStage, make_stage: Any) -> None:
    stage = make_stage("killed-driver")
    process = subprocess.Popen(
        [sys.executable, __file__, str(stage.base), str(stage.table), str(stage.out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 240
    while len(read_metrics(stage.out / METRICS)) < 5:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.2)
    until_whole(str(stage.out / driver.RAY_RUN), 4)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    driver.train(stage, CONFIG, cluster())
    assert [event["step"] for event in events(stage, "resume")] == [4]
    assert equal(stage, straight)


def test_a_finished_run_resumed_trains_nothing(straight: TrainStage) -> None:
    before = {name: value.clone() for name, value in weights(straight).items()}
    driver.train(straight, CONFIG, cluster())
    assert events(straight, "resume")[-1]["message"].startswith(f"resumed at step {STEPS} of {STEPS}")
    assert all(torch.equal(value, before[name]) for name, value in weights(straight).items())
    assert len(read_metrics(straight.out / METRICS)) == STEPS


def noting(folder: str, spec: RunSpec) -> None:
    """`worker.run_rank` that writes down the rows which become a batch of the loss; rank 0 is killed at step 5."""
    rank, world = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    real_seed, real_collate, now = loop.seed_step, loop.collate, [0]

    def seed_step(seed: int, step: int, rank: int) -> None:
        real_seed(seed, step, rank)
        now[0] = step
        if step == 5:
            until_whole(spec.roots[0], 4)

    def collate(*args: Any, **kwargs: Any) -> Any:
        to_batch = real_collate(*args, **kwargs)

        def noted(rows: Any) -> Any:
            note = {
                "step": now[0],
                "world": world,
                "rows": [(r["epoch"], r["row_id"]) for r in rows if r["row_weight"]],
            }
            with (Path(folder) / f"{time.time():.6f}-{rank}.json").open("w") as file:
                file.write(json.dumps(note))
            if now[0] == 5 and rank == 0 and once(Path(folder), "killed"):
                os.kill(os.getpid(), signal.SIGKILL)
            return to_batch(rows)

        return noted

    loop.seed_step, loop.collate = seed_step, collate  # type: ignore[assignment]
    worker.run_rank(spec)


def test_a_ledger_of_what_was_trained_on_holds_each_row_of_each_epoch_once(
    local_ray: None, make_stage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket: str
) -> None:
    """15 pairs, two epochs; killed with two workers, gone on with by one. The rows are those that reached the loss.

    The checkpoints lie in an object store.
    """
    root = f"{bucket}/checkpoints"
    stage, notes = make_stage("ledger"), tmp_path / "notes"
    notes.mkdir()
    pairs = pq.read_table(stage.table).slice(0, 15)
    (tmp_path / "table").mkdir()
    pq.write_table(pairs, tmp_path / "table" / "part-0.parquet")
    stage = replace(stage, table=tmp_path / "table")
    monkeypatch.setattr(driver, "_train_function", lambda spec: functools.partial(noting, str(notes), spec))
    with pytest.raises(TrainError):
        driver.train(stage, CONFIG, cluster(checkpoints=root))
    driver.train(stage, CONFIG, cluster(num_workers=1, checkpoints=root))
    [resumed] = events(stage, "resume")
    assert (resumed["step"], resumed["num_workers"]) == (4, 1)

    noted = [json.loads(file.read_text()) for file in sorted(notes.glob("*.json"))]
    assert {note["step"] for note in noted if note["world"] == 2} == {1, 2, 3, 4, 5}  # step 5 came to nothing
    kept = [note for note in noted if note["world"] == 1 or note["step"] <= resumed["step"]]
    ledger = Counter((epoch, row_id) for note in kept for epoch, row_id in note["rows"])
    assert ledger == Counter((epoch, row_id) for epoch in (0, 1) for row_id in pairs["row_id"].to_pylist())
    filesystem, path = checkpoint.open_storage(f"{root}/{stage.out.stem}")
    assert filesystem.type_name == "s3"
    for place in checkpoint.places(filesystem, path):
        read = Counter(epoch for note in kept if note["step"] <= place.step for epoch, _ in note["rows"])
        assert checkpoint.facts_of(filesystem, place)["plan"]["consumed"] == [read[0], read[1]]

    other = pairs.set_column(0, "row_id", pa.array([f"other-{i}" for i in range(15)]))
    pq.write_table(other, tmp_path / "table" / "part-0.parquet")
    with pytest.raises(TrainError, match=r"its 30 rows were read in the order \w+, this run's is"):
        driver.train(stage, CONFIG, cluster(num_workers=1, checkpoints=root))
    driver.forget_checkpoints(stage.out, cluster(checkpoints=root))
    assert checkpoint.places(filesystem, path) == []


def _slow_at_step_6(spec: RunSpec) -> None:
    real = loop.seed_step

    def seed_step(seed: int, step: int, rank: int) -> None:
        real(seed, step, rank)
        time.sleep(3600 if step == 6 else 0)

    loop.seed_step = seed_step  # type: ignore[assignment]
    worker.run_rank(spec)


def _drive(base: str, table: str, out: str) -> None:
    """A driver process that never gets beyond step 5."""
    from dtrpo_ray.session import ray_session

    driver._train_function = lambda spec: functools.partial(_slow_at_step_6, spec)
    stage = TrainStage("killed-driver", Path(base), Path(table), Path(out), 0, {"base": "b", "table": "t"})
    with ray_session(cluster()):
        driver.train(stage, CONFIG, cluster())


if __name__ == "__main__":
    _drive(*sys.argv[1:])


def test_checkpoints_elsewhere_are_named_like_their_stage_and_keep_the_options_of_the_uri() -> None:
    out = Path("runs/stages/train-1-0123.partial")
    place = driver._place(out, ClusterConfig(checkpoints="s3://b/x/?endpoint_override=http://h:9"))
    assert place == ("s3://b/x/?endpoint_override=http://h:9", "train-1-0123")
    assert join_path(*place) == "s3://b/x/train-1-0123?endpoint_override=http://h:9"
    assert join_path(*driver._place(out, ClusterConfig())) == f"{out.resolve()}/{driver.RAY_RUN}"


def test_rays_own_list_is_forgotten_and_nothing_else(tmp_path: Path) -> None:
    root, snapshot = tmp_path / "run", compat.RAY_TRAIN_SNAPSHOT
    driver._forget_ray_list(str(root))  # of a run that never began
    (root / "step-00000004").mkdir(parents=True)
    (root / snapshot).write_text("{}")
    driver._forget_ray_list(str(root))
    assert [path.name for path in root.iterdir()] == ["step-00000004"]


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_stage_made_anew_forgets_its_checkpoints_and_no_others(tmp_path: Path, elsewhere: bool) -> None:
    out = tmp_path / "stages" / "train-1-0123.partial"
    cluster = ClusterConfig(checkpoints=str(tmp_path / "disk") if elsewhere else None)
    mine = tmp_path / "disk" / "train-1-0123" if elsewhere else out / "checkpoints"
    other = tmp_path / "disk" / "train-1-4567"
    driver.forget_checkpoints(out, cluster)  # nothing there is nothing to do
    for root in (mine, other):
        (root / "step-00000002").mkdir(parents=True)
    driver.forget_checkpoints(out, cluster)
    assert not mine.exists()
    assert (other / "step-00000002").exists()
