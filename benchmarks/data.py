"""Compare the pipelines on Ray Data with one process that runs the same workers over the same parts in a loop.

Workers read and write with pyarrow in both cases, so the difference is Ray's overhead. Each part records when it began
and ended. This separates the time until the first part (actors, imports, models) from the time of the rows. `memory`
runs a pipeline on tables many times larger than the object store and watches every process of the session.
"""

import json
import os
import pickle
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from dtrpo_ray.config.cluster import ClusterConfig
from dtrpo_ray.config.produce import PairConfig, ScoreConfig
from dtrpo_ray.config.task import TrajectoriesTask
from dtrpo_ray.config.train import Objective, TrainConfig
from dtrpo_ray.data import prepare
from dtrpo_ray.data.pairs import Pairer
from dtrpo_ray.data.schemas import CONTRACT_VERSION, TRAJECTORY, TrajectoryRow
from dtrpo_ray.data.tables import file_parts, prompt_parts, table_files
from dtrpo_ray.decode.types import SamplingParams
from dtrpo_ray.models.registry import build_model, save_model
from dtrpo_ray.models.tokenizer import character_tokenizer
from dtrpo_ray.parts import run_parts
from dtrpo_ray.produce.rollout import DecodeJob, Recorder, request_parts
from dtrpo_ray.produce.scoring import Scorer
from dtrpo_ray.session import CPU_WORKER_ENV, ray_session
from dtrpo_ray.train.reference import ReferenceScorer, epoch_parts

SAMPLES = 4  # responses per prompt
PARTS = 8  # per pipeline, enough for two workers to share
ALPHABET = "0123456789 abcdefghijklmnopqrstuvwxyz+=#"
CHARS = (64, 128)  # characters of a prompt and of a response; each character is a token
TOKENS = 32  # decoded per response of a rollout
FILE_ROWS = 2_000  # rows per file of the table in `memory`
SEED = 0


@dataclass(frozen=True, slots=True)
class Pipeline:
    """The parts of one verb, and a function that makes its worker; a worker uses one torch thread."""

    name: str
    parts: Sequence[Any]
    make: Callable[[], Any]


class Timed:
    """Wraps a worker and records when each part began and ended."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.work = make()

    def __call__(self, part: Any, out: Path) -> dict[str, Any]:
        began = time.time()
        return {**self.work(part, out), "began": began, "ended": time.time()}


# --- generated inputs ---


def write_base(folder: Path) -> Path:
    """Write a tiny model in the SDAR layout with a character tokenizer."""
    tokenizer = character_tokenizer(ALPHABET)
    config = {
        "model_type": "sdar", "architectures": ["SDARForCausalLM"], "vocab_size": 48, "hidden_size": 64,
        "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 32, "block_size": 8, "mask_token_id": tokenizer.mask_token_id,
        "eos_token_id": tokenizer.eos_token_id, "tie_word_embeddings": False, "rope_theta": 10000.0,
        "max_position_embeddings": 4096,
    }  # fmt: skip
    folder.mkdir()
    tokenizer.save_pretrained(folder)
    save_model(build_model(config, SEED), folder)
    return folder


def write_responses(file: Path, rows: int, number: int = 0, more_chars: int = 0) -> None:
    """Write `rows` responses as JSONL, SAMPLES per prompt; a third of them are right.

    An extra column holds `more_chars` characters. Each `number` gives other prompts.
    """
    rng, letters = np.random.default_rng(number), np.array(list(ALPHABET[10:37]))
    with file.open("w") as out:
        for first in range(0, rows, SAMPLES):
            prompt = f"{number} {first} " + "".join(rng.choice(letters, CHARS[0]))
            for i in range(first, min(first + SAMPLES, rows)):
                response = "".join(rng.choice(letters, CHARS[1] - 8)) + f"#### {i % 3}"
                row = {"prompt": prompt, "response": response, "answer": "1", "notes": "x" * more_chars}
                out.write(json.dumps(row) + "\n")


def write_trajectories(folder: Path, arrow_bytes: int) -> int:
    """Write a table of at least `arrow_bytes` in memory, ten responses per prompt; return its number of bytes."""
    folder.mkdir()
    rng, written, first = np.random.default_rng(SEED), 0, 0
    while written < arrow_bytes:
        table = trajectories(rng, first, FILE_ROWS)
        pq.write_table(table, folder / f"part-{first:09d}.parquet")
        written, first = written + table.nbytes, first + FILE_ROWS
    return written


def trajectories(rng: np.random.Generator, first: int, count: int) -> pa.Table:
    """Return rows of 512 tokens that pass the rules of trajectory/v1, with random rewards 0 and 1."""
    same = {
        "contract_version": CONTRACT_VERSION, "block_size": 8, "block_origin": "global", "mask_id": 41, "shift": 0,
        "prompt_ids": [1] * 8, "response": "x" * 504 + "#### 1", "answer": "1", "reward_source": "bench",
        "engine": "bench",
    }  # fmt: skip
    columns: dict[str, Any] = {name: [value] * count for name, value in same.items()}
    columns["row_id"] = [f"{first + i:09d}" for i in range(count)]
    columns["prompt_id"] = columns["prompt"] = [row_id[:-1] for row_id in columns["row_id"]]
    columns["reward"] = rng.integers(0, 2, count).astype(float)
    columns["response_ids"] = list(rng.integers(0, 37, (count, 512), dtype=np.int32))
    return pa.table({name: columns.get(name, pa.nulls(count)) for name in TRAJECTORY.names}).cast(TRAJECTORY)


# --- the pipelines; each reads the output of the one before ---


def importer(files: list[Path], base: Path) -> tuple[Sequence[Any], Callable[[], Any]]:
    """Return the parts of prepare for files of responses, and the function that makes its worker."""
    task = TrajectoriesTask.model_validate({"type": "trajectories", "files": [str(file) for file in files]})
    grid = {"block_size": 8, "block_origin": "global", "shift": 0}
    hashes = dict.fromkeys(task.files, "bench")
    return prepare.import_parts(task), partial(prepare.Importer, prepare.ImportJob(task, base.resolve(), grid, hashes))


def pipelines(folder: Path, rows: int, model_rows: int) -> Iterator[Pipeline]:
    """Yield the pipelines. The caller runs each one, into `folder / NAME`, before it asks for the next."""
    base, sharers = write_base(folder / "base"), os.cpu_count() or 1
    (folder / "in").mkdir()
    for number in range(PARTS):
        write_responses(folder / "in" / f"{number}.jsonl", rows // PARTS, number)
    parts, make = importer(sorted((folder / "in").glob("*.jsonl")), base)
    yield Pipeline("prepare", parts, make)
    yield Pipeline("score", file_parts(files_of(folder, "prepare")), partial(Scorer, GSM8K))
    by_prompt = prompt_parts(files_of(folder, "score"), rows // PARTS)
    yield Pipeline("pair", by_prompt, partial(Pairer, PairConfig()))
    prompts = [
        TrajectoryRow(row_id=f"{i:06d}", prompt_id=f"{i:06d}", prompt="1 plus 1 is", denoising_steps=4)
        for i in range(model_rows)
    ]
    batch = max(1, model_rows // PARTS)
    job = DecodeJob(
        base.resolve(), "bench", SamplingParams(max_new_tokens=TOKENS, denoising_steps=4, temperature=1.0), batch, SEED
    )
    yield Pipeline("rollout", request_parts(prompts, batch), partial(Recorder, job, sharers))
    config = TrainConfig(
        objective=Objective(schedule="random"), global_batch=8, micro_batch=8, max_steps=model_rows // 8
    )
    known = (base.resolve(), config, SEED, "bench")
    pairs = epoch_parts(files_of(folder, "pair"), config, SEED)
    yield Pipeline("ref-logps", pairs, partial(ReferenceScorer, *known, sharers))


GSM8K = ScoreConfig(scorer="gsm8k")


def files_of(folder: Path, name: str) -> list[Path]:
    """Return the files that a pipeline wrote."""
    return [file.resolve() for file in table_files(folder / name)]


# --- speed ---


def loop(parts: Sequence[Any], make: Callable[[], Any], out: Path) -> list[dict[str, Any]]:
    """Do all parts in this process."""
    out.mkdir()
    work = make()
    return [work(part, out) for part in parts]


def in_a_process(parts: Sequence[Any], make: Callable[[], Any], out: Path) -> list[dict[str, Any]]:
    """Run `loop` in a new process, with the environment of an actor."""
    with tempfile.NamedTemporaryFile() as task, tempfile.NamedTemporaryFile() as done:
        Path(task.name).write_bytes(pickle.dumps((parts, make, out)))
        words = [sys.executable, "-m", "benchmarks.data", "loop", task.name, done.name]
        subprocess.run(words, check=True, env={**os.environ, **CPU_WORKER_ENV})
        summaries: list[dict[str, Any]] = json.loads(Path(done.name).read_text())
    return summaries


def timed(run: Callable[[], list[dict[str, Any]]]) -> dict[str, float]:
    """Return rows, and seconds until the first part began, of the parts, and in total."""
    asked = time.time()
    done = run()
    ended = time.time()
    first, last = min(part["began"] for part in done), max(part["ended"] for part in done)
    rows = sum(part["rows"] for part in done)
    return {"rows": rows, "start": first - asked, "work": last - first, "all": ended - asked}


def compare(pipeline: Pipeline, folder: Path, rounds: int) -> dict[str, Any]:
    """Run one process, and Ray with one and two workers, in turn; return medians over the rounds."""
    found: dict[str, list[dict[str, float]]] = {"one process": [], "1 worker": [], "2 workers": []}
    for number in range(rounds):
        for workers, (way, times) in enumerate(found.items()):
            out = folder / (pipeline.name if number == workers == 0 else f"{pipeline.name}-{number}-{workers}")
            make = partial(Timed, pipeline.make)
            if workers == 0:
                run = partial(in_a_process, pipeline.parts, make, out)
            else:
                run = partial(run_parts, pipeline.parts, make, out, ClusterConfig(num_actors=workers), way)
            times.append(timed(run))
    ways = {
        way: {key: statistics.median(time[key] for time in times) for key in times[0]} for way, times in found.items()
    }
    rows, alone = ways["one process"]["rows"], ways["one process"]["work"]
    return {
        "pipeline": pipeline.name,
        "rows": rows,
        "parts": len(pipeline.parts),
        "rows_per_second": {way: rows / times["work"] for way, times in ways.items()},
        "start_seconds": {way: times["start"] for way, times in ways.items()},
        "all_seconds": {way: times["all"] for way, times in ways.items()},
        "ray_overhead_us_per_row": 1e6 * (ways["1 worker"]["work"] - alone) / rows,
    }


# --- memory ---


def descendants() -> list[Path]:
    """Return the /proc folders of this process and of all its descendants, which include the Ray session."""
    parents: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):  # the process has ended
            continue
        parents.setdefault(parent, []).append(int(status.parent.name))
    found = [os.getpid()]
    for pid in found:
        found += parents.get(pid, [])
    return [Path(f"/proc/{pid}") for pid in found]


def resident(process: Path) -> tuple[float, float]:
    """Return (all, shared) resident megabytes of a process, or zeros if it has ended."""
    try:
        lines = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    except OSError:
        return 0.0, 0.0
    kilobytes = [int(lines.get(name, "0").split()[0]) for name in ("VmRSS", "RssShmem")]
    return kilobytes[0] / 1e3, kilobytes[1] / 1e3


@contextmanager
def watched(peaks: dict[str, float]) -> Iterator[None]:
    """Record peaks of the session in `peaks`: resident memory over all processes, and the object store.

    Shared pages count once: the largest shared memory of any process is taken as the object store.
    """
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.2):
            memory = [resident(process) for process in descendants()]
            store = max(shared for _, shared in memory)
            total = sum(everything - shared for everything, shared in memory) + store
            peaks["rss_mb"] = max(peaks.get("rss_mb", 0.0), total)
            peaks["object_store_mb"] = max(peaks.get("object_store_mb", 0.0), store)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def memory(folder: Path, store_mb: int, times: float) -> list[dict[str, Any]]:
    """Return the peaks of prepare, score and pair on inputs of `times` object stores, with two workers."""
    base, size = write_base(folder / "base"), int(store_mb * 1e6 * times)
    (folder / "in").mkdir()
    write_responses(folder / "in" / "0.jsonl", max(SAMPLES, size // 4_000), more_chars=4_000 - sum(CHARS))
    table_bytes = write_trajectories(folder / "table", size)
    files = files_of(folder, "table")
    parts, make = importer([folder / "in" / "0.jsonl"], base)
    runs = [("prepare", (folder / "in" / "0.jsonl").stat().st_size, parts, make)]
    runs.append(("score", table_bytes, file_parts(files), partial(Scorer, GSM8K)))
    runs.append(("pair", table_bytes, prompt_parts(files, FILE_ROWS), partial(Pairer, PairConfig())))
    cluster, found = ClusterConfig(num_actors=2), []
    with ray_session(cluster, int(store_mb * 1e6)):
        for name, input_bytes, parts, make in runs:
            peaks: dict[str, float] = {}
            with watched(peaks):
                done = run_parts(parts, make, folder / name, cluster, name)
            rows = sum(part["rows"] for part in done)
            found.append({"pipeline": name, "input_mb": input_bytes / 1e6, "rows": rows, **peaks})
    return found


def memory_in_a_process(store_mb: int, times: float) -> list[dict[str, Any]]:
    """Run `memory` in a new process, so that no other work adds to its memory."""
    with tempfile.TemporaryDirectory() as folder, tempfile.NamedTemporaryFile() as done:
        words = [sys.executable, "-m", "benchmarks.data", "memory", folder, str(store_mb), str(times), done.name]
        subprocess.run(words, check=True)
        found: list[dict[str, Any]] = json.loads(Path(done.name).read_text())
    return found


# --- the benchmark ---


def run(rows: int, model_rows: int, rounds: int, store_mb: int, times: float) -> dict[str, Any]:
    """Measure the speed of every pipeline, and its peak memory on inputs of `times` / 10 and `times` object stores."""
    speed = []
    with tempfile.TemporaryDirectory() as name, ray_session(ClusterConfig(num_actors=2)):
        for pipeline in pipelines(Path(name), rows, model_rows):
            speed.append(compare(pipeline, Path(name), rounds))
    peaks = {str(factor): memory_in_a_process(store_mb, factor) for factor in (times / 10, times)}
    machine = f"{os.cpu_count()} CPU cores ({platform.machine()}), ray {ray.__version__}, pyarrow {pa.__version__}"
    return {"machine": machine, "rounds": rounds, "speed": speed, "object_store_mb": store_mb, "memory": peaks}


def text(value: dict[str, Any]) -> str:
    """Format the result as Markdown."""
    ways = ("one process", "1 worker", "2 workers")
    lines = [f"{value['machine']}; medians of {value['rounds']} rounds, in which the variants take turns.", ""]
    lines += [
        "The table shows rows per second after the first part has begun. Ray's overhead is the time of 1 worker minus",
        "the time of one process. Each process has one torch thread. Negative overheads are noise.",
        "",
    ]
    lines += [
        "| pipeline | rows | parts | one process | Ray, 1 worker | Ray, 2 workers | 2 over one process | overhead |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for row in value["speed"]:
        alone, one, two = (row["rows_per_second"][way] for way in ways)
        lines.append(
            f"| {row['pipeline']} | {row['rows']:,.0f} | {row['parts']} | {alone:,.0f} | {one:,.0f} | {two:,.0f} "
            f"| {two / alone:.2f} | {row['ray_overhead_us_per_row']:,.0f} us a row |"
        )
    lines += ["", "Seconds until the first part begins; until then processes start, import and load their model:", ""]
    lines += ["| pipeline | one process | Ray, 1 worker | Ray, 2 workers |", "|---|---|---|---|"]
    for row in value["speed"]:
        lines.append(f"| {row['pipeline']} | " + " | ".join(f"{row['start_seconds'][way]:.1f}" for way in ways) + " |")
    lines += ["", f"Peak memory of the session, two workers, object store of {value['object_store_mb']} MB:", ""]
    lines += ["| pipeline | input, MB | rows | all processes, MB | object store, MB |", "|---|---|---|---|---|"]
    for row in sorted((row for rows in value["memory"].values() for row in rows), key=lambda row: row["pipeline"]):
        lines.append(
            f"| {row['pipeline']} | {row['input_mb']:,.0f} | {row['rows']:,} | {row['rss_mb']:,.0f} "
            f"| {row['object_store_mb']:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1] == "loop":
        Path(sys.argv[3]).write_text(json.dumps(loop(*pickle.loads(Path(sys.argv[2]).read_bytes()))))
    else:
        peaks = memory(Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
        Path(sys.argv[5]).write_text(json.dumps(peaks))
