"""What a rank does to survive: alone, with Ray Train's calls replaced, and on a cluster whose nodes go.

On the cluster (small Ray nodes in this machine) one node is drained, a checkpoint coming before its deadline, and one
is lost, with an elastic number of workers. Faults inside workers are in `test_driver.py`.
"""

import functools
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
import ray.cloudpickle
import torch
from ray.cluster_utils import Cluster

from benchmarks.plain import PlainBackend
from dtrpo_ray.config.cluster import ClusterConfig
from dtrpo_ray.config.train import TrainConfig
from dtrpo_ray.errors import CheckpointError
from dtrpo_ray.metrics import EVENTS, METRICS, read_metrics
from dtrpo_ray.models.registry import load_model, save_model
from dtrpo_ray.session import ray_session
from dtrpo_ray.train import checkpoint, dataset, driver, loop, recovery, worker
from dtrpo_ray.train.recovery import STACKS
from dtrpo_ray.train.run import RunSpec, TrainStage
from tests.train.test_driver import CONFIG, write_table

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
ray.cloudpickle.register_pickle_by_value(sys.modules["tests.train.test_driver"])


class OneRank:
    """Stands for ray.train in a process that is rank 0 of 1: reports are uploaded at once."""

    def __init__(self) -> None:
        self.reported: list[str] = []
        self.info: Any = None

    def get_context(self) -> Any:
        zero, one = (lambda: 0), (lambda: 1)
        return SimpleNamespace(get_world_rank=zero, get_local_rank=zero, get_world_size=one)

    def report(
        self, metrics: Any, checkpoint: Any, checkpoint_dir_name: str, checkpoint_upload_fn: Any, **_: Any
    ) -> None:
        self.reported.append(checkpoint_dir_name)
        with suppress(OSError):  # Ray Train hands it to the training thread
            checkpoint_upload_fn(checkpoint, checkpoint_dir_name)

    def get_preemption_info(self) -> Any:
        return self.info


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> OneRank:
    fake = OneRank()
    monkeypatch.setattr(recovery, "ray", SimpleNamespace(train=fake))
    monkeypatch.setattr(recovery, "broadcast_from_rank_zero", lambda data: data)
    monkeypatch.setattr(recovery, "barrier", lambda: None)
    monkeypatch.setattr(recovery.torch.distributed, "all_gather_object", lambda out, mine: out.__setitem__(0, mine))
    return fake


class Engine:
    """A backend that saves a file of its step."""

    device = torch.device("cpu")

    def save(self, path: Path, step: int) -> None:
        (path / "state").write_text(str(step))


def saver(out: Path, attempt: int = 0, **changes: Any) -> recovery.Saver:
    config = CONFIG.model_copy(update={"keep_checkpoints": 2, **changes})
    spec = RunSpec(stage(out), config, ClusterConfig(), (str(out / "checkpoints"),), 8, "a plan", 15)
    return recovery.Saver(Engine(), spec, attempt)  # type: ignore[arg-type]


def stage(out: Path) -> TrainStage:
    return TrainStage("train-1", Path("base"), Path("table"), out, 0, {"base": "b"})


def steps_there(out: Path) -> list[tuple[int, int]]:
    return [
        (place.step, place.attempt) for place in checkpoint.places(*checkpoint.open_storage(str(out / "checkpoints")))
    ]


def test_saves_are_whole_kept_by_count_and_best(one_rank: OneRank, tmp_path: Path) -> None:
    mine = saver(tmp_path, keep_best="loss")
    for step, loss in ((2, 0.1), (4, 0.5), (6, 0.4), (8, 0.3)):
        mine.metrics = {"step": step, "loss": loss}
        mine.save(step, at_once=True)
    assert steps_there(tmp_path) == [(8, 0), (6, 0), (2, 0)]
    found = recovery.choose([str(tmp_path / "checkpoints")], tmp_path, 0, 1)
    assert found is not None
    assert (found.place.step, found.facts["num_workers"], found.facts["metrics"]["loss"]) == (8, 1, 0.3)
    assert recovery.attempt_number(str(tmp_path / "checkpoints")) == 1
    assert recovery.attempt_number(str(tmp_path / "none")) == 0


def test_a_storage_that_fails_for_a_while_costs_no_checkpoint(
    one_rank: OneRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, root = saver(tmp_path), str(tmp_path / "checkpoints")
    for step in (2, 4):
        mine.save(step, at_once=True)

    def fails(filesystem: Any, path: str) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint.time, "sleep", lambda seconds: None)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_get", fails)
        # not step 0: the attempt ends, and the next one reads again
        with pytest.raises(OSError, match=r"no checkpoint could be chosen: .* cannot be read"):
            recovery.choose([root], tmp_path, 0, 1)
    assert steps_there(tmp_path) == [(4, 0), (2, 0)]
    found = recovery.choose([root], tmp_path, 0, 1)
    assert found is not None
    assert found.place.step == 4


def test_a_damaged_checkpoint_is_skipped_and_an_unfinished_one_removed(one_rank: OneRank, tmp_path: Path) -> None:
    mine, root = saver(tmp_path), str(tmp_path / "checkpoints")
    for step in (2, 4):
        mine.save(step)
    (tmp_path / "checkpoints" / "step-00000004" / "state").write_text("5")
    (tmp_path / "checkpoints" / "step-00000006").mkdir()
    found = recovery.choose([root], tmp_path, 0, 1)
    assert found is not None
    assert found.place.step == 2
    told = [event["message"] for event in read_metrics(tmp_path / EVENTS)]
    assert [text.startswith("skipped checkpoint ") for text in told] == [True, True]
    assert "never finished" in told[0]
    assert "has changed since it was written" in told[1]
    assert steps_there(tmp_path) == [(4, 0), (2, 0)]
    again = saver(tmp_path, recovery.attempt_number(root))
    again.save(4)
    assert steps_there(tmp_path) == [(4, 1), (4, 0)]
    assert recovery.choose([root], tmp_path, 0, 1) is not None


def test_a_checkpoint_holds_its_plan_and_what_was_read_of_each_epoch(one_rank: OneRank, tmp_path: Path) -> None:
    mine, root = saver(tmp_path, keep_checkpoints=9), str(tmp_path / "checkpoints")  # two epochs of 15, four a step
    read = []
    for step in (1, 4, 8):
        mine.save(step)
        found = recovery.choose([root], tmp_path, 0, 1)
        assert found is not None
        read.append(found.facts["plan"]["consumed"])
    assert read == [[4, 0], [15, 1], [15, 15]]
    recovery.require_same(found, "a plan", False, stage(tmp_path))
    with pytest.raises(
        CheckpointError, match=r"step-00000008: its 30 rows were read in the order a plan, this run's is b"
    ):
        recovery.require_same(found, "b", False, stage(tmp_path))


def test_a_checkpoint_of_the_other_precision_is_refused_with_the_remedy(one_rank: OneRank, tmp_path: Path) -> None:
    """Precision auto is fp32 on this CPU and bf16 on a GPU."""
    saver(tmp_path).save(2, at_once=True)
    found = recovery.choose([str(tmp_path / "checkpoints")], tmp_path, 0, 1)
    assert found is not None
    recovery.require_same(found, "a plan", False, stage(tmp_path))
    remedy = f"--resume {tmp_path} --set train.precision=fp32"
    with pytest.raises(CheckpointError, match=rf"was trained in fp32, but this run uses bf16.*{remedy}"):
        recovery.require_same(found, "a plan", True, stage(tmp_path))


def test_a_run_to_go_on_from_that_is_damaged_is_no_new_run(one_rank: OneRank, tmp_path: Path) -> None:
    saver(tmp_path).save(2, at_once=True)
    (tmp_path / "checkpoints" / "step-00000002" / "state").write_text("damaged")
    with pytest.raises(CheckpointError, match="no checkpoint here verifies, so there is nothing to go on from"):
        recovery.choose([str(tmp_path / "new"), str(tmp_path / "checkpoints")], tmp_path, 0, 1)


def test_a_checkpoint_that_cannot_be_read_gives_way_to_an_older_one(
    one_rank: OneRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, real = saver(tmp_path), checkpoint._remote_sha256
    for step in (2, 4):
        mine.save(step, at_once=True)

    def fails(filesystem: Any, path: str) -> str:
        if "step-00000004" in path:
            raise OSError(5, "Input/output error")
        return real(filesystem, path)

    monkeypatch.setattr(checkpoint.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(checkpoint, "_remote_sha256", fails)
    found = recovery.choose([str(tmp_path / "checkpoints")], tmp_path, 0, 1)
    assert found is not None
    assert found.place.step == 2


def test_old_checkpoints_that_cannot_be_removed_stop_nothing(
    one_rank: OneRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(checkpoint, "remove", fails)
    mine = saver(tmp_path, keep_checkpoints=1)
    for step in (2, 4):
        mine.save(step, at_once=True)
    assert steps_there(tmp_path) == [(4, 0), (2, 0)]
    [told] = [e for e in read_metrics(tmp_path / EVENTS) if e["event"] == "storage error"]
    assert "could not be removed: [Errno 16] Device or resource busy" in told["message"]


def test_another_runs_checkpoints_are_the_second_choice(one_rank: OneRank, tmp_path: Path) -> None:
    for name in ("mine", "other"):
        (tmp_path / name).mkdir()
    saver(tmp_path / "other").save(6)
    roots = [str(tmp_path / name / "checkpoints") for name in ("mine", "other")]
    found = recovery.choose(roots, tmp_path, 0, 1)
    assert found is not None
    assert (found.root, found.place.step) == (roots[1], 6)
    saver(tmp_path / "mine").save(2)
    found = recovery.choose(roots, tmp_path, 0, 1)
    assert found is not None
    assert (found.root, found.place.step) == (roots[0], 2)


def test_a_write_error_is_told_and_leaves_nothing_whole(
    one_rank: OneRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_copy", full)
    monkeypatch.setattr(checkpoint.time, "sleep", lambda seconds: None)
    saver(tmp_path).save(2, at_once=True)
    assert "could not be written: [Errno 28] No space left" in read_metrics(tmp_path / EVENTS)[0]["message"]
    assert recovery.choose([str(tmp_path / "checkpoints")], tmp_path, 0, 1) is None


def test_scratch_of_a_killed_attempt_is_removed(one_rank: OneRank, tmp_path: Path) -> None:
    left = Path(tempfile.mkdtemp(prefix=f"dtrpo-{tmp_path.name}-rank-0-"))
    saver(tmp_path)
    assert not left.exists()


def test_each_drained_node_asks_for_one_checkpoint(one_rank: OneRank, tmp_path: Path) -> None:
    leaving = recovery.DrainWatch(tmp_path / EVENTS, rank=0)
    assert not leaving.due()
    leaving.last -= recovery.DRAIN_POLL_SECONDS + 1
    assert leaving.due()
    answers = []
    for nodes in ([], ["a"], ["a"], ["a", "b"]):
        deadline = (time.time() + 90) * 1000
        one_rank.info = SimpleNamespace(preempted_node_ids=nodes, preempted_ranks=[1], deadline_ms=deadline)
        answers.append(leaving.ask())
    assert answers == [False, True, False, True]
    assert not leaving.due()
    assert re.search(
        r"\[1\] are being drained, (89|90) s left: checkpoint now", read_metrics(tmp_path / EVENTS)[0]["message"]
    )
    other = recovery.DrainWatch(tmp_path / EVENTS, rank=1)
    other.last -= 60
    assert not other.due()  # rank 0's clock decides


def test_a_process_that_hangs_dumps_its_stacks_and_dies(tmp_path: Path) -> None:
    code = f"""
import time
from pathlib import Path
from dtrpo_ray.train.recovery import watchdog
def waits_for_ever():
    time.sleep(3600)
with watchdog(Path({str(tmp_path)!r}), 3, 2) as alive:
    for _ in range(3):
        time.sleep(1)
        alive()
    waits_for_ever()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=300)
    assert done.returncode == 1
    [dump] = (tmp_path / STACKS).iterdir()
    assert dump.name.endswith("-rank-3.txt")
    assert "in waits_for_ever" in dump.read_text()


def test_an_attempt_that_ends_leaves_no_stacks(tmp_path: Path) -> None:
    with pytest.raises(KeyError), recovery.watchdog(tmp_path, 0, 60):
        raise KeyError
    assert not list((tmp_path / STACKS).iterdir())


STEPS, STEP_SECONDS, NOTICE_SECONDS = 24, 1.0, 10
LONG = CONFIG.model_copy(update={"num_epochs": 6, "save_every": 1000, "lr": 1e-3})


@pytest.fixture(scope="module")
def nodes(no_shared_ray: None) -> Iterator[Cluster]:
    """A head without CPUs and three nodes of one worker each."""
    env = {
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        for _ in range(3):
            cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        yield cluster
        cluster.shutdown()


def slow(folder: str, spec: RunSpec) -> None:
    """`worker.run_rank` that says on which node it runs, at one step a second until `over` lies in the folder."""
    rank, real = ray.train.get_context().get_world_rank(), loop.seed_step
    (Path(folder) / f"{time.time():.3f}-{rank}.json").write_text(
        json.dumps({"rank": rank, "node": ray.get_runtime_context().get_node_id(), "time": time.time()})
    )

    def seed_step(seed: int, step: int, rank: int) -> None:
        real(seed, step, rank)
        if not (Path(folder) / "over").exists():
            time.sleep(STEP_SECONDS)

    loop.seed_step = seed_step  # type: ignore[assignment]
    worker.run_rank(spec)


def latest_node(folder: Path, rank: int) -> str:
    notes = [json.loads(file.read_text()) for file in sorted(folder.glob(f"*-{rank}.json"))]
    return str(max(notes, key=lambda note: note["time"])["node"])


def drain(cluster: Cluster, node: str) -> None:
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    deadline = int((time.time() + NOTICE_SECONDS) * 1000)
    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    client = ray._raylet.GcsClient(address=cluster.address)
    accepted, why = client.drain_node(node, reason, "spot", deadline)
    assert accepted, why


def lose(cluster: Cluster, node: str) -> None:
    cluster.remove_node(next(n for n in cluster.worker_nodes if n.node_id == node), allow_graceful=False)


def straight_weights(base: Path, table: Path, config: TrainConfig) -> dict[str, torch.Tensor]:
    """The same run by one plain process."""
    rows = pq.read_table(table).to_pylist()
    plan = dataset.make_plan([row["row_id"] for row in rows], config, 0)
    size = config.global_batch
    batches = [
        [{**rows[plan.row[o]], "epoch": int(plan.epoch[o]), "batch_weight": float(size)} for o in range(s, s + size)]
        for s in range(0, len(plan.row), size)
    ]
    policy, reference = load_model(base), load_model(base).eval()
    backend = PlainBackend(policy, config, plan.num_steps, torch.device("cpu"))
    to_batch = loop.collate(config, policy, 0)
    loop.run(config, backend, reference, batches, to_batch, 0, plan.num_steps, lambda row: None, lambda step: None)
    return {name: value.detach() for name, value in policy.named_parameters()}


def slow_stage(folder: Path, make_model: Callable[..., Any], patch: pytest.MonkeyPatch) -> TrainStage:
    """A stage of `folder` whose workers are slow and note where they run in `folder / "notes"`."""
    out, notes = folder / "stage.partial", folder / "notes"
    for made in (out, notes, folder / "base"):
        made.mkdir()
    save_model(make_model(), folder / "base")
    patch.setattr(driver, "_train_function", lambda spec: functools.partial(slow, str(notes), spec))
    return TrainStage("stage", folder / "base", write_table(folder / "table"), out, 0)


def events(stage: TrainStage, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_metrics(stage.out / EVENTS) if event["event"] == kind]


def wait_for_step(stage: TrainStage, step: int) -> None:
    while max((row["step"] for row in read_metrics(stage.out / METRICS)), default=0) < step:
        time.sleep(0.2)


def wait_for_resumes(stage: TrainStage, count: int) -> None:
    while len(events(stage, "resume")) < count:
        time.sleep(0.2)


def train_beside(chaos: Callable[[], None], stage: TrainStage, config: TrainConfig, cluster: ClusterConfig) -> None:
    thread = threading.Thread(target=chaos, daemon=True)
    with ray_session(cluster):
        thread.start()
        driver.train(stage, config, cluster)
    thread.join(5)
    assert not thread.is_alive()


def farthest(stage: TrainStage, theirs: dict[str, torch.Tensor]) -> float:
    ours = load_model(stage.out / "model").named_parameters()
    return max(float((value - theirs[name]).abs().max()) for name, value in ours)


@pytest.mark.ray
def test_a_lost_node_with_a_fixed_number_of_workers_gives_way_to_a_spare_one(
    nodes: Cluster, tmp_path: Path, make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both workers start again, on the nodes that are left, from the last checkpoint."""
    stage = slow_stage(tmp_path, make_model, monkeypatch)
    config, notes = LONG.model_copy(update={"num_epochs": 2, "save_every": 2}), tmp_path / "notes"
    cluster = ClusterConfig(address=nodes.address, num_workers=2, max_failures=3, use_gpu="no", hang_seconds=120)
    nodes.add_node(num_cpus=1)
    lost: list[str] = []

    def chaos() -> None:
        wait_for_step(stage, 4)
        lost.append(latest_node(notes, 1))
        lose(nodes, lost[0])
        wait_for_resumes(stage, 1)
        (notes / "over").touch()

    train_beside(chaos, stage, config, cluster)
    [resumed] = events(stage, "resume")
    assert resumed["step"] in (2, 4, 6)
    assert resumed["num_workers"] == 2
    assert latest_node(notes, 1) != lost[0]
    assert latest_node(notes, 0) != lost[0]
    assert [row["step"] for row in read_metrics(stage.out / METRICS)] == list(range(1, 9))
    assert farthest(stage, straight_weights(tmp_path / "base", tmp_path / "table", config)) < 1e-4


@pytest.mark.ray
def test_a_drained_node_and_a_lost_one(
    nodes: Cluster, tmp_path: Path, make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, notes = slow_stage(tmp_path, make_model, monkeypatch), tmp_path / "notes"
    cluster = ClusterConfig(address=nodes.address, num_workers=(1, 2), max_failures=3, use_gpu="no", hang_seconds=120)

    def chaos() -> None:
        wait_for_step(stage, 3)
        drain(nodes, latest_node(notes, 1))
        wait_for_resumes(stage, 1)
        wait_for_step(stage, events(stage, "resume")[0]["step"] + 2)
        lose(nodes, latest_node(notes, 1))
        wait_for_resumes(stage, 2)
        (notes / "over").touch()

    train_beside(chaos, stage, LONG, cluster)
    drained, resumed = events(stage, "drain"), events(stage, "resume")
    assert drained
    assert "checkpoint now" in drained[0]["message"]
    # the checkpoint of the drain is the one both attempts came back to: there was no other
    assert len(resumed) >= 2
    assert resumed[0]["step"] >= 3
    assert resumed[0]["time"] - drained[0]["time"] >= NOTICE_SECONDS * 0.5  # it used the time it was given
    assert resumed[-1]["num_workers"] == 1
    assert [row["step"] for row in read_metrics(stage.out / METRICS)] == list(range(1, STEPS + 1))
    assert farthest(stage, straight_weights(tmp_path / "base", tmp_path / "table", LONG)) < 1e-4
    assert farthest(stage, dict(load_model(tmp_path / "base").named_parameters())) > 5e-3
