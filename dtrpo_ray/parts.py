"""Ray Data shell: many parts of work on a pool of actors, each part exactly once, whatever is killed in between.

A worker turns one part into files of its own names in `out` and returns a summary; the summary, written last and under
its final name at once, is what says that the part is done. A second run takes what is done as it is.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray.data

from dtrpo_ray.config import ClusterConfig
from dtrpo_ray.errors import DataError, DtrpoError
from dtrpo_ray.progress import bar, console
from dtrpo_ray.session import CPU_WORKER_ENV, uses_gpu
from dtrpo_ray.stages import read_json, write_json

DONE = "done"  # the folder of summaries

Worker = Callable[[Any, Path], dict[str, Any]]
"""(part, folder) -> {"rows": how many it read, ...}; what it writes it may write again."""


@dataclass(frozen=True, slots=True)
class Pool:
    """How to make a worker in each actor, and what an actor needs."""

    make: Callable[..., Worker]
    kwargs: dict[str, Any]
    gpu: bool = False


class _Actor:
    def __init__(self, pool: Pool, parts: Sequence[Any], out: Path) -> None:
        self.work, self.parts, self.out = pool.make(**pool.kwargs), parts, out

    def __call__(self, batch: pa.Table) -> pa.Table:
        (number,) = batch["part"].to_pylist()
        try:
            summary = self.work(self.parts[number], self.out)
        except DtrpoError as error:  # the user's to mend: another try would say the same
            return pa.table({"part": [number], "rows": [0], "error": [str(error)]})
        write_json(_summary(self.out, number), summary)
        return pa.table({"part": [number], "rows": [int(summary["rows"])], "error": pa.array([None], pa.string())})


def run_parts(parts: Sequence[Any], pool: Pool, out: Path, cluster: ClusterConfig, label: str) -> list[dict[str, Any]]:
    """The summary of every part, in order; those that are done already are not done again.

    Raises DataError with a worker's message, which names the file to mend; the other parts' work is kept.
    """
    (out / DONE).mkdir(parents=True, exist_ok=True)
    open_parts = [number for number in range(len(parts)) if not _summary(out, number).exists()]
    began, rows = time.perf_counter(), 0
    gpu = pool.gpu and uses_gpu(cluster)
    with bar() as progress:
        task = progress.add_task(label, total=len(open_parts), note="", visible=console.is_terminal)
        for row in _results(open_parts, parts, pool, out, cluster, gpu):
            if row["error"] is not None:
                raise DataError(row["error"])
            rows += row["rows"]
            progress.update(task, advance=1, note=f"{rows / (time.perf_counter() - began):,.0f} rows/s")
    seconds = time.perf_counter() - began
    done = len(parts) - len(open_parts)
    kept = f", {done} part(s) were done before" if done else ""
    console.print(f"{label}: {rows:,} rows in {seconds:.1f} s ({rows / seconds:,.0f} rows/s){kept}", highlight=False)
    return [read_json(_summary(out, number)) for number in range(len(parts))]


def _results(
    open_parts: list[int], parts: Sequence[Any], pool: Pool, out: Path, cluster: ClusterConfig, gpu: bool
) -> Any:
    if not open_parts:
        return ()
    source = ray.data.from_arrow([pa.table({"part": [number]}) for number in open_parts])
    return source.map_batches(
        _Actor,
        fn_constructor_kwargs={"pool": pool, "parts": parts, "out": out.resolve()},
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(cluster.num_actors, len(open_parts))),
        num_cpus=1,
        num_gpus=1 if gpu else 0,
        runtime_env={"env_vars": {} if gpu else CPU_WORKER_ENV},
    ).iter_rows()


def _summary(out: Path, number: int) -> Path:
    return out / DONE / f"{number:06d}.json"
