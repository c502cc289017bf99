"""Survival of a rank: choose a checkpoint, load it, save, notice a drain, never hang unseen.

`worker` calls it, on all ranks together where the docstring says "a collective". Folders and hashes are `checkpoint`'s,
the engine's files `backend`'s.
"""

import faulthandler
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray.train
import torch
from pyarrow.fs import FileSystem
from ray.train import Checkpoint, CheckpointUploadMode
from ray.train.collective import barrier, broadcast_from_rank_zero

from dtrpo_ray.errors import CheckpointError
from dtrpo_ray.metrics import EVENTS, append_event
from dtrpo_ray.train import checkpoint
from dtrpo_ray.train.backend import DeepSpeedBackend, to_universal, uses_bf16
from dtrpo_ray.train.checkpoint import CheckpointFacts, Place, SealedFacts
from dtrpo_ray.train.run import RunSpec, TrainStage

STACKS = "stacks"  # the folder of stack dumps in a stage's
DRAIN_POLL_SECONDS = 2.0
PRECISIONS = {False: "fp32", True: "bf16"}


@contextmanager
def watchdog(out: Path, rank: int, seconds: int) -> Iterator[Callable[[], None]]:
    """Dump the stacks of all threads and end the process unless the yielded function is called every `seconds`.

    Python's faulthandler does it in a C thread, which also fires while the interpreter lock is held. An attempt that
    ends in another way leaves no file.
    """
    (out / STACKS).mkdir(exist_ok=True)
    with (out / STACKS / f"{time.strftime('%Y%m%d-%H%M%S')}-rank-{rank}.txt").open("w") as file:

        def alive() -> None:
            faulthandler.dump_traceback_later(seconds, exit=True, file=file)

        alive()
        try:
            yield alive
        finally:
            faulthandler.cancel_dump_traceback_later()
            Path(file.name).unlink(missing_ok=True)


class DrainWatch:
    """Notices nodes that are about to go. To ask is a collective, so rank 0's clock decides when it is `due`."""

    def __init__(self, events: Path, rank: int) -> None:
        self.events, self.rank, self.last, self.now = events, rank, time.monotonic(), False
        self.seen: set[str] = set()

    def due(self) -> bool:
        return self.rank == 0 and time.monotonic() - self.last > DRAIN_POLL_SECONDS

    def ask(self) -> bool:
        """Return True once for each node that is drained: time for a checkpoint before it goes."""
        self.last = time.monotonic()
        info = ray.train.get_preemption_info()
        new = set(info.preempted_node_ids) - self.seen if info else set()
        self.now = bool(new)
        self.seen |= new
        if new and info and self.rank == 0:
            left = f"{info.deadline_ms / 1000 - time.time():.0f} s left" if info.deadline_ms else "no deadline"
            message = f"node(s) of worker(s) {info.preempted_ranks} are being drained, {left}: checkpoint now"
            append_event(self.events, "drain", message, nodes=sorted(new))
        return self.now


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpoint that every rank agreed on; `root` is the URI or path of its run."""

    root: str
    place: Place
    facts: SealedFacts


def choose(roots: Sequence[str], out: Path, rank: int, world: int) -> Found | None:
    """Return the newest checkpoint whose every byte verifies, each rank reading its share. A collective.

    Others are skipped with a warning, and unfinished ones are removed: their writer is dead. Where nothing verifies,
    raises OSError if something could not be read, and CheckpointError if there is a second root, of a run to go on
    from.
    """
    unread = ""
    for root in roots:
        filesystem, path = checkpoint.open_storage(root)
        for place in _list(filesystem, path):
            problem, facts = ("", ""), None
            try:
                facts = checkpoint.verify(filesystem, place, rank, world)
            except CheckpointError as error:
                problem = ("broken", str(error))
            except OSError as error:
                problem = ("unread", f"{place.path}: cannot be read ({error})")
            problems = [problem] * world
            torch.distributed.all_gather_object(problems, problem)
            bad = sorted((kind, text) for kind, text in problems if kind)
            if facts and not bad:
                return Found(root, place, facts)
            kind, text = bad[0]
            unread = unread or (text if kind == "unread" else "")
            if rank == 0:
                message = f"skipped checkpoint {text}"
                append_event(out / EVENTS, "skipped checkpoint", message, checkpoint=Path(place.path).name)
                if root == roots[0] and "never finished" in text:
                    checkpoint.remove(filesystem, place)
    if unread:
        raise OSError(f"no checkpoint could be chosen: {unread}")
    if len(roots) > 1:
        raise CheckpointError(f"{roots[1]}: no checkpoint here verifies, so there is nothing to go on from")
    return None


def require_same(found: Found, digest: str, bf16: bool, stage: TrainStage) -> None:
    """Raise CheckpointError for a checkpoint of another plan, or of the other precision.

    By another plan, rows would be repeated and skipped; DeepSpeed keeps each precision in files of its own.
    """
    path, plan, was, now = found.place.path, found.facts["plan"], found.facts["precision"], PRECISIONS[bf16]
    if plan["digest"] != digest:
        raise CheckpointError(
            f"{path}: its {sum(plan['consumed'])} rows were read in the order {plan['digest']}, this run's is "
            f"{digest}: the table or the batches have changed; put the table back, or train anew with --fresh"
        )
    if was != now:
        remedy = f"dtrpo train JOB --resume {stage.out} --set {stage.section}.precision={was}"
        raise CheckpointError(
            f"{path}: was trained in {was}, but this run uses {now} (precision auto is bf16 on a GPU, fp32 without "
            f"one); go on with {remedy}, or train anew with --fresh"
        )


def _list(filesystem: FileSystem, path: str) -> list[Place]:
    """List the checkpoints as rank 0 sees them. A collective."""
    places = checkpoint.places(filesystem, path) if ray.train.get_context().get_world_rank() == 0 else None
    return broadcast_from_rank_zero(places)


def attempt_number(root: str) -> int:
    """Return one more than any attempt that left a checkpoint here; 0 for the first. A collective."""
    return max((place.attempt + 1 for place in _list(*checkpoint.open_storage(root))), default=0)


def resume(backend: DeepSpeedBackend, found: Found | None, out: Path, other_world: bool) -> int:
    """Load the chosen checkpoint; returns its step, 0 without one. One rank of a node downloads, rank 0 converts."""
    if found is None:
        return 0
    context = ray.train.get_context()
    filesystem, _ = checkpoint.open_storage(found.root)
    folder = Path(found.place.path)
    scratch = Path(tempfile.gettempdir()) / f"dtrpo-{folder.name}-{out.name}"
    if filesystem.type_name != "local":
        folder = scratch
        if context.get_local_rank() == 0:
            checkpoint.download(filesystem, found.place.path, folder)
        barrier()
    universal = out / "universal"
    if other_world:
        if context.get_world_rank() == 0:
            shutil.rmtree(universal, ignore_errors=True)
            to_universal(folder, universal)
        barrier()
        folder = universal
    step = backend.load(folder)
    barrier()
    if context.get_local_rank() == 0:
        shutil.rmtree(scratch, ignore_errors=True)
    if context.get_world_rank() == 0:
        shutil.rmtree(universal, ignore_errors=True)
    return step


class Saver:
    """Writes checkpoints: the engine's files to local scratch, then the upload in Ray Train's background thread.

    One upload at a time: the next save waits until it is `uploaded`, so scratch holds one checkpoint and storage sets
    the pace.
    """

    def __init__(self, backend: DeepSpeedBackend, spec: RunSpec, attempt: int) -> None:
        self.backend, self.spec, self.attempt = backend, spec, attempt
        self.config, self.out = spec.config, spec.stage.out
        self.rank = ray.train.get_context().get_world_rank()
        self.world = ray.train.get_context().get_world_size()
        self.filesystem, self.path = checkpoint.open_storage(spec.roots[0])
        self.metrics: dict[str, float] = {}
        self.uploaded = threading.Event()
        self.uploaded.set()
        self.prefix = f"dtrpo-{self.out.name}-rank-{self.rank}-"
        for left in Path(tempfile.gettempdir()).glob(f"{self.prefix}*"):  # left by an attempt that was killed
            shutil.rmtree(left, ignore_errors=True)

    def save(self, step: int, at_once: bool = False) -> None:
        """Write the checkpoint of a step; `at_once` returns once it is in storage."""
        self.uploaded.wait()
        folder = Path(tempfile.mkdtemp(prefix=self.prefix))
        self.backend.save(folder, step)
        facts = self._facts(step)
        self.uploaded.clear()
        ray.train.report(
            {"step": step},
            checkpoint=Checkpoint.from_directory(str(folder)),
            checkpoint_dir_name=checkpoint.folder_name(step, self.attempt),
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=lambda local, name: self._upload(Path(local.path), name, facts),
            validation=self.config.validation is not None,
        )
        if at_once:
            self.uploaded.wait()

    def _facts(self, step: int) -> CheckpointFacts:
        stage, rows, epochs = self.spec.stage, self.spec.epoch_rows, range(self.config.num_epochs)
        consumed = [min(max(step * self.config.global_batch - epoch * rows, 0), rows) for epoch in epochs]
        return {
            "step": step,
            "num_workers": self.world,
            "zero_stage": self.config.zero_stage,
            "precision": PRECISIONS[uses_bf16(self.config.precision, self.backend.device)],
            "label": stage.label,
            "base": str(stage.base),
            "identity": dict(stage.identity),
            "config": self.config.model_dump(mode="json"),
            "seed": stage.seed,
            "plan": {"digest": self.spec.plan_digest, "consumed": consumed},
            "metrics": self.metrics,
        }

    def _upload(self, folder: Path, name: str, facts: CheckpointFacts) -> Checkpoint:
        path = f"{self.path}/{name}"
        try:
            checkpoint.write(folder, self.filesystem, path, self.rank, facts)
            self._prune()
        except OSError as error:
            message = f"checkpoint {path} could not be written: {error}"
            append_event(self.out / EVENTS, "storage error", message, rank=self.rank, step=facts["step"])
            raise
        finally:
            self.uploaded.set()
        return Checkpoint(path=path, filesystem=self.filesystem)

    def _prune(self) -> None:
        """Remove old checkpoints, on rank 0. One that cannot be removed now is tried again after the next save."""
        if self.rank != 0:
            return
        keep, best = self.config.keep_checkpoints, self.config.keep_best
        try:
            checkpoint.prune(self.filesystem, self.path, keep, best, self.config.validation is not None)
        except OSError as error:
            message = f"old checkpoints in {self.path} could not be removed: {error}"
            append_event(self.out / EVENTS, "storage error", message, rank=self.rank)
