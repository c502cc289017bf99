"""A training checkpoint -> what its model answers, in a task of Ray Train's own beside the training.

`write_questions` lays down what is asked before the training starts; `validate` is called by Ray Train with each
uploaded checkpoint and measures in a process of its own, since a task that dies would take the run with it. Answers are
greedy, so that checkpoints differ by their weights alone.
"""

import json
import os
import pkgutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dtrpo_ray.config.train import TrainConfig
from dtrpo_ray.decode.engine import Engine
from dtrpo_ray.decode.types import SamplingParams
from dtrpo_ray.errors import TrainError, last_line
from dtrpo_ray.metrics import EVENTS, VALIDATION, append_event
from dtrpo_ray.train import checkpoint
from dtrpo_ray.train.export import export_checkpoint

QUESTIONS = "questions.json"
TIMEOUT_SECONDS = 3600  # of one validation; later ones wait for it


def write_questions(prompts: Sequence[dict[str, Any]], scorer: str | None, out: Path) -> None:
    """What each checkpoint is asked: prompts {prompt, prompt_ids} and who scores ("module:function"), or nobody."""
    (out / QUESTIONS).write_text(json.dumps({"prompts": list(prompts), "scorer": scorer}))


def validate(saved: Any, out: str, root: str, config: dict[str, Any]) -> dict[str, float]:
    """The metrics of one checkpoint (a `ray.train.Checkpoint`): `accuracy` where there is a scorer, `answer_tokens`.

    A line with them and the first answers goes to validation.jsonl in the stage's folder `out`, the metrics go beside
    the checkpoint's files for `checkpoint.prune`, and checkpoints that need not be kept any longer are removed. A
    validation that fails, dies or takes longer than TIMEOUT_SECONDS is told among the events and measures nothing, {};
    the training goes on.
    """
    train, events = TrainConfig.model_validate(config), Path(out) / EVENTS
    metrics: dict[str, float] = {}
    try:
        with saved.as_directory() as folder:
            record = _in_a_process_of_its_own(Path(folder), Path(out), config)
        metrics, line = record["metrics"], record["line"]
        with (Path(out) / VALIDATION).open("a") as file:
            file.write(json.dumps(line) + "\n")
        told = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
        message = f"step {line['step']}: {told} ({line['num_prompts']} prompts)"
        append_event(events, "validation", message, **metrics)
    except Exception as error:
        append_event(events, "validation failed", f"validation of {saved.path} failed: {last_line(error)}")
    try:
        checkpoint.write_validation(saved.filesystem, saved.path, metrics)
        checkpoint.prune(saved.filesystem, root, train.keep_checkpoints, train.keep_best, validated=True)
    except OSError as error:
        append_event(events, "storage error", f"the validation of {saved.path} could not be kept: {error}")
    return metrics


def _in_a_process_of_its_own(folder: Path, out: Path, config: dict[str, Any]) -> dict[str, Any]:
    """What `measure` returns. Raises TrainError with the process's last words."""
    with tempfile.TemporaryDirectory() as made:
        result = Path(made) / "result.json"
        words = [
            sys.executable,
            "-m",
            "dtrpo_ray.train.validation",
            str(folder),
            str(out),
            json.dumps(config),
            str(result),
        ]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
        if done.returncode:
            spoken = done.stderr.strip().splitlines()
            raise TrainError(spoken[-1] if spoken else f"its process ended with {done.returncode}")
        record: dict[str, Any] = json.loads(result.read_text())
    return record


def measure(folder: Path, out: Path, train: TrainConfig) -> dict[str, Any]:
    """{"metrics", "line" of validation.jsonl} of the checkpoint in `folder`."""
    asked = train.validation
    assert asked is not None
    with tempfile.TemporaryDirectory() as made:
        facts = export_checkpoint(folder, Path(made) / "model", merged=True)
        engine = Engine.load(Path(made) / "model")
    questions = json.loads((out / QUESTIONS).read_text())
    prompts = questions["prompts"]
    params = SamplingParams(max_new_tokens=asked.max_new_tokens, denoising_steps=asked.denoising_steps)
    done = engine.generate([row["prompt_ids"] for row in prompts], params, [0] * len(prompts))
    answers = [engine.decode(generation.text_ids) for generation in done]
    metrics = {"answer_tokens": sum(len(generation.text_ids) for generation in done) / len(done)}
    if questions["scorer"]:
        score = pkgutil.resolve_name(questions["scorer"])
        rewards = [score(row["prompt"], answer) for row, answer in zip(prompts, answers, strict=True)]
        metrics = {"accuracy": sum(reward >= 1 for reward in rewards) / len(rewards), **metrics}
    samples = [{"prompt": p["prompt"], "answer": a} for p, a in zip(prompts, answers, strict=True)]
    line = {"step": facts["step"], **metrics, "num_prompts": len(prompts), "samples": samples[: asked.num_examples]}
    return {"metrics": metrics, "line": line}


def main() -> None:
    """`python -m dtrpo_ray.train.validation CHECKPOINT OUT CONFIG RESULT`: measure, and write RESULT as JSON."""
    folder, out, config, result = sys.argv[1:]
    record = measure(Path(folder), Path(out), TrainConfig.model_validate_json(config))
    Path(result).write_text(json.dumps(record))


if __name__ == "__main__":
    main()
