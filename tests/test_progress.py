import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from dtrpo_ray import progress


def test_events_and_rows_are_printed_as_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker's message may hold what rich would take for markup: the source paths in gloo's errors do."""
    screen = StringIO()
    monkeypatch.setattr(progress, "console", Console(file=screen, width=200))
    metrics, events = tmp_path / "metrics.jsonl", tmp_path / "events.jsonl"
    events.write_text(json.dumps({"message": "of an earlier run"}) + "\n")
    with progress.watch(metrics, "train", 10, events):
        with events.open("a") as lines:
            lines.write(json.dumps({"message": "worker lost: [/pytorch/gloo/pair.cc:537] closed [bold]"}) + "\n")
        metrics.write_text(json.dumps({"step": 5, "loss": 0.5}) + "\n")
    assert screen.getvalue().splitlines() == [
        "train: worker lost: [/pytorch/gloo/pair.cc:537] closed [bold]",
        "train: step 5/10  loss 0.500",
    ]
