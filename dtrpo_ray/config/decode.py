"""`[rollout]` and `[eval]`: the decoding of prompts."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dtrpo_ray.config.section import Section

STEPS = "denoising_steps"
POLICIES = {  # unmasking policy, a function of decode/policies.py -> the field that sets how much a step unmasks
    "low_confidence_static": STEPS,
    "low_confidence_dynamic": "threshold",
    "low_confidence_top_k": "tokens_per_step",
    "entropy_bounded": "entropy_bound",
    "sequential": STEPS,
}
ADAPTIVE = ("low_confidence_dynamic", "entropy_bounded")  # the policies whose steps depend on the model's confidence
AMOUNTS = {field: policy for policy, field in POLICIES.items() if field != STEPS}

if TYPE_CHECKING:  # a type checker cannot read the names from the table; pydantic does
    Remasking = str
    StepRemasking = str
else:
    Remasking = Literal[tuple(POLICIES)]
    StepRemasking = Literal[tuple(policy for policy, field in POLICIES.items() if field == STEPS)]


class Sampling(BaseModel):
    """The sampling parameters that [rollout], the HTTP API and the decoder share."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)
    steps_field: ClassVar[str] = ""  # the field of a subclass that no other amount may accompany

    temperature: float = Field(0.0, ge=0)
    """0 is greedy."""
    threshold: float | None = Field(None, gt=0, lt=1)
    """Instead of a number of steps: each step unmasks every token more probable than this."""
    tokens_per_step: int | None = Field(None, ge=1)
    """Instead of a number of steps: each step unmasks this many tokens, the most probable."""
    entropy_bound: float | None = Field(None, ge=0)
    """Instead of a number of steps: nats of entropy within which tokens are unmasked together (EB-Sampler)."""
    remasking: Remasking | None = None
    """The unmasking policy, where no field above implies it."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the smallest set of tokens with this probability."""
    top_k: int = Field(0, ge=0)
    """Sample from this many tokens; 0 is all."""
    block_length: int | None = Field(None, ge=1)
    """Tokens of a block: a full-attention model takes any number, a block-trained model only its own."""
    small_block_size: int | None = Field(None, ge=1)
    """Tokens of a sub-block; the sub-blocks of a block are unmasked in turn. Absent: as the model's release does."""

    @property
    def policy(self) -> str:
        """The unmasking policy: the one whose amount is given, else `remasking`."""
        implied = (policy for field, policy in AMOUNTS.items() if getattr(self, field) is not None)
        return next(implied, self.remasking or "low_confidence_static")

    @model_validator(mode="after")
    def _one_schedule(self) -> Self:
        given = {name: getattr(self, name) for name in AMOUNTS if getattr(self, name) is not None}
        if self.steps_field in self.model_fields_set:
            given[self.steps_field] = getattr(self, self.steps_field)
        if self.remasking not in (type(self).model_fields["remasking"].default, self.policy):
            given["remasking"] = self.remasking
        if len(given) > 1:
            listed = " and ".join(f"{name} = {value}" for name, value in given.items())
            raise ValueError(f"{listed} exclude each other; give one")
        if (amount := POLICIES[self.policy]) in AMOUNTS and amount not in given:
            raise ValueError(f"remasking = {self.policy} needs {amount}: set it too")
        return self


class RolloutConfig(Section, Sampling):
    """Decoding of training prompts into recorded trajectories."""

    steps_field = STEPS

    num_prompts: int = Field(2500, ge=1)
    """Fresh puzzles per round; with task.type = "prompts" every prompt is decoded, up to `task.max_rows`."""
    num_samples: int = Field(8, ge=2)
    """Samples per prompt."""
    temperature: float = Field(1.0, gt=0)
    denoising_steps: tuple[Annotated[int, Field(ge=1)], ...] = Field((2,), min_length=1)
    """Denoising steps per block; the samples of a prompt cycle through the list."""
    remasking: StepRemasking = "low_confidence_static"
    """Which tokens a step unmasks with `denoising_steps`: the most probable, or the leftmost."""
    batch_size: int = Field(256, ge=1)
    """Sequences that one actor decodes side by side."""
    max_new_tokens: int = Field(16, ge=1)

    @property
    def step_counts(self) -> tuple[int, ...]:
        """The numbers of denoising steps per block; () for a policy that is not measured in steps."""
        return self.denoising_steps if POLICIES[self.policy] == STEPS else ()


class Setting(NamedTuple):
    """One setting of an evaluation: the sampling parameter that says how much a step unmasks, and its value.

    As text, in tables and row ids, it is "denoising_steps=4" or "threshold=0.9". Settings of a field sort by forwards.
    """

    field: str
    value: float

    @classmethod
    def parse(cls, text: str) -> "Setting":
        """Return the setting of a text that `str` made."""
        field, value = text.split("=")
        return cls(field, int(value) if field == STEPS else float(value))

    def __str__(self) -> str:
        return f"{self.field}={self.value}"

    @property
    def label(self) -> str:
        """The setting in words: "4 steps per block", "threshold 0.9"."""
        if self.field == STEPS:
            return f"{self.value} step{'' if self.value == 1 else 's'} per block"
        return f"{self.field} {self.value}"


Control = Literal["imitation", "sft", "elbo_dpo"]


class EvalConfig(Section):
    """Comparison of the base and the aligned model on held-out prompts."""

    num_prompts: int = Field(2000, ge=1)
    budgets: tuple[Annotated[int, Field(ge=1)], ...] = (1, 2, 4)
    """Denoising steps per block to evaluate at (low_confidence_static)."""
    thresholds: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()
    """Thresholds to evaluate at (low_confidence_dynamic): a step unmasks every token more probable than this."""
    temperature: float = Field(0.0, ge=0)
    """0 is greedy."""
    batch_size: int = Field(500, ge=1)
    max_new_tokens: int = Field(16, ge=1)
    controls: tuple[Control, ...] = ()
    """Objectives that train on the last round's pairs too, as many steps, and are evaluated beside the aligned model:
    what it has more than "imitation" comes from the preferences."""

    @model_validator(mode="after")
    def _each_setting_once(self) -> "EvalConfig":
        for name, values in (("budgets", self.budgets), ("thresholds", self.thresholds), ("controls", self.controls)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name} = {list(values)} lists a {name.removesuffix('s')} twice")
        if not self.settings:
            raise ValueError("budgets and thresholds are both empty: give one of them a value")
        return self

    @property
    def settings(self) -> tuple[Setting, ...]:
        """What is evaluated, budgets first, each kind from few forwards to many."""
        return tuple(
            sorted([Setting(STEPS, k) for k in self.budgets] + [Setting("threshold", t) for t in self.thresholds])
        )
