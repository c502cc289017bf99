"""A training checkpoint -> its model's answers and their score, in a Ray Train task beside the training.

`write_questions` stores the questions before the training starts; Ray Train calls `validate` with each uploaded
checkpoint, and it measures in a child process, since a task that dies would end the run. Answers are greedy, so that
checkpoints differ by their weights alone.
"""

import json
import os
import pkgutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict, cast

from dtrpo_ray.config.train import TrainConfig
from dtrpo_ray.data.schemas import TrajectoryRow
from dtrpo_ray.decode.engine import Engine
from dtrpo_ray.decode.types import SamplingParams
from dtrpo_ray.errors import TrainError, last_line
from dtrpo_ray.metrics import EVENTS, VALIDATION, append_event
from dtrpo_ray.train import checkpoint
from dtrpo_ray.train.export import export_checkpoint

QUESTIONS = "questions.json"
TIMEOUT_SECONDS = 3600  # of one validation; later ones wait for it


class Measured(TypedDict):
    """The metrics of one checkpoint, and its first answers."""

    step: int
    metrics: dict[str, float]
    num_prompts: int
    samples: list[dict[str, str]]


def write_questions(asked: Sequence[TrajectoryRow], scorer: str | None, out: Path) -> None:
    """Store the questions for every checkpoint, and their scorer ("module:function"), if there is one.

    A question has prompt and prompt_ids, and an answer where its scorer compares with one.
    """
    prompts = [{"prompt": q["prompt"], "prompt_ids": q["prompt_ids"], "answer": q.get("answer")} for q in asked]
    (out / QUESTIONS).write_text(json.dumps({"prompts": prompts, "scorer": scorer}))


def validate(saved: Any, out: str, root: str, config: dict[str, Any]) -> dict[str, float]:
    """Measure one checkpoint (a `ray.train.Checkpoint`): `answer_tokens`, and with a scorer `accuracy` and `reward`.

    A line with the metrics and the first answers goes to validation.jsonl in the stage's folder `out`, the metrics go
    beside the checkpoint's files for `checkpoint.prune`, which then removes old checkpoints. A validation that fails,
    dies or takes longer than TIMEOUT_SECONDS is logged as an event and returns {}; the training goes on.
    """
    train, events = TrainConfig.model_validate(config), Path(out) / EVENTS
    metrics: dict[str, float] = {}
    try:
        with saved.as_directory() as folder:
            done = _measure_in_child(Path(folder), Path(out), config)
        step, metrics, count = done["step"], done["metrics"], done["num_prompts"]
        with (Path(out) / VALIDATION).open("a") as file:
            line = {"step": step, **metrics, "num_prompts": count, "samples": done["samples"]}
            file.write(json.dumps(line) + "\n")
        numbers = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
        append_event(events, "validation", f"step {step}: {numbers} ({count} prompts)", **metrics)
    except Exception as error:
        append_event(events, "validation failed", f"validation of {saved.path} failed: {last_line(error)}")
    try:
        checkpoint.write_validation(saved.filesystem, saved.path, metrics)
        checkpoint.prune(saved.filesystem, root, train.keep_checkpoints, train.keep_best, validated=True)
    except OSError as error:
        append_event(events, "storage error", f"the validation of {saved.path} could not be kept: {error}")
    return metrics


def _measure_in_child(folder: Path, out: Path, config: dict[str, Any]) -> Measured:
    """Run `measure` in a child process. Raises TrainError with its last line of output."""
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "result.json"
        words = [sys.executable, "-m", __name__, str(folder), str(out), json.dumps(config), str(result)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
        if done.returncode:
            raise TrainError((done.stderr.strip().splitlines() or [f"its process ended with {done.returncode}"])[-1])
        return cast(Measured, json.loads(result.read_text()))


def measure(folder: Path, out: Path, train: TrainConfig) -> Measured:
    """Let the checkpoint in `folder` answer the questions of the stage's folder `out`, and score its answers."""
    config = train.validation
    assert config is not None
    with tempfile.TemporaryDirectory() as scratch:
        facts = export_checkpoint(folder, Path(scratch) / "model", merged=True)
        engine = Engine.load(Path(scratch) / "model")
    questions = json.loads((out / QUESTIONS).read_text())
    prompts = questions["prompts"]
    params = SamplingParams(max_new_tokens=config.max_new_tokens, denoising_steps=config.denoising_steps)
    done = engine.generate([row["prompt_ids"] for row in prompts], params, [0] * len(prompts))
    answers = [engine.decode(generation.text_ids) for generation in done]
    metrics = {"answer_tokens": sum(len(generation.text_ids) for generation in done) / len(done)}
    if questions["scorer"]:
        score = pkgutil.resolve_name(questions["scorer"])
        rewards = [score(row["prompt"], text, row["answer"]) for row, text in zip(prompts, answers, strict=True)]
        accuracy, reward = (sum(found) / len(rewards) for found in ([reward >= 1 for reward in rewards], rewards))
        metrics = {"accuracy": accuracy, "reward": reward, **metrics}
    samples = [{"prompt": p["prompt"], "answer": a} for p, a in zip(prompts, answers, strict=True)][
        : config.num_examples
    ]
    return {"step": facts["step"], "metrics": metrics, "num_prompts": len(prompts), "samples": samples}


def main() -> None:
    """Run `python -m dtrpo_ray.train.validation CHECKPOINT OUT CONFIG RESULT`: measure, and write RESULT as JSON."""
    folder, out, config, result = sys.argv[1:]
    record = measure(Path(folder), Path(out), TrainConfig.model_validate_json(config))
    Path(result).write_text(json.dumps(record))


if __name__ == "__main__":
    main()
