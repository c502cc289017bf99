"""A reward function of the user's own: TRL's contract, one clear message for each mistake, its hash in the lineage."""

import inspect
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import dtrpo
from example_rows import trajectory
from paths import ROOT

from dtrpo_ray.config.load import load_job
from dtrpo_ray.config.produce import ScoreConfig
from dtrpo_ray.data.schemas import TRAJECTORY
from dtrpo_ray.data.tables import file_parts, read_table
from dtrpo_ray.errors import ConfigError, DataError
from dtrpo_ray.produce.function import FunctionSource, RewardFunction
from dtrpo_ray.produce.scoring import Scorer

Define = Callable[[str], FunctionSource]
numbers = count()  # of modules: Python imports a name once


@pytest.fixture
def define(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Define]:
    """Write a module with a function `score` beside the job, and find it."""
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(text: str) -> FunctionSource:
        name = f"my_rewards_{next(numbers)}"
        (tmp_path / f"{name}.py").write_text(text)
        return FunctionSource.find(f"{name}:score", tmp_path)

    return write


def table(*rows: dict[str, Any]) -> pa.Table:
    made = [trajectory(str(i)) | {"reward": None, "reward_source": None} | row for i, row in enumerate(rows)]
    return pa.Table.from_pylist(made, schema=TRAJECTORY)


ROWS = [{"prompt": f"p{i}", "response": "x" * i, "answer": str(i), "seed": i} for i in range(5)]


@pytest.mark.parametrize("size", [1, 2, 16])
def test_it_is_called_with_lists_of_every_column_at_most_batch_size_rows_at_a_time(size: int, define: Define) -> None:
    source = define(
        "calls = []\ndef score(**columns):\n    calls.append(columns)\n    return range(len(columns['seed']))"
    )
    rewards, calls = RewardFunction(source, size)(table(*ROWS)), sys.modules[source.name[:-6]].calls
    assert rewards == [i % size for i in range(5)]
    assert [len(call["prompts"]) for call in calls] == [min(size, 5 - start) for start in range(0, 5, size)]
    columns = {name: [value for call in calls for value in call[name]] for name in calls[0]}
    assert set(columns) == {"prompts", "completions", *TRAJECTORY.names} - {"prompt", "response"}
    assert columns["prompts"] == [row["prompt"] for row in ROWS]
    assert columns["completions"] == [row["response"] for row in ROWS]
    assert {name: columns[name] for name in ("answer", "seed")} == {
        name: [row[name] for row in ROWS] for name in ("answer", "seed")
    }


def test_a_row_is_left_unscored_by_none_and_numbers_of_other_libraries_count(define: Define, tmp_path: Path) -> None:
    source = define(
        "import numpy, torch\ndef score(completions):\n    return (None, numpy.float32(0.5), torch.tensor(2), True, -1)"
    )
    pq.write_table(table(*ROWS), tmp_path / "part-0.parquet")
    (tmp_path / "out").mkdir()
    scorer = Scorer(ScoreConfig(scorer=source.name), source)
    done = scorer(*file_parts([tmp_path / "part-0.parquet"]), tmp_path / "out")
    assert done == {"rows": 5, "scored": 4, "sum": 2.5}
    found = read_table(tmp_path / "out", TRAJECTORY)
    assert found["reward"].to_pylist() == [None, 0.5, 2.0, 1.0, -1.0]
    assert found["reward_source"].to_pylist() == [None, *[source.name] * 4]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("[1.0, float('nan')]", r"row 3: {name} returned nan; a reward is a finite number, or None"),
        ("[1.0, float('-inf')]", "row 3: {name} returned -inf; a reward is"),
        ("[1.0, '0.5']", "row 3: {name} returned '0.5'; a reward is"),
        ("[[1.0], 1.0]", r"row 2: {name} returned \[1.0\]; a reward is"),
        ("[1.0]", "row 2: {name}, called with 2 rows from here, returned 1 rewards"),
        ("[1.0] * 3", "row 2: {name}, called with 2 rows from here, returned 3 rewards"),
        ("1.0", "row 2: {name}, called with 2 rows from here, returned float and no list"),
        ("{2: 1, 3: 1}", "row 2: {name}, called with 2 rows from here, returned dict and no list"),
        (
            "json.loads('x')",
            r"row 2: {name}, called with 2 rows from here, raised JSONDecodeError: Expecting value.*\({file}:5\)$",
        ),
    ],
)
def test_what_it_must_not_return_is_one_message_with_function_file_and_row(
    returned: str, message: str, define: Define, tmp_path: Path
) -> None:
    source = define(
        "import json\ndef score(completions):\n    if 'x' in completions or '' in completions:\n        return [0, 0]\n"
        f"    return {returned}"
    )
    pq.write_table(table(*ROWS[:4]), tmp_path / "part-0.parquet")
    with pytest.raises(DataError, match=r"part-0\.parquet: " + message.format(name=source.name, file=source.file)):
        Scorer(ScoreConfig(scorer=source.name, batch_size=2), source)(
            *file_parts([tmp_path / "part-0.parquet"]), tmp_path
        )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def scores(): ...", r"my_rewards_\d+.py has no such function; define it there"),
        ("score = 1", "has no such function"),
        ("def score(:", r"cannot be imported in .*: SyntaxError: .*line 1"),
        ("import no_such", r"cannot be imported in .*: ModuleNotFoundError: No module named 'no_such' \(.*.py:1\)$"),
        ("raise SystemExit(3)", r"cannot be imported in .*: SystemExit: 3"),
        (
            "def score(completions, solution): ...",
            "missing a required argument: 'solution'; the keywords are prompts, comp",
        ),
        ("def score(completions, /): ...", "the keywords are prompts, completions"),
    ],
)
def test_what_cannot_be_called_is_refused_before_anything_runs(text: str, message: str, define: Define) -> None:
    with pytest.raises(ConfigError, match=r"^score\.scorer = 'my_rewards_\d+:score': .*" + message):
        define(text)


def test_a_worker_refuses_another_file_than_the_command_began_with(define: Define) -> None:
    source = define("def score(completions): return [1] * len(completions)")
    with source.file.open("a") as file:
        file.write("\n# edited")
    with pytest.raises(ConfigError, match="is not the file that the command began with"):
        RewardFunction(source, 1)


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        ("gsm8", "'gsm8' is no scorer; use one of sudoku, countdown, gsm8k"),
        ("rewards", 'or "module:function" of your own'),
        ("rewards.py:near", "'rewards.py:near': it cannot be imported"),
        ("no_such_module:near", "score.scorer: 'no_such_module:near': no such module in"),
        ("rewards:", "is no scorer"),
        ("__main__:near", "is no scorer"),
    ],
)
def test_a_scorer_that_is_none_is_refused(scorer: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    done = dtrpo("score", "jobs/prompts.toml", "--set", f"score.scorer={scorer}")
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr


def test_the_shipped_function_and_its_copy_in_the_documentation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    source = FunctionSource.find("rewards:near", ROOT / "jobs")
    rows = [{"response": text, "answer": "6 + 1 = 7\n#### 7"} for text in ("It is 7", "9", "-1", "none")]
    assert RewardFunction(source, 3)(table(*rows)) == [1, 1 / 3, 1 / 9, None]
    assert inspect.getsource(source.load()) in (ROOT / "docs" / "data.md").read_text()
    assert load_job(ROOT / "jobs" / "prompts.toml", ["score.scorer=rewards:near"])


@pytest.mark.usefixtures("local_ray")
def test_a_function_beside_the_job_file_scores_in_the_workers_and_again_when_its_file_changes(tmp_path: Path) -> None:
    name = f"my_rewards_{next(numbers)}"
    shutil.copy(ROOT / "jobs" / "score.toml", tmp_path)
    text = "def score(completions, **columns):\n    return [{} * len(text) for text in completions]\n"
    words = ["score", f"{tmp_path}/score.toml", "--json", "--set", f"score.scorer={name}:score"]
    words += ["--set", f"storage={tmp_path}/runs", "--set", "cluster.num_actors=1"]
    keys = []
    for factor in (1, 1, 2):
        (tmp_path / f"{name}.py").write_text(text.format(factor))
        sys.modules.pop(name, None)  # as in a new process
        done = dtrpo(*words)
        assert done.returncode == 0, done.stderr
        stage = json.loads(done.stdout.splitlines()[-1])
        keys.append((stage["key"], stage["reused"]))
        found = read_table(Path(stage["directory"]) / "table", TRAJECTORY)
        assert found["reward"].to_pylist() == [factor * len(text) for text in found["response"].to_pylist()]
    assert keys[0][0] == keys[1][0] != keys[2][0]
    assert [reused for _, reused in keys] == [False, True, False]
