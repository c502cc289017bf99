"""Score recorded responses by a verifier, a function of the user's own, a reward model or a judge.

A judge scores all responses to some prompts at a time, the others a file of trajectory/v1.
"""

import importlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NotRequired, TypedDict

import pyarrow as pa

from dtrpo_ray.config.produce import ScoreConfig
from dtrpo_ray.data.schemas import TRAJECTORY
from dtrpo_ray.data.tables import TablePart, with_columns, write_whole
from dtrpo_ray.errors import ConfigError, DataError
from dtrpo_ray.models.hub import ModelSource
from dtrpo_ray.produce.function import FunctionSource, RewardFunction, Unscorable
from dtrpo_ray.produce.judge import Judge
from dtrpo_ray.produce.reward_model import LogLikelihood, RewardModel

# errors caused by the response itself, which then scores 0; OSError is the machine's and not among them
_RESPONSE_ERRORS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError, re.error)


class ScoreSummary(TypedDict):
    """The counts of a scored part."""

    rows: int
    scored: int
    sum: float
    comparisons: NotRequired[dict[str, int]]
    failed: NotRequired[int]
    caution: NotRequired[str]


def find_source(config: ScoreConfig, folder: Path) -> FunctionSource | ModelSource | None:
    """Find the function or the model that scores; None for a verifier and a judge.

    A function is looked for in `folder`, that of the job file. A model named by a hub id is fetched. Raises ConfigError
    or ModelError.
    """
    if config.function:
        return FunctionSource.find(config.function, folder)
    return ModelSource.find(config.reward_model) if config.reward_model else None


class Scorer:
    """Score the parts of a trajectory table, each into a file of the part's name; `source` is that of `find_source`."""

    def __init__(self, config: ScoreConfig, source: FunctionSource | ModelSource | None = None) -> None:
        self.score: RewardFunction | RewardModel | LogLikelihood | Judge | Verifier
        self.source = config.scorer
        if isinstance(source, FunctionSource):
            self.score = RewardFunction(source, config.batch_size)
        elif source is not None:
            likelihood = config.scorer == "log_likelihood"
            size, label = config.batch_size, config.reward_label
            self.score = LogLikelihood(source, size) if likelihood else RewardModel(source, size, label)
            self.source += f" {source.name}"
        elif config.judge is not None:
            self.score = Judge(config.judge)
            self.source += f" {config.judge.model.name}"
        else:
            self.score = Verifier(config.scorer)

    def __call__(self, part: TablePart, out: Path) -> ScoreSummary:
        """Score one part. Raises DataError naming the file and the row that cannot be scored."""
        table = part.read(TRAJECTORY)
        try:
            rewards = self._rewards(table)
        except Unscorable as error:
            row, reason = error.args
            raise DataError(f"{part}: row {table['row_id'][row].as_py()}: {reason}") from None
        given = [reward for reward in rewards if reward is not None]
        sources = [None if reward is None else self.source for reward in rewards]
        write_whole(with_columns(table, {"reward": list(rewards), "reward_source": sources}), out / part.name)
        summary: ScoreSummary = {"rows": len(table), "scored": len(given), "sum": sum(given)}
        if isinstance(self.score, Judge):
            summary["comparisons"], self.score.counts = dict(self.score.counts), Counter()
        if isinstance(self.score, Verifier):
            summary["caution"], summary["failed"], self.score.failed = self.score.caution(), self.score.failed, 0
        return summary

    def _rewards(self, table: pa.Table) -> Sequence[float | None]:
        if isinstance(self.score, RewardFunction):
            return self.score(table)
        return self.score(*(table[name].to_pylist() for name in ("prompt", "response", "answer")))


class Verifier:
    """Score rows by a module of verifiers/. `failed` counts the responses that raised an error and scored 0.

    A module has `score(prompt, response, answer) -> float`, and may have `caution() -> str`, a warning about this
    machine ("" for none), and `ANSWER_OPTIONAL = True` if the prompt alone may be enough.
    """

    def __init__(self, name: str) -> None:
        self.name, self.failed = name, 0
        self.module = importlib.import_module(f"dtrpo_ray.produce.verifiers.{name}")
        self.caution: Callable[[], str] = getattr(self.module, "caution", str)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], answers: Sequence[str | None]) -> list[float]:
        rewards, optional = [], getattr(self.module, "ANSWER_OPTIONAL", False)
        for row, texts in enumerate(zip(prompts, responses, answers, strict=True)):
            if answers[row] is None and not optional:
                raise Unscorable(row, f"answer is null, and score.scorer = {self.name!r} compares with it")
            try:
                rewards.append(float(self.module.score(*texts)))
            except ConfigError:
                raise
            except DataError as error:  # the reference is unreadable
                raise Unscorable(row, str(error)) from None
            except _RESPONSE_ERRORS:
                self.failed += 1
                rewards.append(0.0)
        return rewards
