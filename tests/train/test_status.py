"""How a run stands, from its files alone."""

import json
import os
import time
from pathlib import Path

import pytest

from dtrpo_ray.config.train import TrainConfig
from dtrpo_ray.errors import DataError
from dtrpo_ray.metrics import EVENTS, METRICS, TERM_METRICS, append_event
from dtrpo_ray.stages import MANIFEST
from dtrpo_ray.train import checkpoint
from dtrpo_ray.train.run import RunRecord, TrainStage
from dtrpo_ray.train.status import read_status
from tests.train.test_checkpoint import write


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two attempts with a whole checkpoint at step 4 and an unfinished one at step 6."""
    run = tmp_path / "train-1-abc.partial"
    run.mkdir()
    stage = TrainStage("train-1", tmp_path, tmp_path, run, 0)
    RunRecord.of(stage, TrainConfig(), str(run / "checkpoints")).write(run)
    (run / METRICS).write_text("".join(f'{{"step": {s}, "loss": 0.5, "seconds": 9.0}}\n' for s in range(1, 6)))
    append_event(run / EVENTS, "start", "step 0 of 8 on 2 worker(s)", step=0, num_steps=8, num_workers=2)
    append_event(run / EVENTS, "failure", "worker 1 failed: boom", rank=1, failure=1)
    append_event(run / EVENTS, "resume", "resumed at step 4 of 8", step=4, num_steps=8, num_workers=1)
    write(tmp_path, str(run / "checkpoints"), 4)
    write(tmp_path, str(run / "checkpoints"), 6, ranks=1)
    return run


def test_a_live_run(run: Path) -> None:
    value = read_status(run)
    assert (value.state, value.step, value.num_steps, value.num_workers) == ("running", 5, 8, 1)
    assert (value.attempts, value.counts) == (2, {"failure": 1, "resume": 1, "start": 1})
    assert [(c.step, bool(c.problem)) for c in value.checkpoints] == [(6, True), (4, False)]
    text = value.text()
    assert "train-1: running, step 5 of 8, 2 attempt(s)" in text
    assert "step-00000006: " in text
    assert "worker 1 failed: boom" in text


def test_the_terms_shown_are_the_newest_whichever_line_they_are_on(run: Path) -> None:
    rows = [
        {"step": step, "loss": 0.5} | {name: float(step) for name in TERM_METRICS if step < 3} for step in (1, 2, 3)
    ]
    (run / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_status(run).metrics == {"step": 3, "loss": 0.5} | dict.fromkeys(TERM_METRICS, 2.0)
    assert "grad_cosine 2" in read_status(run).text()


def test_a_run_that_went_quiet_was_cut_off(run: Path) -> None:
    old = time.time() - 3600
    for name in (METRICS, EVENTS):
        os.utime(run / name, (old, old))
    value = read_status(run)
    assert value.state == "cut off"
    assert value.quiet_seconds == pytest.approx(3600, abs=60)


def test_a_run_of_rare_lines_is_not_cut_off_between_them(run: Path) -> None:
    rows = [{"step": step, "loss": 0.5, "step_seconds": 60.0} for step in (10, 20)]  # a line each ten minutes
    (run / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for age, state in ((1500, "running"), (2000, "cut off")):
        for name in (METRICS, EVENTS):
            os.utime(run / name, (time.time() - age,) * 2)
        assert read_status(run).state == state


def test_a_finished_run_has_moved_with_its_checkpoints(run: Path) -> None:
    done = run.rename(run.with_name("train-1-abc"))
    (done / MANIFEST).write_text("{}")
    value = read_status(done)
    assert value.state == "finished"
    assert len(value.checkpoints) == 2


def test_checking_reads_every_byte(run: Path) -> None:
    file = run / "checkpoints" / checkpoint.folder_name(4, 0) / "deepspeed" / "optim-1.pt"
    file.write_bytes(b"\x02" * file.stat().st_size)
    assert read_status(run).checkpoints[1].problem is None
    assert "has changed" in read_status(run, check=True).checkpoints[1].problem


def test_another_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a training stage"):
        read_status(tmp_path)
