"""A training checkpoint -> what its model answers, in a task of Ray Train's own beside the training.

`write_questions` lays down what is asked before the training starts; `validate` is called by Ray Train with each
uploaded checkpoint. Answers are greedy, so that checkpoints differ by their weights alone.
"""

import json
import pkgutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dtrpo_ray import checkpoint
from dtrpo_ray.config import TrainConfig
from dtrpo_ray.engine import Engine
from dtrpo_ray.export import export_checkpoint
from dtrpo_ray.generation import SamplingParams
from dtrpo_ray.metrics import EVENTS, VALIDATION, append_event

QUESTIONS = "questions.json"
TIMEOUT_SECONDS = 3600.0  # of one validation; later ones wait for it


def write_questions(prompts: Sequence[dict[str, Any]], scorer: str | None, out: Path) -> None:
    """What each checkpoint is asked: prompts {prompt, prompt_ids} and who scores ("module:function"), or nobody."""
    (out / QUESTIONS).write_text(json.dumps({"prompts": list(prompts), "scorer": scorer}))


def validate(saved: Any, out: str, root: str, config: dict[str, Any]) -> dict[str, float]:
    """The metrics of one checkpoint (a `ray.train.Checkpoint`): `accuracy` where there is a scorer, `answer_tokens`.

    A line with them and the first answers goes to validation.jsonl in the stage's folder `out`, the metrics go beside
    the checkpoint's files for `checkpoint.prune`, and checkpoints that need not be kept any longer are removed. A
    validation that fails is told among the events and measures nothing, {}; the training goes on.
    """
    train = TrainConfig.model_validate(config)
    events = Path(out) / EVENTS
    try:
        metrics, told = _measure(saved, Path(out), train)
        append_event(events, "validation", told, **metrics)
    except Exception as error:
        metrics = {}
        message = f"validation of {saved.path} failed: {type(error).__name__}: {error}"
        append_event(events, "validation failed", message)
    checkpoint.write_validation(saved.filesystem, saved.path, metrics)
    checkpoint.prune(saved.filesystem, root, train.keep_checkpoints, train.keep_best, validated=True)
    return metrics


def _measure(saved: Any, out: Path, train: TrainConfig) -> tuple[dict[str, float], str]:
    """The metrics and a line about them; appends to validation.jsonl."""
    asked = train.validation
    assert asked is not None
    with saved.as_directory() as folder, tempfile.TemporaryDirectory() as made:
        facts = export_checkpoint(Path(folder), Path(made) / "model", merged=True)
        engine = Engine.load(Path(made) / "model")
    questions = json.loads((out / QUESTIONS).read_text())
    prompts = questions["prompts"]
    params = SamplingParams(asked.max_new_tokens, asked.denoising_steps)
    done = engine.generate([row["prompt_ids"] for row in prompts], params, [0] * len(prompts))
    answers = [engine.decode(generation.text_ids) for generation in done]
    metrics = {"answer_tokens": sum(len(generation.text_ids) for generation in done) / len(done)}
    if questions["scorer"]:
        score = pkgutil.resolve_name(questions["scorer"])
        rewards = [score(row["prompt"], answer) for row, answer in zip(prompts, answers, strict=True)]
        metrics = {"accuracy": sum(reward >= 1 for reward in rewards) / len(rewards), **metrics}
    samples = [{"prompt": p["prompt"], "answer": a} for p, a in zip(prompts, answers, strict=True)]
    record = {"step": facts["step"], **metrics, "num_prompts": len(prompts), "samples": samples[: asked.num_examples]}
    with (out / VALIDATION).open("a") as file:
        file.write(json.dumps(record) + "\n")
    told = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
    return metrics, f"step {facts['step']}: {told} ({len(prompts)} prompts)"
