"""A stage is named by what changes its weights, and by nothing else; what cannot work is refused before any is made."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from paths import ROOT
from rich.console import Console

from dtrpo_ray.config.cluster import NumWorkers
from dtrpo_ray.config.job import Job
from dtrpo_ray.config.load import load_job
from dtrpo_ray.config.train import TrainConfig
from dtrpo_ray.errors import ConfigError
from dtrpo_ray.files import sha256_json
from dtrpo_ray.models.hub import ModelSource
from dtrpo_ray.models.tokenizer import character_tokenizer
from dtrpo_ray.pipeline import ModelRef, Pipeline
from dtrpo_ray.stages import Stage, Store
from dtrpo_ray.train.run import RunRecord, TrainStage


class Dry:
    """A store that makes nothing and keeps what each stage depends on."""

    def __init__(self) -> None:
        self.inputs: dict[str, dict[str, Any]] = {}

    def stage(self, name: str, inputs: dict[str, Any], outputs: Iterable[str], make: object) -> Stage:
        self.inputs[name] = inputs
        key = sha256_json({"stage": name, "inputs": inputs})
        return Stage(name, key, Path(name), 0.0, False, {f"model/{name}": key})


def weight_fields(config: TrainConfig) -> object:
    """The settings that name a training stage."""
    store, job = Dry(), load_job(ROOT / "jobs" / "sudoku.toml").model_copy(update={"train": config})
    Pipeline(job, store).policy(1)  # type: ignore[arg-type]
    return store.inputs["train-1"]["config"]


@pytest.mark.parametrize(
    "change",
    [
        {"save_every": 7},
        {"log_every": 3},
        {"log_terms_every": 3},
        {"keep_checkpoints": 9},
        {"keep_best": "loss"},
        {"on_nonfinite": "skip"},
    ],
)
def test_knobs_that_change_no_weight_do_not_rename_a_stage(change: dict[str, object]) -> None:
    assert weight_fields(TrainConfig.model_validate(change)) == weight_fields(TrainConfig())


@pytest.mark.parametrize(
    "change", [{"lr": 1.0}, {"zero_stage": 1}, {"micro_batch": 3}, {"micro_tokens": 9}, {"offload": True}]
)
def test_knobs_that_change_weights_do(change: dict[str, object]) -> None:
    assert weight_fields(TrainConfig.model_validate(change)) != weight_fields(TrainConfig())


def test_each_round_rolls_out_and_resets_the_reference_to_the_policy_before_it() -> None:
    job = load_job(ROOT / "jobs" / "sudoku.toml", ["rounds=3", "train.reference=cache"])
    store = Dry()
    pipeline = Pipeline(job, store)  # type: ignore[arg-type]
    policies = [pipeline.policy(number) for number in range(4)]
    assert pipeline.aligned() == policies[3]
    assert len({policy.digest for policy in policies}) == 4
    for number in (1, 2, 3):
        before = policies[number - 1].digest
        assert store.inputs[f"rollout-{number}"]["policy"] == before
        assert store.inputs[f"train-{number}"]["base"] == before
        assert store.inputs[f"ref-{number}"]["reference"] == before
        assert store.inputs[f"ref-{number}"]["seed"] == store.inputs[f"train-{number}"]["seed"] == job.seed + number
        assert store.inputs[f"pair-{number}"]["trajectories"] == pipeline.trajectories(number).digest
        assert store.inputs[f"train-{number}"]["table"] == pipeline.pairs(number).digest
    assert job.rollout
    config, tokenizer = job.rollout.model_copy(update={"num_prompts": 50}), character_tokenizer("01234")
    prompts = [pipeline._rollout_prompts(config, n, tokenizer) for n in (1, 2)]
    ids = [{row["row_id"] for row in rows} for rows in prompts]
    assert len(ids[0]) == len(prompts[0]) == 50 * job.rollout.num_samples
    assert not ids[0] & ids[1]
    assert {row["prompt"] for row in prompts[0]} != {row["prompt"] for row in prompts[1]}


def test_rewards_are_named_by_the_commit_of_a_model_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    model = ["score.scorer=reward_model", "score.reward_model=org/name@main"]
    job, inputs = load_job(ROOT / "jobs" / "score.toml", model), []
    for commit in ("0a", "0a", "0b"):
        source = ModelSource(Path("cache"), f"org/name@{commit}", commit)
        monkeypatch.setattr(ModelSource, "find", lambda where, found=source: found)
        store = Dry()
        Pipeline(job, store).scored(1)  # type: ignore[arg-type]
        inputs.append(store.inputs["score-1"])
    assert inputs[0] == inputs[1] != inputs[2]
    assert inputs[2]["model"] == "0b"


def test_a_control_differs_from_the_last_round_in_its_objective_alone() -> None:
    """Caches and choices that belong to preferences are left out: they name no weights."""
    settings = [
        "rounds=2",
        "train.reference=cache",
        "train.keep_best=margin",
        "eval.controls=['imitation', 'elbo_dpo']",
    ]
    job, store = load_job(ROOT / "jobs" / "demo.toml", settings), Dry()
    pipeline = Pipeline(job, store)  # type: ignore[arg-type]
    assert job.eval
    for objective in job.eval.controls:
        pipeline.control(objective)
    pipeline.aligned()
    ours = store.inputs["train-2"]
    for objective in job.eval.controls:
        control = store.inputs[f"control-{objective}"]
        assert [control[name] for name in ("base", "seed", "table")] == [
            ours[name] for name in ("base", "seed", "table")
        ]
        assert control["config"].pop("objective") == ours["config"]["objective"] | {"type": objective}
        rest = {name: value for name, value in ours["config"].items() if name not in ("objective", "reference")}
        assert control["config"] == rest | {"reference": "frozen"}


def test_a_control_that_cannot_train_is_refused_with_the_job() -> None:
    with pytest.raises(ConfigError, match=r"eval\.controls: 'imitation' cannot train"):
        load_job(ROOT / "jobs" / "demo.toml", ["train.objective.schedule=confidence", "eval.controls=['imitation']"])


def write_record(folder: Path, workers: dict[str, NumWorkers]) -> None:
    stage = TrainStage("train-2", folder, folder, folder, 0, workers=workers)
    RunRecord.of(stage, TrainConfig(), "checkpoints").write(folder)


def test_a_run_resumed_with_other_workers_reuses_the_stages_it_was_built_on(tmp_path: Path) -> None:
    """All training before the stage is named by that run's workers; the stage itself and what follows by the job's."""
    demo = ROOT / "jobs" / "sudoku.toml"
    was, now = (load_job(demo, ["rounds=3", f"cluster.num_workers={n}"]) for n in ("[1, 4]", "1"))
    straight, resumed = Dry(), Dry()
    Pipeline(was, straight).policy(3)  # type: ignore[arg-type]
    cut = tmp_path / "train-2-0123.partial"
    cut.mkdir()
    recorded = Pipeline(was, Dry())  # type: ignore[arg-type]
    recorded.policy(2)
    write_record(cut, recorded.workers)
    Pipeline(now, resumed, cut).policy(3)  # type: ignore[arg-type]
    for name in ("base", "train-1"):
        assert sha256_json(resumed.inputs[name]) == sha256_json(straight.inputs[name])
    assert resumed.inputs["train-2"]["base"] == straight.inputs["train-2"]["base"]
    assert [resumed.inputs[name]["num_workers"] for name in ("train-2", "train-3")] == [1, 1]
    again, second = Dry(), tmp_path / "train-2-4567"  # the resumed run is cut off and resumed
    second.mkdir()
    write_record(second, {"base": (1, 4), "train-1": (1, 4), "train-2": 1})
    Pipeline(now, again, second).policy(3)  # type: ignore[arg-type]
    assert again.inputs["train-2"] == resumed.inputs["train-2"]
    missing, examples = Pipeline(now, Store(tmp_path), cut), Stage("examples", "key", tmp_path, 0.0, False, {})
    with pytest.raises(ConfigError, match=r"needs its stage base of \(1, 4\) worker\(s\), which is not in"):
        missing._train("base", was.train, ModelRef(tmp_path, "model"), examples, 0)
    (cut / "run.json").unlink()
    without = Dry()
    Pipeline(now, without, cut).policy(3)  # type: ignore[arg-type]
    assert without.inputs["base"]["num_workers"] == 1


def test_adapters_that_a_model_does_not_take_are_refused_before_any_stage(tmp_path: Path) -> None:
    config = json.loads((ROOT / "tests" / "models" / "tiny_configs.json").read_text())["sdar_moe"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    sections = {"task": {"type": "preferences", "files": ["pairs.jsonl"]}, "model": {"path": tmp_path}}
    train = {"objective": {"schedule": "random"}, "lora": {"targets": "attention+mlp"}}
    job = Job.model_validate({"name": "moe", "storage": tmp_path / "runs", "train": train, **sections})
    with pytest.raises(ConfigError, match=r"lora\.targets = 'attention\+mlp': the MLPs of sdar_moe"):
        Pipeline(job, Store(job.storage)).policy(1)
    assert not job.storage.exists()


def test_validation_asks_the_first_prompts_of_an_imported_table(tmp_path: Path) -> None:
    """Its folder holds more than Parquet files."""
    folder = tmp_path / "table"
    (folder / "done").mkdir(parents=True)
    for note in ("done/000000.json", "manifest.json", "quarantine.jsonl"):
        (folder / note).write_text("{}")
    for number in range(2):
        rows = pa.table({"row_id": [f"{number}"], "prompt_ids": [[number, 1]]})
        pq.write_table(rows, folder / f"part-{number}.parquet")
    character_tokenizer("0123").save_pretrained(tmp_path / "base")
    task = {"type": "preferences", "files": ["pairs.jsonl"]}
    train = {"objective": {"schedule": "random"}}
    job = Job.model_validate({"name": "text", "task": task, "model": {"path": tmp_path / "base"}, "train": train})
    stage = Stage("pairs", "key", tmp_path, 0.0, False, {})
    Pipeline(job, Store(tmp_path))._write_questions(2, ModelRef(tmp_path / "base", "base"), stage, tmp_path)
    asked = json.loads((tmp_path / "questions.json").read_text())["prompts"]
    assert [(row["prompt"], row["prompt_ids"]) for row in asked] == [("01", [0, 1]), ("11", [1, 1])]


def test_a_public_test_file_that_does_not_exist_is_named_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Base, aligned and the report all ask for the test sets."""
    monkeypatch.setattr("dtrpo_ray.pipeline.console", Console(stderr=True))
    missing = f"task.public_tests=['{tmp_path}/nowhere.jsonl']"
    pipeline = Pipeline(load_job(ROOT / "jobs" / "sudoku.toml", [missing, "eval.num_prompts=2"]), Store(tmp_path))
    assert list(pipeline._test_sets()) == list(pipeline._test_sets()) == ["held-out"]
    assert capsys.readouterr().err.count("nowhere.jsonl does not exist and is left out") == 1
