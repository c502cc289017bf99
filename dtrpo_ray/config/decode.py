"""`[rollout]` and `[eval]`: how prompts are decoded."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dtrpo_ray.config.section import Section


class RolloutConfig(Section):
    """Decoding of training prompts into recorded trajectories."""

    num_prompts: int = Field(2500, ge=1)
    """Fresh puzzles per round; of a task of type "prompts" every prompt is decoded, up to `task.max_rows`."""
    num_samples: int = Field(8, ge=2)
    """Samples per prompt."""
    temperature: float = Field(1.0, gt=0)
    denoising_steps: tuple[Annotated[int, Field(ge=1)], ...] = Field((2,), min_length=1)
    """Denoising steps per block; samples of a prompt go through the list in turn."""
    threshold: float | None = Field(None, gt=0, lt=1)
    """Instead of `denoising_steps`: each step unmasks every token more probable than this."""
    tokens_per_step: int | None = Field(None, ge=1)
    """Instead of `denoising_steps`: each step unmasks this many tokens, the most probable."""
    entropy_bound: float | None = Field(None, ge=0)
    """Instead of `denoising_steps`: nats of entropy within which tokens are unmasked together (EB-Sampler)."""
    remasking: Literal["low_confidence_static", "sequential"] = "low_confidence_static"
    """With `denoising_steps`: which tokens a step unmasks, the most probable or the leftmost."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the smallest set of tokens with this probability."""
    top_k: int = Field(0, ge=0)
    """Sample from this many tokens; 0 is all."""
    block_length: int | None = Field(None, ge=1)
    """Tokens of a block, for a full-attention model; others have their own."""
    small_block_size: int | None = Field(None, ge=1)
    """Tokens of a sub-block; those of a block are unmasked in turn. Absent: as the model's release does."""
    batch_size: int = Field(256, ge=1)
    """Sequences decoded side by side by one actor."""
    max_new_tokens: int = Field(16, ge=1)

    @model_validator(mode="after")
    def _one_schedule(self) -> "RolloutConfig":
        ways = [name for name in ("threshold", "tokens_per_step", "entropy_bound") if getattr(self, name) is not None]
        ways += ["denoising_steps"] if "denoising_steps" in self.model_fields_set else []
        if len(ways) > 1:
            listed = " and ".join(f"{name} = {getattr(self, name)}" for name in ways)
            raise ValueError(f"{listed} exclude each other; give one")
        if self.remasking == "sequential" and ways and ways != ["denoising_steps"]:
            raise ValueError(f"remasking = 'sequential' goes with denoising_steps; {ways[0]} has a policy of its own")
        return self


class EvalConfig(Section):
    """Base against aligned on held-out prompts."""

    num_prompts: int = Field(2000, ge=1)
    budgets: tuple[Annotated[int, Field(ge=1)], ...] = Field((1, 2, 4), min_length=1)
    """Denoising steps per block to evaluate at."""
    temperature: float = Field(0.0, ge=0)
    """0 is greedy."""
    batch_size: int = Field(500, ge=1)
    max_new_tokens: int = Field(16, ge=1)
    num_examples: int = Field(4, ge=0)
    """Denoisings kept for the report."""

    @model_validator(mode="after")
    def _each_budget_once(self) -> "EvalConfig":
        if len(set(self.budgets)) < len(self.budgets):
            raise ValueError(f"budgets = {list(self.budgets)} names one twice")
        return self
