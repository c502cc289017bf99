"""A training run: its inputs, what each of its workers is given, and its record on disk (run.json).

Needs neither torch nor ray, so `dtrpo status` reads a record anywhere.
"""

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from dtrpo_ray.config.cluster import ClusterConfig, NumWorkers
from dtrpo_ray.config.train import TrainConfig
from dtrpo_ray.errors import CheckpointError
from dtrpo_ray.metrics import ERRORS, RUN
from dtrpo_ray.train import checkpoint

NO_WEIGHTS = frozenset(
    {"log_every", "log_terms_every", "save_every", "keep_checkpoints", "keep_best", "on_nonfinite", "validation"}
)
"""Fields of a training section that change no weight."""
MAY_CHANGE = NO_WEIGHTS | {"micro_batch", "micro_tokens"}
"""Fields that a resumed run may set to other values; the two more only change the order of sums."""


@dataclass(frozen=True, slots=True)
class TrainStage:
    """The inputs of a training stage and the folder it writes; the driver and all workers see every path.

    `identity` holds the hashes of base and table. `resume_from` is the folder of another run to go on from.
    """

    label: str
    base: Path
    table: Path
    out: Path
    seed: int
    identity: Mapping[str, str] = field(default_factory=dict)
    resume_from: Path | None = None
    cache: Path | None = None
    """A folder of the base's log-probs (`reference`); absent: the workers compute them."""
    workers: Mapping[str, NumWorkers] = field(default_factory=dict)
    """`cluster.num_workers` that names each training stage up to this one, for a run that goes on from it."""

    @property
    def section(self) -> str:
        """The job section that holds the stage's settings."""
        return "sft" if self.label == "base" else "train"


@dataclass(frozen=True, slots=True)
class RunSpec:
    """Everything a worker needs to know of its run; pickled from the driver to each rank.

    `roots` are the checkpoint folders to resume from, the run's own first. `plan_digest` names the order of rows, and
    `epoch_rows` is the number of rows in an epoch.
    """

    stage: TrainStage
    config: TrainConfig
    cluster: ClusterConfig
    roots: tuple[str, ...]
    num_steps: int
    plan_digest: str
    epoch_rows: int


class RunRecord(BaseModel):
    """run.json in a stage's folder: what `dtrpo status` shows, and what `--resume` compares."""

    model_config = ConfigDict(frozen=True)

    config: dict[str, Any]
    seed: int
    identity: dict[str, str]
    label: str
    checkpoints: str
    workers: dict[str, NumWorkers]

    @classmethod
    def of(cls, stage: TrainStage, config: TrainConfig, root: str) -> "RunRecord":
        """Describe a run whose checkpoints are in `root`."""
        of_stage = {name: getattr(stage, name) for name in ("seed", "identity", "label", "workers")}
        return cls(config=config.model_dump(mode="json"), checkpoints=root, **of_stage)

    @classmethod
    def read(cls, folder: Path) -> "RunRecord | None":
        """Read the record of a stage's folder; None where no readable one is."""
        try:
            return cls.model_validate_json((folder / RUN).read_bytes())
        except (OSError, ValueError):
            return None

    def write(self, folder: Path) -> None:
        """Write run.json and delete the errors of an earlier driver."""
        shutil.rmtree(folder / ERRORS, ignore_errors=True)
        (folder / RUN).write_text(json.dumps(self.model_dump(mode="json"), indent=2) + "\n")

    def changes(self, new: "RunRecord", section: str) -> list[str]:
        """Return a line for each setting that a resumed run must keep and `new` changes; `section` is the job's.

        A field that came after this run counts as its default.
        """
        fields = {"config", "seed", "identity"}
        before = self.model_dump(include=fields)
        with suppress(ValidationError):  # a field that is gone since: compare what was written
            before["config"] = TrainConfig.model_validate(self.config).model_dump(mode="json")
        lines: list[str] = []

        def compare(name: str, was: Any, now: Any) -> None:
            if name.removeprefix("config.") in MAY_CHANGE or (name == "config.precision" and "auto" in (was, now)):
                return  # the checkpoint knows which precision "auto" was (`recovery.require_same`)
            if isinstance(was, dict) and isinstance(now, dict):
                for key in sorted({*was, *now}):
                    compare(f"{name}.{key}" if name else key, was.get(key), now.get(key))
            elif was != now:
                shown = name.replace("config.", f"{section}.").replace("identity.", "")
                lines.append(f"  {shown}: {was!r} then, {now!r} now")

        compare("", before, new.model_dump(include=fields))
        return lines


def resume_root(stage: TrainStage, config: TrainConfig) -> str | None:
    """Return the checkpoint folder of the run to go on from, None for a run that starts anew.

    Raises CheckpointError naming every setting that must not change.
    """
    if stage.resume_from is None:
        return None
    old = RunRecord.read(stage.resume_from)
    if old is None:
        raise CheckpointError(f"--resume {stage.resume_from}: no readable {RUN}; name a training stage's folder")
    if changes := old.changes(RunRecord.of(stage, config, ""), stage.section):
        lines = "\n".join(changes)
        may = ", ".join(f"{stage.section}.{name}" for name in sorted(MAY_CHANGE))
        raise CheckpointError(
            f"--resume {stage.resume_from}: these settings differ from that run:\n{lines}\n"
            f"restore them, or start again without --resume. These may differ: {may}, and all of [cluster]"
        )
    root = checkpoint.root_of(stage.resume_from.resolve(), old.checkpoints)
    checkpoint.require_any(root)
    return root
