"""The end of `dtrpo run`: serve the aligned model beside its base and ask both the same held-out prompts over HTTP."""

import json
import pkgutil
import shlex
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dtrpo_ray.config.decode import STEPS, Setting
from dtrpo_ray.config.job import Job
from dtrpo_ray.config.serve import ServeConfig
from dtrpo_ray.data.prepare import puzzle_ids
from dtrpo_ray.data.tasks.puzzles import generate_puzzles, scorer_path
from dtrpo_ray.models.tokenizer import load_tokenizer
from dtrpo_ray.pipeline import HELD_OUT_SEED, Pipeline
from dtrpo_ray.progress import console
from dtrpo_ray.report.evaluation import HELD_OUT, Comparison, against_base, reward_text
from dtrpo_ray.report.page import Answer
from dtrpo_ray.serve.server import read_keys, start, stop
from dtrpo_ray.stages import Json, JsonObject

NUM_PUZZLES = 10
TIMEOUT_SECONDS = 120


@dataclass(frozen=True, slots=True)
class Questions:
    """The answers of the served models, model -> one answer per prompt, at a setting."""

    url: str
    setting: Setting
    answers: dict[str, list[Answer]]

    def example(self) -> Answer:
        """Return an answer of the aligned model: the first with a higher reward than the base's, or else its first."""
        aligned = self.answers["aligned"]
        pairs = zip(aligned, self.answers.get("base", ()), strict=False)
        return next((ours for ours, theirs in pairs if (ours["reward"] or 0) > (theirs["reward"] or 0)), aligned[0])

    def scores(self) -> dict[str, float]:
        """Return each model's sum of rewards, the number of correct answers of a puzzle; {} without a verifier."""
        if self.example()["reward"] is None:
            return {}
        return {model: sum(answer["reward"] or 0 for answer in answers) for model, answers in self.answers.items()}

    def lines(self) -> list[str]:
        """Describe scores and example for a terminal."""
        example, aligned = self.example(), self.answers["aligned"]
        if example["reward"] is None:
            return [f"asked {self.url}: {example['prompt']} -> {example['text']}"]
        scores = ", ".join(f"{model} {reward:.3g}/{len(aligned)}" for model, reward in self.scores().items())
        shown = {model: answers[aligned.index(example)] for model, answers in self.answers.items()}
        return [
            f"asked the served models {len(aligned)} held-out prompts: {scores} at {self.setting.label}",
            f"example: {example['prompt']}",
            *(f"  {model:<8} {a['text']} ({reward_text(a['reward'] or 0)})" for model, a in shown.items()),
        ]


def choose_setting(job: Job, comparison: Sequence[Comparison]) -> Setting:
    """Return the setting at which aligned and base differ most on held-out prompts; of equal ones the first."""
    gains = {Setting.parse(row["setting"]): row["gain"] for row in against_base(comparison) if row["set"] == HELD_OUT}
    return max(
        sorted(gains), key=lambda setting: abs(gains[setting]), default=Setting(STEPS, job.serve.denoising_steps)
    )


@contextmanager
def ask_served(pipeline: Pipeline, setting: Setting) -> Iterator[Questions]:
    """Serve the aligned model, ask it, and keep it up for the time of the block.

    A puzzle's base is served beside it and asked the same; any other job's model gets one prompt.
    """
    job, puzzles = pipeline.job, [{"prompt": "Hello", "answer": ""}]
    config = job.serve.model_copy(update={"checkpoint": str(pipeline.aligned().path.resolve())})
    models = {"aligned": config.model_name}
    if job.puzzle:
        puzzles = generate_puzzles(job.puzzle, NUM_PUZZLES, "test", HELD_OUT_SEED)
        base = "base"
        while base in (config.model_name, *config.other_models):
            base += "_"
        models = {"base": base, "aligned": config.model_name}
        others = {**config.other_models, base: str(pipeline.base().path.resolve())}
        config = config.model_copy(update={"other_models": others})
    asked: Json = [puzzle["prompt"] for puzzle in puzzles]
    if job.puzzle and job.puzzle.in_words:
        tokenizer = load_tokenizer(pipeline.base().path)
        asked = [puzzle_ids(job.puzzle, tokenizer, puzzle["prompt"]) for puzzle in puzzles]
    with console.status("serving the aligned model"):
        url = start(config)
    try:
        ask = partial(_ask, job, puzzles, asked, url, config=config, at=setting)
        yield Questions(url, setting, {name: ask(model=model) for name, model in models.items()})
    finally:
        stop()


def _ask(
    job: Job, puzzles: list[dict[str, str]], asked: Json, url: str, *, config: ServeConfig, model: str, at: Setting
) -> list[Answer]:
    most = job.eval.max_new_tokens if job.eval else 32
    body: dict[str, Json] = {"model": model, "prompt": asked, "max_tokens": most, "seed": job.seed}
    body["temperature"] = job.eval.temperature if job.eval else 0
    body["steps" if at.field == STEPS else at.field] = at.value
    choices = _post(f"{url}/v1/completions", body, min(read_keys(config.api_key_file), default=None))["choices"]
    texts = [choice["text"] for choice in sorted(choices, key=lambda choice: choice["index"])]
    score = pkgutil.resolve_name(scorer_path(job.puzzle)) if job.puzzle else None
    return [
        Answer(url=url, prompt=p["prompt"], text=t, reward=score(p["prompt"], t, p["answer"]) if score else None)
        for p, t in zip(puzzles, texts, strict=True)
    ]


def _post(url: str, body: JsonObject, key: str | None) -> Any:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url, data=json.dumps(body).encode(), headers=headers)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through the user's web proxy
    with direct.open(request, timeout=TIMEOUT_SECONDS) as response:
        return json.load(response)


def closing_lines(page: Path, job_file: Path, overrides: Sequence[str]) -> list[str]:
    """Return the last lines of a run: the report, and three commands to go on with."""
    settings = "".join(f" --set {shlex.quote(override)}" for override in overrides)
    job = shlex.quote(str(job_file))
    return [
        f"report: {page}",
        "try next:",
        f"  dtrpo serve {job}{settings}    # watch the aligned model write in a browser",
        f"  dtrpo export {job} out/aligned{settings}    # write it as a model directory",
        "  dtrpo check PAIRS.jsonl    # validate preference pairs of your own",
    ]
