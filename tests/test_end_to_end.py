"""Every stage on real parts, small: Ray Data, Ray Train with DeepSpeed, the cache of stages, resume, export.

The two runs that are interrupted are processes, as a user would start them; the commands after them run in this one.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from commands import dtrpo
from paths import ROOT

from dtrpo_ray.data.schemas import PREFERENCE, TRAJECTORY
from dtrpo_ray.data.tables import read_table
from dtrpo_ray.data.tasks import sudoku
from dtrpo_ray.decode.engine import Engine
from dtrpo_ray.decode.types import SamplingParams
from dtrpo_ray.metrics import read_metrics
from dtrpo_ray.models.registry import load_model

pytestmark = pytest.mark.usefixtures("local_ray")  # which the commands in this process share

SETTINGS = ("denoising_steps=1", "denoising_steps=8", "threshold=0.6")
SMALL = [
    "rounds=1",
    "sft.num_examples=17920", "sft.global_batch=128", "sft.micro_batch=64",
    "rollout.num_prompts=64", "rollout.num_samples=4", "rollout.denoising_steps=[2]",
    "eval.num_prompts=32", "eval.budgets=[1, 8]", "eval.thresholds=[0.6]",
    "model.init.num_layers=1", "model.init.hidden_size=64",
    "train.global_batch=4", "train.max_steps=4", "train.save_every=2", "task.public_tests=[]", "task.blanks=[1, 1]",
    "sft.lr=1e-2", "sft.save_every=70", "serve.port=0",
    "train.validation.num_prompts=24", "train.keep_best=accuracy", "cluster.num_actors=1",
]  # fmt: skip


def words(verb: str, storage: Path, *more: str) -> list[str]:
    settings = [word for item in [f"storage={storage}", *SMALL] for word in ("--set", item)]
    return [verb, str(ROOT / "jobs" / "sudoku.toml"), *more, "--json", *settings]


def start(*words: str) -> subprocess.Popen[str]:
    """A command in a process of its own that Ctrl-C ends: a shell's background jobs inherit that it is ignored."""
    return subprocess.Popen(
        [sys.executable, "-m", "dtrpo_ray", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=ROOT, start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def run_here(*words: str, code: int = 0) -> tuple[dict[str, Any], str]:
    """What a command in this process printed, as JSON, and what it said."""
    done = dtrpo(*words)
    assert done.returncode == code, done.stderr[-3000:]
    return {} if code else json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipeline")


@pytest.fixture(scope="module")
def interrupted(storage: Path) -> subprocess.CompletedProcess[str]:
    """The run, stopped by Ctrl-C while its base model trains, when there is a checkpoint to go on from."""
    process = start(*words("run", storage))
    try:
        while not any(storage.glob("stages/base-*.partial/checkpoints/step-00000070/COMPLETE")):
            assert process.poll() is None, process.communicate()[1][-3000:]
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGINT)
        said = process.communicate(timeout=120)[1]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(process.args, process.returncode, "", said)


@pytest.fixture(scope="module")
def run(storage: Path, interrupted: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The same command again, its endpoint kept up: it goes on where the first one stopped, and Ctrl-C ends it."""
    process = start(*words("run", storage, "--keep-serving"))
    try:
        said, url = [], None
        assert process.stderr
        for line in process.stderr:
            said.append(line)
            if found := re.match(r"serving at (http://127\.0\.0\.1:\d+); Ctrl-C stops it", line):
                url = found[1]
                break
        assert url, "".join(said)[-3000:]
        assert urllib.request.urlopen(f"{url}/health", timeout=60).status == 200
        process.send_signal(signal.SIGINT)
        out, rest = process.communicate(timeout=120)
        assert process.returncode == 0, rest[-3000:]
        with pytest.raises(urllib.error.URLError, match="refused"):
            urllib.request.urlopen(f"{url}/health", timeout=60)
    finally:
        process.kill()
    value: dict[str, Any] = json.loads(out.splitlines()[-1])
    return value


def test_ctrl_c_ends_in_one_message_and_nothing_half_made(
    storage: Path, interrupted: subprocess.CompletedProcess[str]
) -> None:
    assert interrupted.returncode == 130, interrupted.stderr[-3000:]
    assert "interrupted: finished stages are kept" in interrupted.stderr
    assert "Traceback" not in interrupted.stderr
    whole = {p.name.split("-")[0] for p in (storage / "stages").iterdir() if p.suffix != ".partial"}
    assert whole == {"init", "examples"}
    for folder in (storage / "stages").iterdir():
        assert (folder / "stage.json").exists() == (folder.suffix != ".partial")


def stage(run: dict[str, Any], name: str) -> Path:
    return next(Path(s["directory"]) for s in run["lineage"] if s["stage"] == name)


def test_the_run_goes_from_nothing_to_an_answer_and_a_report(run: dict[str, Any]) -> None:
    names = [s["stage"] for s in run["lineage"]]
    assert set(names) >= {"init", "examples", "base", "rollout-1", "pair-1", "train-1", "eval-base", "eval-aligned"}
    assert len(run["answer"]["text"]) == 16
    assert run["asked"]["setting"] in SETTINGS
    assert run["asked"]["reward"].keys() == {"base", "aligned"}
    assert all(0 <= reward <= 10 for reward in run["asked"]["reward"].values())
    page = Path(run["page"])
    assert page.exists()
    assert (page.parent / "accuracy.png").exists()
    assert {(r["model"], r["setting"]) for r in run["table"]} == {(m, k) for m in ("base", "aligned") for k in SETTINGS}
    assert all(r["num_prompts"] == 32 for r in run["table"])
    tokens = {r["setting"]: r["tokens_per_forward"] for r in run["table"]}
    assert tokens["denoising_steps=1"] == 8.0
    assert tokens["denoising_steps=8"] == 1.0
    assert 1.0 < tokens["threshold=0.6"] < 8.0


def test_trajectories_and_pairs_are_whole_and_valid(run: dict[str, Any]) -> None:
    trajectories = read_table(stage(run, "rollout-1") / "table", TRAJECTORY)
    assert len(trajectories) == 64 * 4
    whole = 0
    for steps in trajectories["steps"].to_pylist():
        assert len(steps) in (8, 16)  # a weak model may end after a block
        assert sorted(set(steps)) == list(range(len(steps) // 4))  # two steps in each block of eight
        whole += len(steps) == 16
    assert whole > 240
    pairs = read_table(stage(run, "pair-1") / "table", PREFERENCE)
    assert (pairs["chosen_reward"].to_numpy() > pairs["rejected_reward"].to_numpy()).all()


def test_sft_and_dtrpo_trained_through_the_same_loop(run: dict[str, Any]) -> None:
    base = [json.loads(line) for line in (stage(run, "base") / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in base] == list(range(1, 141))
    assert base[-1]["loss"] < 0.8 * base[0]["loss"]
    resumed = [e for e in read_metrics(stage(run, "base") / "events.jsonl") if e["event"] == "resume"]
    assert [event["step"] for event in resumed] == [70]  # the interrupted stage went on from its checkpoint
    aligned = [json.loads(line) for line in (stage(run, "train-1") / "metrics.jsonl").read_text().splitlines()]
    first = aligned[0]
    assert first["margin"] == pytest.approx(0.0, abs=1e-5)
    assert first["loss"] == pytest.approx(0.693147 + 8.0 * first["nll_chosen"], abs=1e-4)


def test_each_checkpoint_answers_and_is_scored(run: dict[str, Any]) -> None:
    """What validation measured of the last checkpoint is what the aligned model does."""
    folder = stage(run, "train-1")
    rows = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4]
    assert all(len(row["samples"]) == 4 for row in rows)
    questions, engine = json.loads((folder / "questions.json").read_text()), Engine.load(folder / "model")
    assert len(questions["prompts"]) == 24
    prompts = [row["prompt_ids"] for row in questions["prompts"]]
    done = engine.generate(prompts, SamplingParams(max_new_tokens=16, denoising_steps=4), [0] * 24)
    answers = [engine.decode(generation.text_ids) for generation in done]
    assert [sample["answer"] for sample in rows[-1]["samples"]] == answers[:4]
    scores = [sudoku.score(row["prompt"], answer) for row, answer in zip(questions["prompts"], answers, strict=True)]
    assert rows[-1]["accuracy"] == sum(scores) / 24


def test_a_second_run_reuses_every_stage(run: dict[str, Any], storage: Path) -> None:
    again, said = run_here(*words("eval", storage))
    assert "made" not in said
    assert said.count("reused") >= 8
    assert again["table"] == run["table"]


def test_training_from_a_cache_of_the_reference_is_training_beside_it(run: dict[str, Any], storage: Path) -> None:
    """`ref-logps` writes the values of this round's very draws; training from them has the same losses."""
    cached, said = run_here(*words("train", storage, "--set", "train.reference=cache"))
    assert "ref-1" in said
    rows = [json.loads(line) for line in (Path(cached["directory"]) / "metrics.jsonl").read_text().splitlines()]
    frozen = [json.loads(line) for line in (stage(run, "train-1") / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "margin", "log_ratio_chosen", "log_ratio_rejected", "grad_norm"):
        assert [row[name] for row in rows] == pytest.approx([row[name] for row in frozen], rel=1e-4, abs=1e-5), name
    [made] = [json.loads(file.read_text()) for file in storage.glob("stages/ref-1-*/stage.json")]
    assert made["summary"]["values"] == 2 * 4 * 4  # both sides of what four steps of four pairs read


def test_resume_goes_on_from_another_runs_checkpoint_or_says_field_by_field_why_not(
    run: dict[str, Any], storage: Path, tmp_path: Path
) -> None:
    """A stage of two workers, cut off after step 2, on one worker: the weights differ by the order of sums alone."""
    whole, cut = stage(run, "train-1"), tmp_path / "train-1-cut.partial"
    shutil.copytree(whole, cut)
    for checkpoint in (cut / "checkpoints").glob("step-00000004*"):
        shutil.rmtree(checkpoint)
    resume = words("train", storage, "--resume", str(cut), "--set", "cluster.num_workers=1")
    _, said = run_here(*resume, "--set", "train.lr=1e-9", code=2)
    assert "train.lr: " in said
    assert "1e-09 now" in said
    assert "Traceback" not in said
    made, _ = run_here(*resume)
    folder = Path(made["directory"])
    [resumed] = [e for e in read_metrics(folder / "events.jsonl") if e["event"] == "resume"]
    assert "resumed at step 2 of 4 on 1 worker(s), written by 2" in resumed["message"]
    straight = dict(load_model(whole / "model").named_parameters())
    ours = load_model(folder / "model").named_parameters()
    assert max(float((value - straight[name]).detach().abs().max()) for name, value in ours) < 1e-4


def test_an_exported_model_is_the_aligned_one(run: dict[str, Any], storage: Path, tmp_path: Path) -> None:
    run_here(*words("export", storage, str(tmp_path / "out")))
    exported, aligned = load_model(tmp_path / "out"), load_model(stage(run, "train-1") / "model")
    assert all(torch.equal(a, b) for a, b in zip(exported.parameters(), aligned.parameters(), strict=True))
    assert "dTRPO" in (tmp_path / "out" / "README.md").read_text()


def test_parquet_files_name_their_table(run: dict[str, Any]) -> None:
    file = next((stage(run, "pair-1") / "table").glob("*.parquet"))
    assert pq.read_schema(file).metadata[b"dtrpo.table"] == b"preference/v1"


def test_real_text_with_the_real_tokenizer_trains_on_two_workers(shared_data: Path, tmp_path: Path) -> None:
    """jobs/text.toml with real preference pairs and the Qwen2/SDAR tokenizer: the loss falls."""
    files = f'task.files=["{shared_data / "llamafactory_dpo_demo" / "dpo_en_demo.json"}"]'
    places = [f"storage={tmp_path}", f"model.tokenizer={shared_data / 'tokenizer_qwen2_sdar'}", files]
    settings = [word for item in [*places, "task.max_rows=80"] for word in ("--set", item)]
    made, _ = run_here("train", str(ROOT / "jobs" / "text.toml"), "--json", *settings)
    folder = Path(made["directory"])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    pairs = sum(pq.read_metadata(file).num_rows for file in tmp_path.glob("stages/pairs-*/table/*.parquet"))
    refused = next(tmp_path.glob("stages/pairs-*/table/quarantine.jsonl")).read_text().splitlines()
    assert pairs + len(refused) == 80
    assert [row["step"] for row in rows] == list(range(1, pairs + 1))  # 8 epochs, 8 pairs a step
    first, last = ([row["loss"] for row in rows][part] for part in (slice(0, 4), slice(-4, None)))
    assert sum(last) < 0.9 * sum(first)
    assert json.loads((folder / "model" / "config.json").read_text())["mask_token_id"] == 151669
