"""The sections `[drafts]`, `[score]` and `[pair]`: answers, their rewards, and the pairs made of them."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from dtrpo_ray.config.section import Section


class _LanguageModel(Section):
    model: Path
    """The directory of a model that vLLM runs (config.json, safetensors, tokenizer); each actor loads it."""
    engine: dict[str, str | int | float | bool] = Field({})
    """Arguments of vllm.LLM by its own names, for example {max_model_len = 4096, enforce_eager = true}."""


class DraftsConfig(_LanguageModel):
    """Answers of an ordinary (autoregressive) language model on vLLM to the prompts of `task.files`."""

    num_samples: int = Field(4, ge=1)
    """Answers per prompt."""
    temperature: float = Field(1.0, ge=0)
    """0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    """0: no limit."""
    max_new_tokens: int = Field(512, ge=1)
    """In tokens of that model; an answer that does not end within this limit goes to the quarantine file."""
    batch_size: int = Field(256, ge=1)
    """Prompts per part of the work; an interrupted part is repeated as a whole."""

    @model_validator(mode="after")
    def _samples_differ(self) -> "DraftsConfig":
        if self.temperature == 0 and self.num_samples > 1:
            raise ValueError(f"num_samples = {self.num_samples}: at temperature = 0 all answers are the same; set 1")
        return self


JUDGE_FIELDS = ("{prompt}", "{first}", "{second}")  # of a template
JUDGE_TEMPLATE = Path(__file__).with_name("judge.txt").read_text().rstrip()


class JudgeConfig(_LanguageModel):
    """A language model on vLLM that compares the responses to a prompt in pairs, in both orders, greedily."""

    template: str = JUDGE_TEMPLATE
    """The question; {prompt}, {first} and {second} are filled in, and a verdict A, B or tie is read from the reply."""
    max_new_tokens: int = Field(512, ge=1)
    """A reply that is cut off before its verdict counts as unparsable."""
    batch_size: int = Field(256, ge=1)
    """Approximate responses per part of the work; all responses to a prompt are judged together."""

    @model_validator(mode="after")
    def _has_its_fields(self) -> "JudgeConfig":
        if missing := [name for name in JUDGE_FIELDS if name not in self.template]:
            raise ValueError(f"template lacks {' and '.join(missing)}, which the judge needs: add it")
        return self


# each name is a module of dtrpo_ray/produce/verifiers; a new verifier is one file there and one name here
VerifierName = Literal["sudoku", "countdown", "gsm8k", "math", "python_tests", "instructions"]
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(@[^@\s]+)?")


def is_hub_id(name: str) -> bool:
    """Return True for org/name or org/name@revision of the Hugging Face Hub; False for what looks like a path.

    `models/NAME` looks like a path, and so does a name within a folder that is there.
    """
    return bool(_HUB_ID.fullmatch(name)) and not name.startswith("models/") and not Path(name).parent.is_dir()


ScorerName = Literal[VerifierName, "reward_model", "log_likelihood", "judge"]
FUNCTION = re.compile(r"(?!__main__\b)[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


COMPARING = ("gsm8k", "math", "python_tests", "instructions")  # scorers that need a reference answer


class ScoreConfig(Section):
    """Rewards of recorded trajectories."""

    scorer: ScorerName | str
    """A verifier (dtrpo_ray/produce/verifiers), which reads the column `answer`; a reward model; the likelihood under a
    language model; a language model as judge; or your own function, "module:function", of a module beside the job file
    or installed (docs/data.md)."""
    judge: JudgeConfig | None = None
    """For scorer = "judge"."""
    reward_model: str | None = Field(None, min_length=1)
    """A model with safetensors, as a directory or a Hugging Face id, "org/name" or "org/name@revision": a sequence
    classifier for scorer = "reward_model", a causal language model for "log_likelihood"."""
    reward_label: Annotated[int, Field(ge=0, strict=True)] | str | None = None
    """The label whose log-probability is the reward, by name or number, if reward_model has several."""
    batch_size: int = Field(16, ge=1)
    """Rows per forward of reward_model, or per call of your own function."""

    @property
    def function(self) -> str | None:
        """The name "module:function" if a function of the user's own scores."""
        return self.scorer if ":" in self.scorer else None

    @field_validator("scorer", mode="before")
    @classmethod
    def _known(cls, name: Any) -> Any:
        known = get_args(ScorerName)
        if name in known or (isinstance(name, str) and FUNCTION.fullmatch(name)):
            return name
        raise ValueError(f'{name!r} is no scorer; use one of {", ".join(known)}, or "module:function" of your own')

    @model_validator(mode="after")
    def _model_of_the_scorer(self) -> "ScoreConfig":
        if (self.scorer in ("reward_model", "log_likelihood")) != (self.reward_model is not None):
            scorers = "'reward_model' or 'log_likelihood'"
            raise ValueError(f"set reward_model (a directory or a hub id) if scorer is {scorers}, and only then")
        if self.reward_label is not None and self.scorer != "reward_model":
            raise ValueError("reward_label is a label of a reward model: remove it, or set scorer = 'reward_model'")
        if (self.scorer == "judge") != (self.judge is not None):
            raise ValueError("add the section [score.judge] if scorer = 'judge', and only then")
        return self

    @property
    def needs_answers(self) -> bool:
        """Return whether the scorer compares with the column `answer`."""
        return self.scorer in COMPARING


class PairConfig(Section):
    """Scored trajectories -> preference pairs."""

    strategy: Literal["closest", "best_worst", "all", "references", "faster"] = "closest"
    """closest: fewest differing tokens first; best_worst: highest against lowest reward, then second highest against
    second lowest; all: largest margin first, a response in any number of pairs; references: as best_worst, chosen from
    `reference_engine`, rejected from the others; faster: of two correct responses (reward 1 or more, and equal) the one
    with fewer denoising forwards is chosen, largest difference first, a response in one pair."""
    reference_engine: str = "reference"
    """The `engine` of reference responses, which pair with responses of any settings."""
    max_pairs_per_prompt: int = Field(1, ge=1)
    """Upper bound of pairs per prompt and setting."""
    min_margin: float = Field(0.5, gt=0)
    """Smallest difference between the rewards of a pair; with faster, between its numbers of denoising forwards."""
