"""The end of a run: the same puzzles for base and aligned over HTTP, the scores, and what to do next."""

from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

from dtrpo_ray import demo
from dtrpo_ray.config.decode import Setting
from dtrpo_ray.config.job import Job
from dtrpo_ray.config.load import load_job
from dtrpo_ray.config.serve import ServeConfig
from dtrpo_ray.data.tasks.puzzles import generate_puzzles
from dtrpo_ray.pipeline import HELD_OUT_SEED, ModelRef, Pipeline
from dtrpo_ray.report.evaluation import Comparison

URL = "http://127.0.0.1:1"


TWO = Setting("denoising_steps", 2)


def gain(at: int | float, value: float, test_set: str = "held-out") -> Comparison:
    setting = f"threshold={at}" if isinstance(at, float) else f"denoising_steps={at}"
    return {"model": "aligned", "against": "base", "set": test_set, "setting": setting, "gain": value,
            "low": value, "high": value, "p_value": 1.0, "verdict": "same", "forwards": {}}  # fmt: skip


@pytest.mark.parametrize(
    ("comparison", "setting"),
    [
        ([gain(1, 0.1), gain(2, 0.3), gain(4, 0.2), gain(8, 0.9, "public.jsonl")], "denoising_steps=2"),
        ([gain(1, -0.4), gain(2, 0.3)], "denoising_steps=1"),  # a loss is shown too
        ([gain(4, 0.2), gain(2, 0.2)], "denoising_steps=2"),
        ([gain(4, 0.2), gain(0.5, -0.3)], "threshold=0.5"),
        ([], "denoising_steps=4"),  # nothing was evaluated: the default of the endpoint
    ],
)
def test_the_setting_is_where_the_models_differ_most(comparison: list[Comparison], setting: str) -> None:
    assert str(demo.choose_setting(load_job(ROOT / "jobs" / "sudoku.toml"), comparison)) == setting


class Endpoint:
    """A fake server; each of its models knows the answers of the first few puzzles."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, known: dict[str, int], answers: dict[str, str]) -> None:
        self.known, self.answers = known, answers
        self.bodies: list[dict[str, Any]] = []
        self.config: ServeConfig | None = None
        self.stopped = 0
        monkeypatch.setattr(demo, "start", self.start)
        monkeypatch.setattr(demo, "stop", self.stop)
        monkeypatch.setattr(demo, "_post", self.post)

    def start(self, config: ServeConfig) -> str:
        self.config = config
        return URL

    def stop(self) -> None:
        self.stopped += 1

    def post(self, url: str, body: dict[str, Any], key: str | None) -> dict[str, Any]:
        assert url == f"{URL}/v1/completions"
        self.bodies.append(body)
        texts = [self.answers.get(prompt, "?") for prompt in body["prompt"]]
        texts = [text if i < self.known[body["model"]] else "1" * 16 for i, text in enumerate(texts)]
        return {"choices": [{"index": i, "text": text} for i, text in reversed(list(enumerate(texts)))]}


class FinishedPipeline(Pipeline):
    def base(self) -> ModelRef:
        return ModelRef(Path("/models/base"), "b")

    def aligned(self) -> ModelRef:
        return ModelRef(Path("/models/aligned"), "a")


def finished(job: Job) -> Pipeline:
    return FinishedPipeline(job, store=None)  # type: ignore[arg-type]


def sudoku(*overrides: str) -> tuple[Job, dict[str, str]]:
    job = load_job(ROOT / "jobs" / "sudoku.toml", overrides)
    assert job.puzzle
    rows = generate_puzzles(job.puzzle, demo.NUM_PUZZLES, "test", HELD_OUT_SEED)
    return job, {row["prompt"]: row["answer"] for row in rows}


def test_base_and_aligned_are_asked_the_same_puzzles(monkeypatch: pytest.MonkeyPatch) -> None:
    job, answers = sudoku()
    endpoint = Endpoint(monkeypatch, {"base": 4, "dtrpo": 7}, answers)
    with demo.ask_served(finished(job), TWO) as asked:
        assert not endpoint.stopped
        assert asked.scores() == {"base": 4, "aligned": 7}
        prompt = list(answers)[4]  # the first that the base has wrong and the aligned model right
        assert asked.example() == {"url": URL, "prompt": prompt, "text": answers[prompt], "reward": 1.0}
        assert asked.lines() == [
            "asked the served models 10 held-out prompts: base 4/10, aligned 7/10 at 2 steps per block",
            f"example: {prompt}",
            f"  base     {'1' * 16} (wrong)",
            f"  aligned  {answers[prompt]} (correct)",
        ]
    assert endpoint.stopped == 1
    assert endpoint.config
    assert endpoint.config.checkpoint == "/models/aligned"
    assert endpoint.config.other_models == {"base": "/models/base"}
    first, second = endpoint.bodies
    assert (first.pop("model"), second.pop("model")) == ("base", "dtrpo")
    assert first == second == {"prompt": list(answers), "max_tokens": 16, "seed": 0, "temperature": 0, "steps": 2}


def test_a_model_that_the_job_names_base_keeps_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    job, answers = sudoku("serve.other_models.base=/mine")
    endpoint = Endpoint(monkeypatch, {"base_": 0, "dtrpo": 0}, answers)
    with demo.ask_served(finished(job), Setting("threshold", 0.9)) as asked:
        assert asked.example()["prompt"] == next(iter(answers))  # none is solved: the first
        assert asked.lines()[0].endswith("base 0/10, aligned 0/10 at threshold 0.9")
    assert [(body["threshold"], "steps" in body) for body in endpoint.bodies] == [(0.9, False)] * 2
    assert endpoint.config
    assert endpoint.config.other_models == {"base": "/mine", "base_": "/models/base"}


def test_a_job_without_a_verifier_asks_one_question(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    task = {"type": "preferences", "files": ["pairs.jsonl"]}
    train = {"objective": {"schedule": "random"}}
    job = Job.model_validate({"name": "text", "task": task, "model": {"path": tmp_path}, "train": train})
    endpoint = Endpoint(monkeypatch, {"dtrpo": 1}, {"Hello": "Good day"})
    with demo.ask_served(finished(job), demo.choose_setting(job, ())) as asked:
        assert asked.scores() == {}
        assert asked.lines() == [f"asked {URL}: Hello -> Good day"]
    assert endpoint.config
    assert endpoint.config.other_models == {}
    assert [body["prompt"] for body in endpoint.bodies] == [["Hello"]]


def test_an_endpoint_that_fails_to_answer_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    job, answers = sudoku()
    endpoint = Endpoint(monkeypatch, {}, answers)
    with pytest.raises(KeyError), demo.ask_served(finished(job), TWO):
        pytest.fail("nothing was answered")
    assert endpoint.stopped == 1


def test_the_last_lines_are_the_report_and_three_commands() -> None:
    lines = demo.closing_lines(Path("runs/demo/report.html"), Path("my jobs/demo.toml"), ["task.blanks=[1, 2]"])
    assert lines[0] == "report: runs/demo/report.html"
    commands = [line.split("#")[0].strip() for line in lines if line.startswith("  dtrpo")]
    assert commands == [
        "dtrpo serve 'my jobs/demo.toml' --set 'task.blanks=[1, 2]'",
        "dtrpo export 'my jobs/demo.toml' out/aligned --set 'task.blanks=[1, 2]'",
        "dtrpo check PAIRS.jsonl",
    ]
