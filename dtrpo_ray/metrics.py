"""Scalars and events of a training stage as JSON lines: written as they happen, read back for progress and the report.

Metrics are one line an optimizer step. Events are what a person wants to know in the morning: attempts, resumes,
failures, dropped steps, skipped checkpoints, drains; they are appended by several processes and never rewritten.
"""

import json
import time
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from dtrpo_ray.files import whole_file

# in the folder of a stage
METRICS, EVENTS, RUN, ERRORS, VALIDATION = "metrics.jsonl", "events.jsonl", "run.json", "errors", "validation.jsonl"

TERM_METRICS = ("grad_norm_preference", "grad_norm_nll", "grad_cosine")
"""Of the loss's two terms, on some lines only (`train.log_terms_every`)."""


class Event(TypedDict):
    """One line of events.jsonl; a kind of event may add facts, of which a status shows these."""

    time: float
    event: str
    message: str
    step: NotRequired[int]
    num_steps: NotRequired[int]
    num_workers: NotRequired[int]


class MetricsLog:
    """Appends one JSON object a line. On resume the lines after `resumed_step` are dropped: they will come again."""

    def __init__(self, path: Path, resumed_step: int = 0) -> None:
        kept = [row for row in read_metrics(path) if row["step"] <= resumed_step]
        with whole_file(path) as partial:
            partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a", buffering=1)

    def write(self, row: dict[str, float]) -> None:
        self._file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read the whole lines of a metrics file; a half-written last line is left out, a missing file is empty."""
    return [json.loads(line) for line in _whole_lines(path)]


def read_events(path: Path) -> list[Event]:
    """Read the whole lines of an events file, as `read_metrics` does."""
    return [json.loads(line) for line in _whole_lines(path)]


def _whole_lines(path: Path) -> list[str]:
    text = path.read_text() if path.exists() else ""
    return text[: text.rfind("\n") + 1].splitlines()


def append_event(path: Path, event: str, message: str, **facts: Any) -> None:
    """Append one event; a line is a single write, so processes may share the file."""
    line = json.dumps({"time": round(time.time(), 3), "event": event, "message": message, **facts}) + "\n"
    with path.open("ab", buffering=0) as file:
        file.write(line.encode())
