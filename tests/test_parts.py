"""Parts of work on Ray, and prepare and score on it: each part once, whatever is killed, or an error that names it.

Workers import this file: transformers, which takes them seconds, is imported where it is needed.
"""

import json
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dtrpo_ray.config import ClusterConfig, PreferencesTask, ScoreConfig
from dtrpo_ray.errors import DataError, ModelError
from dtrpo_ray.parts import DONE, TRIES, _Actor, run_parts
from dtrpo_ray.records import PREFERENCE, TRAJECTORY
from dtrpo_ray.tables import read_table

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
def test_a_bad_part_is_named_and_the_next_run_does_what_is_left(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"2: {TRIES} workers died on it"):
        squares(tmp_path, mortal=True)
    assert tries(tmp_path).count(2) == TRIES
    assert squares(tmp_path) == [0, 1, 4, 9]
    assert [tries(tmp_path).count(part) for part in (0, 1, 2)] == [1, 1, TRIES + 1]
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
    assert row["error"].startswith("shard-0: [Errno 28] No space left on device; writing to ")
    assert not list((tmp_path / DONE).glob("*.json"))


def test_what_cannot_be_read_or_made_is_said(tmp_path: Path) -> None:
    def make() -> Any:
        raise ModelError("reward-model: not here")

    def work(part: str, out: Path) -> dict[str, Any]:
        raise DataError(f"{part}: cannot be read")

    assert one_part(make, tmp_path)["error"] == "reward-model: not here"
    assert one_part(lambda: work, tmp_path)["error"] == "shard-0: cannot be read"


class Mortal:
    """Is killed once, when an import's second part is written and not yet told to be done."""

    def __init__(self, make: Any) -> None:
        self.work = make()

    def __call__(self, part: Any, out: Path) -> dict[str, Any]:
        summary: dict[str, Any] = self.work(part, out)
        if part.shard.first == 5 and not (out / "killed").exists():
            (out / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return summary


@pytest.mark.usefixtures("local_ray")
def test_an_import_whose_actor_is_killed_gives_the_table_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dtrpo_ray import prepare
    from dtrpo_ray.importers import files
    from dtrpo_ray.tokenizer import character_tokenizer

    monkeypatch.setattr(files, "SHARD_ROWS", 5)  # the parts are cut here
    rows = [{"prompt": f"{i % 20}", "chosen": "1" * (i % 20 + 1), "rejected": "2" + "x" * (i == 8)} for i in range(23)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    character_tokenizer("0123456789").save_pretrained(tmp_path / "tokenizer")
    task = PreferencesTask.model_validate({"type": "preferences", "files": [str(tmp_path / "pairs.jsonl")]})
    grid = {"block_size": 4, "block_origin": "global", "shift": 0}
    arguments = (task, tmp_path / "tokenizer", grid, {task.files[0]: "hash"})
    parts = prepare.import_parts(task)
    assert len(parts) == 5

    done = run_parts(parts, partial(Mortal, partial(prepare.Importer, *arguments)), tmp_path / "pool", TWO, "prepare")
    counts = prepare.finish_import(done, PREFERENCE, tmp_path / "pool")
    assert (tmp_path / "pool" / "killed").exists()
    assert counts == {"rows": 23, "good": 19, "refused": {"duplicate row": 3, "cannot be tokenized": 1}}

    alone, importer = tmp_path / "alone", prepare.Importer(*arguments)
    alone.mkdir()
    assert prepare.finish_import([importer(part, alone) for part in parts], PREFERENCE, alone) == counts
    assert read_table(tmp_path / "pool", PREFERENCE).equals(read_table(alone, PREFERENCE))


@pytest.mark.usefixtures("local_ray")
def test_files_of_a_table_are_scored_side_by_side(tmp_path: Path) -> None:
    from example_rows import trajectory

    from dtrpo_ray.scoring import Scorer

    paths = [tmp_path / f"part-{i}.parquet" for i in range(3)]
    for i, path in enumerate(paths):
        row = trajectory(str(i)) | {"reward": None, "reward_source": None, "response": f"#### {i}", "answer": "1"}
        pq.write_table(pa.Table.from_pylist([row], schema=TRAJECTORY), path)
    done = run_parts(paths, partial(Scorer, ScoreConfig(scorer="gsm8k")), tmp_path / "out", TWO, "score")
    assert sum(part["rows"] for part in done) == 3
    assert read_table(tmp_path / "out", TRAJECTORY)["reward"].to_pylist() == [0.0, 1.0, 0.0]
