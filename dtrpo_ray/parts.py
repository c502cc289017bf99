"""A resumable map on Ray Data: every part of the work completes exactly once, even if workers die.

A worker turns a part into files named after it and returns a summary. The summary, renamed into `done/` after all
else is written, marks the part as done; a second run takes it as it is.
"""

import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import ray.data

from dtrpo_ray.config.cluster import ClusterConfig
from dtrpo_ray.errors import DataError, DtrpoError
from dtrpo_ray.files import read_json, write_json
from dtrpo_ray.progress import bar, console
from dtrpo_ray.session import CPU_WORKER_ENV, uses_gpu

DONE = "done"  # the folder of the summaries, and of files with one dot for each try of a part
TRIES = 3  # of a part whose workers die
PLAIN_SECONDS = 30  # between lines of progress without a terminal

Part = TypeVar("Part")
Summary = TypeVar("Summary", bound=Mapping[str, object])
Worker = Callable[[Part, Path], Summary]
"""(part, folder) -> {"rows": the number of rows it read, ...}. Writing a part again gives the same files."""
Maker = Callable[[], Worker[Part, Summary]]


class _Actor:
    """A process that makes its worker at the first part, so that a failure to make it is reported like any other."""

    def __init__(self, make: Maker[Any, Any], parts: Sequence[Any], out: Path) -> None:
        self.make, self.parts, self.out = make, parts, out

    @cached_property
    def work(self) -> Worker[Any, Any]:
        return self.make()

    def __call__(self, batch: pa.Table) -> pa.Table:
        (number,) = batch["part"].to_pylist()
        part, rows, error = self.parts[number], 0, None
        try:
            with (tries := _file(self.out, number, "tries")).open("a") as dots:
                dots.write(".")
            if tries.stat().st_size > TRIES:
                raise DataError(f"{part}: {TRIES} workers died on it; check its data, or give workers more memory")
            summary = self.work(part, self.out)
            write_json(_file(self.out, number, "json"), summary)
            rows = int(summary["rows"])
        except DtrpoError as problem:  # the user must mend it: another try would fail too
            error = str(problem)
        except OSError as problem:
            error = f"{part}: {problem} (output: {self.out}). Fix this and run the same command again"
        except Exception as problem:
            traceback.print_exc()  # in the worker's log
            kind, advice = type(problem).__name__, "a bug: the worker's log has the traceback"
            if kind in ("MemoryError", "OutOfMemoryError"):  # Python's, torch's
                advice = "smaller batches, fewer cluster.num_actors, or more memory"
            error = f"{part}: {kind}: {problem}; {advice}"
        return pa.table({"rows": [rows], "error": pa.array([error], pa.string())})


def run_parts(
    parts: Sequence[Part], make: Maker[Part, Summary], out: Path, cluster: ClusterConfig, label: str, gpu: bool = False
) -> list[Summary]:
    """Do the parts that are not done yet; return the summaries of all, in order.

    Raises DataError with a worker's message, or naming a part on which workers died; finished parts are kept.
    """
    (out / DONE).mkdir(parents=True, exist_ok=True)
    left = [number for number in range(len(parts)) if not _file(out, number, "json").exists()]
    for file in out.glob("*.partial"):  # of workers that were killed
        file.unlink()
    for number in left:
        _file(out, number, "tries").unlink(missing_ok=True)
    began = printed = time.perf_counter()
    rows = 0
    with bar() as progress:
        task = progress.add_task(label, total=len(left), note="", visible=console.is_terminal)
        actor = {"make": make, "parts": parts, "out": out.resolve()}
        for done, (read, error) in enumerate(_outcomes(left, actor, cluster, gpu and uses_gpu(cluster)), 1):
            if error is not None:
                raise DataError(error)
            rows, now = rows + read, time.perf_counter()
            speed = f"{rows / (now - began):,.0f} rows/s"
            progress.update(task, advance=1, note=speed)
            if not console.is_terminal and now - printed > PLAIN_SECONDS:
                printed, wait = now, (now - began) / done * (len(left) - done)
                console.print(f"{label}: part {done}/{len(left)}  {speed}  {wait:.0f} s left", highlight=False)
    seconds = time.perf_counter() - began
    kept = f", {len(parts) - len(left)} part(s) were done before" if len(left) < len(parts) else ""
    console.print(f"{label}: {rows:,} rows in {seconds:.1f} s ({rows / seconds:,.0f} rows/s){kept}", highlight=False)
    return [read_json(_file(out, number, "json")) for number in range(len(parts))]


def _outcomes(
    left: list[int], actor: dict[str, Any], cluster: ClusterConfig, gpu: bool
) -> Iterator[tuple[int, str | None]]:
    """Yield the rows and the error of each part as it is done."""
    if not left:
        return
    source = ray.data.from_arrow([pa.table({"part": [number]}) for number in left])
    done = source.map_batches(
        _Actor,
        fn_constructor_kwargs=actor,
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(cluster.num_actors, len(left))),
        num_cpus=1,
        num_gpus=1 if gpu else 0,
        runtime_env={"env_vars": {} if gpu else CPU_WORKER_ENV},
    )
    done.context.enable_progress_bars = False  # ours counts rows
    yield from ((row["rows"], row["error"]) for row in done.iter_rows())


def _file(out: Path, number: int, kind: str) -> Path:
    """Return a part's summary, "json", or its file of dots, "tries"."""
    return out / DONE / f"{number:06d}.{kind}"
