"""The folder of a training stage -> its status: running, cut off or finished; checkpoints; what went wrong so far.

Reads files only, so it works while the run is live, after it, and where neither Ray nor torch is installed.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dtrpo_ray.errors import CheckpointError, DataError
from dtrpo_ray.metrics import EVENTS, METRICS, RUN, TERM_METRICS, Event, read_events, read_metrics
from dtrpo_ray.stages import MANIFEST
from dtrpo_ray.train import checkpoint
from dtrpo_ray.train.run import RunRecord

QUIET_SECONDS = 300  # a run that wrote nothing for so long, and for the time of three metric lines, was cut off
SHOWN_EVENTS = 10


@dataclass(frozen=True, slots=True)
class CheckpointStatus:
    """A checkpoint: whole, or with the `problem` that makes it unusable; `validation` holds its metrics."""

    path: str
    step: int
    num_workers: int | None
    problem: str | None
    validation: dict[str, float]

    def text(self) -> str:
        """Return one line for people."""
        state = self.problem or f"whole, written by {self.num_workers} worker(s)"
        measured = "".join(f", {name} {number:.4g}" for name, number in self.validation.items())
        return f"checkpoint {Path(self.path).name}: {state}{measured}"


@dataclass(frozen=True, slots=True)
class RunStatus:
    """A training run as its files show it. `counts` are of events by kind.

    `metrics` are the last row, and those of the loss's two terms from the last row that has them.
    """

    run: str
    label: str
    state: Literal["finished", "running", "cut off"]
    quiet_seconds: float
    step: int
    num_steps: int | None
    num_workers: int | None
    attempts: int
    counts: dict[str, int]
    metrics: dict[str, float]
    checkpoints: list[CheckpointStatus]
    events: list[Event]

    def text(self) -> str:
        """Return the status for people."""
        total = f" of {self.num_steps}" if self.num_steps else ""
        head = f"{self.label}: {self.state}, step {self.step}{total}, {self.attempts} attempt(s)"
        head += f", last sign of life {self.quiet_seconds:.0f} s ago" if self.state != "finished" else ""
        shown = [
            f"{name} {number:.4g}"
            for name, number in self.metrics.items()
            if name not in ("step", "seconds") and "_place_" not in name
        ]
        lines = [head, "  " + "  ".join(shown), *(f"  {item.text()}" for item in self.checkpoints)]
        for event in self.events:
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"]))
            lines.append(f"  {when}  {event['message']}")
        return "\n".join(lines)


def read_status(run: Path, check: bool = False) -> RunStatus:
    """Read the status of a run; `check` reads every byte of every checkpoint instead of its COMPLETE alone.

    Raises DataError where the folder is no training stage.
    """
    record = RunRecord.read(run)
    if record is None:
        raise DataError(f"{run}: not a training stage (no readable {RUN}); name a folder of STORAGE/stages")
    rows, events = read_metrics(run / METRICS), read_events(run / EVENTS)
    starts = [event for event in events if event["event"] in ("start", "resume")]
    quiet = time.time() - max((f.stat().st_mtime for f in (run / METRICS, run / EVENTS) if f.exists()), default=0)
    kinds = [event["event"] for event in events]
    return RunStatus(
        run=str(run),
        label=record.label,
        state="finished" if (run / MANIFEST).exists() else "running" if quiet < _quiet_limit(rows) else "cut off",
        quiet_seconds=round(quiet, 1),
        step=int(rows[-1]["step"]) if rows else 0,
        num_steps=starts[-1].get("num_steps") if starts else None,
        num_workers=starts[-1].get("num_workers") if starts else None,
        attempts=len(starts),
        counts={kind: kinds.count(kind) for kind in sorted(set(kinds))},
        metrics={**_newest_terms(rows), **rows[-1]} if rows else {},
        checkpoints=_checkpoints(checkpoint.root_of(run, record.checkpoints), check),
        events=events[-SHOWN_EVENTS:],
    )


def _newest_terms(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: row[name] for row in rows for name in TERM_METRICS if name in row}


def _quiet_limit(rows: list[dict[str, float]]) -> float:
    if len(rows) < 2:
        return QUIET_SECONDS
    return max(QUIET_SECONDS, 3 * (rows[-1]["step"] - rows[-2]["step"]) * rows[-1].get("step_seconds", 0))


def _checkpoints(root: str, check: bool) -> list[CheckpointStatus]:
    filesystem, path = checkpoint.open_storage(root)
    found = []
    for place in checkpoint.places(filesystem, path):
        try:
            facts = (checkpoint.verify if check else checkpoint.facts_of)(filesystem, place)
            workers, problem = facts["num_workers"], None
        except (CheckpointError, OSError) as error:
            workers, problem = None, str(error)
        measured = checkpoint.validation_of(filesystem, place) or {}
        found.append(CheckpointStatus(place.path, place.step, workers, problem, measured))
    return found
