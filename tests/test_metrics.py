"""A metrics file survives a cut-off line and a resume without a step twice."""

from pathlib import Path

from dtrpo_ray.metrics import MetricsLog, read_metrics


def test_a_half_written_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_resume_drops_what_will_come_again(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text("".join(f'{{"step": {s}}}\n' for s in range(1, 8)))
    log = MetricsLog(path, resumed_step=4)
    log.write({"step": 5})
    log.close()
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 5]
