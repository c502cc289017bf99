"""The benchmark of the pipelines: the same work both ways, and what is watched is the session's memory."""

import os
from pathlib import Path

import pytest

from benchmarks import data
from dtrpo_ray.data.schemas import PREFERENCE, TRAJECTORY
from dtrpo_ray.data.tables import read_table

pytestmark = pytest.mark.extra


@pytest.mark.ray
def test_memory_is_of_the_session_and_the_page_tells_all(tmp_path: Path) -> None:
    peaks = data.memory_in_a_process(80, 0.02)
    assert [row["pipeline"] for row in peaks] == ["prepare", "score", "pair"]
    assert all(row["rss_mb"] > 200 for row in peaks)  # Ray and two actors, with transformers
    ways = {"one process": 10.0, "1 worker": 9.0, "2 workers": 18.0}
    row = {"pipeline": "pair", "rows": 5, "parts": 2, "ray_overhead_us_per_row": 12.0}
    row |= {"rows_per_second": ways, "start_seconds": ways, "all_seconds": ways}
    value = {"machine": "2 CPU cores", "rounds": 1, "speed": [row], "object_store_mb": 80, "memory": {"1": peaks}}
    page = data.text(value)
    assert "| pair | 5 | 2 | 10 | 9 | 18 | 1.80 | 12 us a row |" in page
    assert page.count("| prepare |") == 1


def test_shared_memory_counts_once() -> None:
    peaks: dict[str, float] = {}
    with data.watched(peaks):
        while not peaks:
            pass
    everything, _ = data.resident(Path(f"/proc/{os.getpid()}"))
    assert peaks["rss_mb"] > 0.8 * everything
    assert data.resident(Path("/proc/none")) == (0.0, 0.0)


@pytest.mark.usefixtures("local_ray")
def test_every_pipeline_runs_and_both_ways_write_the_same_rows(tmp_path: Path) -> None:
    ran = {}
    for pipeline in data.pipelines(tmp_path, rows=64, model_rows=16):
        if pipeline.name not in ("pair", "rollout"):  # actors take seconds to start
            done = data.loop(pipeline.parts, pipeline.make, tmp_path / pipeline.name)
            ran[pipeline.name] = sum(part["rows"] for part in done)
            continue
        ran[pipeline.name] = data.compare(pipeline, tmp_path, rounds=1)["rows"]
        names = [pipeline.name, f"{pipeline.name}-0-1", f"{pipeline.name}-0-2"]
        schema = PREFERENCE if pipeline.name == "pair" else TRAJECTORY
        kept = [name for name in schema.names if name != "logps"]  # whose last bits are those of torch's threads
        one, *others = (read_table(tmp_path / name, schema).select(kept) for name in names)
        assert all(one.equals(other) for other in others)
    assert ran == {"prepare": 64, "score": 64, "pair": 64, "rollout": 16, "ref-logps": 16}
    assert set(read_table(tmp_path / "score", TRAJECTORY)["reward"].to_pylist()) == {0.0, 1.0}
    assert len(read_table(tmp_path / "pair", PREFERENCE)) == 16  # a pair of each prompt
