"""Parts of work on Ray, and prepare and score on it: each part once, whatever is killed, or an error that names it.

Workers import this file: transformers, which takes them seconds, is imported where it is needed.
"""

import json
import os
import re
import signal
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dtrpo_ray.config.cluster import ClusterConfig
from dtrpo_ray.config.produce import ScoreConfig
from dtrpo_ray.config.task import PreferencesTask
from dtrpo_ray.data.schemas import PREFERENCE, TRAJECTORY
from dtrpo_ray.data.tables import file_parts, read_table, write_whole
from dtrpo_ray.errors import ConfigError, DataError, ModelError
from dtrpo_ray.files import read_json
from dtrpo_ray.parts import DONE, TRIES, _Actor, run_parts

ONE, TWO = ClusterConfig(num_actors=1), ClusterConfig(num_actors=2)


class Writer:
    """Writes its part to a file, counting the tries; part 2 kills it if `mortal`."""

    def __init__(self, mortal: bool) -> None:
        self.mortal = mortal

    def __call__(self, part: int, out: Path) -> dict[str, Any]:
        with (out / "tries.txt").open("a") as tries:
            tries.write(f"{part}\n")
        if part == 2 and self.mortal:
            os.kill(os.getpid(), signal.SIGKILL)
        (out / f"part-{part}.txt").write_text(str(part * part))
        return {"rows": 1, "square": part * part}


def squares(out: Path, mortal: bool = False) -> list[int]:
    return [part["square"] for part in run_parts(range(4), partial(Writer, mortal), out, ONE, "squares")]


def tries(out: Path) -> list[int]:
    return [int(line) for line in (out / "tries.txt").read_text().split()]


@pytest.mark.usefixtures("local_ray")
def test_a_bad_part_is_named_and_the_next_run_does_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dtrpo_ray.parts.PLAIN_SECONDS", 0)
    with pytest.raises(DataError, match=f"2: {TRIES} workers died on it"):
        squares(tmp_path, mortal=True)
    assert tries(tmp_path).count(2) == TRIES
    assert squares(tmp_path) == [0, 1, 4, 9]
    assert [tries(tmp_path).count(part) for part in (0, 1, 2)] == [1, 1, TRIES + 1]
    assert re.search(r"squares: part 1/\d  \S+ rows/s  \d+ s left", capsys.readouterr().err)
    before = tries(tmp_path)
    assert squares(tmp_path) == [0, 1, 4, 9]
    assert tries(tmp_path) == before  # all is done: no worker starts


def one_part(make: Any, out: Path) -> dict[str, Any]:
    (out / DONE).mkdir(exist_ok=True)
    rows: list[dict[str, Any]] = _Actor(make, ["shard-0"], out)(pa.table({"part": [0]})).to_pylist()
    return rows[0]


def test_a_full_disk_names_the_part_and_leaves_it_open(tmp_path: Path) -> None:
    def work(part: str, out: Path) -> dict[str, Any]:
        Path("/dev/full").write_text(part)
        return {"rows": 1}

    row = one_part(lambda: work, tmp_path)
    assert row["error"].startswith("shard-0: [Errno 28] No space left on device (output: ")
    assert not list((tmp_path / DONE).glob("*.json"))


def test_a_write_that_fails_leaves_neither_half_a_file_nor_the_room_it_took(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()  # no file can take this name
    with pytest.raises(OSError, match="part"):
        write_whole(pa.table({"a": [1]}), tmp_path / "part")
    assert [file.name for file in tmp_path.iterdir()] == ["part"]


def test_what_cannot_be_read_or_made_is_said(tmp_path: Path) -> None:
    def make() -> Any:
        raise ModelError("reward-model: not here")

    def work(part: str, out: Path) -> dict[str, Any]:
        raise DataError(f"{part}: cannot be read")

    assert one_part(make, tmp_path)["error"] == "reward-model: not here"
    assert one_part(lambda: work, tmp_path)["error"] == "shard-0: cannot be read"


class Mortal:
    """Is killed once, when its second part is written and not yet told to be done."""

    def __init__(self, make: Any) -> None:
        self.work, self.parts = make(), 0

    def __call__(self, part: Any, out: Path) -> dict[str, Any]:
        summary: dict[str, Any] = self.work(part, out)
        self.parts += 1
        if self.parts == 2:
            with suppress(FileExistsError):
                (out / "killed").open("x").close()
                os.kill(os.getpid(), signal.SIGKILL)
        return summary


def pool_and_alone(parts: Any, make: Any, folder: Path) -> tuple[Path, Path]:
    """The folder of two actors of which one is killed, and the folder of one worker in this process."""
    pool, alone = folder / "pool", folder / "alone"
    done = run_parts(parts, partial(Mortal, make), pool, TWO, "pool")
    assert (pool / "killed").exists()
    alone.mkdir()
    work = make()
    assert done == [work(part, alone) for part in parts]
    return pool, alone


def same_files(one: Path, other: Path) -> bool:
    """Whether two folders have the same Parquet files, byte for byte, and nothing half-written."""
    names = [sorted(file.name for file in folder.glob("*.parquet*")) for folder in (one, other)]
    return names[0] == names[1] and all((one / n).read_bytes() == (other / n).read_bytes() for n in names[0])


@pytest.mark.usefixtures("local_ray")
def test_an_import_whose_actor_is_killed_gives_the_table_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dtrpo_ray.data import prepare
    from dtrpo_ray.data.formats import files
    from dtrpo_ray.models.tokenizer import character_tokenizer

    monkeypatch.setattr(files, "PART_ROWS", 5)  # the parts are cut here
    rows = [{"prompt": f"{i % 20}", "chosen": "1" * (i % 20 + 1), "rejected": "2" + "x" * (i == 8)} for i in range(23)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    character_tokenizer("0123456789").save_pretrained(tmp_path / "tokenizer")
    task = PreferencesTask.model_validate({"type": "preferences", "files": [str(tmp_path / "pairs.jsonl")]})
    grid = {"block_size": 4, "block_origin": "global", "shift": 0}
    arguments = (task, tmp_path / "tokenizer", grid, {task.files[0]: "hash"})
    parts = prepare.import_parts(task)
    assert len(parts) == 5

    pool, alone = pool_and_alone(parts, partial(prepare.Importer, prepare.ImportJob(*arguments)), tmp_path)
    done = [read_json(file) for file in sorted((pool / DONE).glob("*.json"))]
    counts = [prepare.finish_import(done, PREFERENCE, folder) for folder in (pool, alone)]
    assert counts == [{"rows": 23, "good": 19, "refused": {"duplicate row": 3, "cannot be tokenized": 1}}] * 2
    assert same_files(pool, alone)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory, make_model: Any) -> Path:
    """A tiny model that spells Sudoku's digits."""
    from dtrpo_ray.models.registry import save_model
    from dtrpo_ray.models.tokenizer import character_tokenizer

    folder = tmp_path_factory.mktemp("policy")
    save_model(make_model(seed=1, vocab_size=8, eos_token_id=5, mask_token_id=6), folder)
    character_tokenizer("01234").save_pretrained(folder)
    return folder


def sudoku_prompts(count: int) -> list[Any]:
    from dtrpo_ray.data.tasks.sudoku import generate

    puzzles = generate(count, "train", seed=0, blanks=(1, 1))
    return [
        {"row_id": f"r-{i:02d}", "prompt_id": f"r-{i:02d}", "prompt": puzzle["prompt"], "denoising_steps": 1 + i % 2}
        for i, puzzle in enumerate(puzzles)
    ]


@pytest.mark.usefixtures("local_ray")
def test_a_rollout_whose_actor_is_killed_has_every_row_once(tmp_path: Path, policy: Path) -> None:
    from dtrpo_ray.decode.types import SamplingParams
    from dtrpo_ray.produce.rollout import DecodeJob, Recorder, request_parts

    prompts = sudoku_prompts(21)
    job = DecodeJob(
        policy,
        "model",
        SamplingParams(max_new_tokens=16, denoising_steps=1, temperature=1.0),
        2,
        0,
        "dtrpo_ray.data.tasks.sudoku:score",
    )
    parts = request_parts(prompts, 2)
    assert len(parts) == 6
    pool, alone = pool_and_alone(parts, partial(Recorder, job, 2), tmp_path)
    assert same_files(pool, alone)
    table = read_table(pool, TRAJECTORY).sort_by("row_id")
    assert table["row_id"].to_pylist() == [request["row_id"] for request in prompts]

    (tmp_path / "one").mkdir()
    Recorder(replace(job, batch_size=100), 2)(request_parts(prompts, 100)[0], tmp_path / "one")
    sampled = ["row_id", "response_ids", "steps", "seed", "reward"]  # a wider batch moves the last bits of logps
    assert read_table(tmp_path / "one", TRAJECTORY).sort_by("row_id").select(sampled).equals(table.select(sampled))


@pytest.mark.usefixtures("local_ray")
def test_reference_logps_whose_actor_is_killed_have_every_pair_of_every_epoch_once(
    tmp_path: Path, policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from example_rows import preference

    from dtrpo_ray.config.train import TrainConfig
    from dtrpo_ray.train import dataset, reference

    monkeypatch.setattr(reference, "PART_PAIRS", 4)  # the parts are cut here
    ids = {"chosen_ids": [3, 5], "rejected_ids": [4, 1, 2, 0, 5, 5], "mask_id": 6}
    rows = [preference(f"row-{i}") | ids for i in range(11)]
    files = [tmp_path / f"part-{i}.parquet" for i in range(2)]
    for file, half in zip(files, (rows[:6], rows[6:]), strict=True):
        pq.write_table(pa.Table.from_pylist(half, schema=PREFERENCE), file)
    config = TrainConfig(num_epochs=2, global_batch=4, micro_batch=3, max_steps=5)  # 9 pairs of the second epoch
    parts = reference.epoch_parts(files, config, 0)
    assert [sum(map(len, part.pairs.rows.values())) for part in parts] == [4, 4, 3, 4, 4, 1]  # type: ignore[arg-type]
    pool, alone = pool_and_alone(parts, partial(reference.ReferenceScorer, policy, config, 0, "hash", 2), tmp_path)
    assert same_files(pool, alone)
    plan = dataset.make_plan([row["row_id"] for row in rows], config, 0)
    read = {(rows[r]["row_id"], int(e)) for r, e in zip(plan.row, plan.epoch, strict=True)}
    values = reference.ReferenceCache.load(pool, 0, "hash float32").values
    assert set(values) == {(row_id, side, epoch) for row_id, epoch in read for side in ("chosen", "rejected")}
    assert sum(pq.read_metadata(file).num_rows for file in pool.glob("*.parquet")) == len(values)


@pytest.mark.usefixtures("local_ray")
def test_files_of_a_table_are_scored_side_by_side(tmp_path: Path) -> None:
    from example_rows import trajectory

    from dtrpo_ray.produce.scoring import Scorer

    paths = [tmp_path / f"part-{i}.parquet" for i in range(3)]
    for i, path in enumerate(paths):
        row = trajectory(str(i)) | {"reward": None, "reward_source": None, "response": f"#### {i}", "answer": "1"}
        pq.write_table(pa.Table.from_pylist([row], schema=TRAJECTORY), path)
    done = run_parts(file_parts(paths), partial(Scorer, ScoreConfig(scorer="gsm8k")), tmp_path / "out", TWO, "score")
    assert sum(part["rows"] for part in done) == 3
    assert read_table(tmp_path / "out", TRAJECTORY)["reward"].to_pylist() == [0.0, 1.0, 0.0]


@pytest.mark.usefixtures("local_ray")
def test_a_file_of_prompts_is_decoded_and_then_scored(tmp_path: Path, policy: Path) -> None:
    from dtrpo_ray.config.job import Job
    from dtrpo_ray.pipeline import Pipeline
    from dtrpo_ray.stages import Store

    rows = [{"prompt": row["prompt"], "answer": "1"} for row in sudoku_prompts(5)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sections: dict[str, Any] = {
        "task": {"type": "prompts", "files": [str(tmp_path / "prompts.jsonl")]},
        "model": {"path": policy},
        "rollout": {"num_samples": 2, "batch_size": 4, "denoising_steps": [1]},
        "score": {"scorer": "gsm8k"},
        "cluster": {"num_actors": 1},
    }
    job = Job.model_validate({"name": "prompts", "storage": tmp_path / "runs", "rounds": 2, **sections})
    scored = Pipeline(job, Store(job.storage)).scored(1)
    table = read_table(scored.path / "table", TRAJECTORY)
    assert scored.summary["trajectories"] == len(table) == 10
    assert set(table["reward"].to_pylist()) <= {0.0, 1.0}
    assert {row_id[:3] for row_id in table["row_id"].to_pylist()} == {"r1-"}
    job = job.model_copy(update={"rollout": job.rollout and job.rollout.model_copy(update={"block_length": 8})})
    with pytest.raises(ConfigError, match=r"rollout\.block_length = 8, but this model was trained on blocks of 4"):
        Pipeline(job, Store(job.storage)).scored(1)


def test_an_error_that_nobody_foresaw_names_its_part_too(tmp_path: Path) -> None:
    (tmp_path / DONE).mkdir()
    actor = _Actor(lambda: lambda part, out: {"rows": 1 // part}, [0], tmp_path)
    (error,) = actor(pa.table({"part": [0]}))["error"].to_pylist()
    assert error.startswith("0: ZeroDivisionError: integer division")

    def exhausted(part: int, out: Path) -> dict[str, Any]:
        raise MemoryError("alloc")

    (error,) = _Actor(lambda: exhausted, [0], tmp_path)(pa.table({"part": [0]}))["error"].to_pylist()
    assert error == "0: MemoryError: alloc; smaller batches, fewer cluster.num_actors, or more memory"
