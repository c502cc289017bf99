"""`[sft]` and `[train]`: objective, optimizer, checkpoints, validation."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from dtrpo_ray.config.section import Section
from dtrpo_ray.config.task import Files


class Objective(Section):
    """The loss that a training stage minimises."""

    type: Literal["sft", "imitation", "dtrpo", "elbo_dpo"] = "dtrpo"
    """dtrpo, or a control on the same batches: elbo_dpo (VRPO on blocks), or the chosen side alone, in random states
    (sft) or in the very states that dtrpo scores (imitation)."""
    beta: float = Field(0.1, gt=0)
    """Inverse temperature of the implicit reward; multiplies a log-ratio in nats summed over the response."""
    loss_type: Literal["sigmoid", "ipo"] = "sigmoid"
    """As in TRL's DPOConfig, on log-ratios summed over the response. TRL's "ipo" averages, so its beta differs."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """As in TRL's DPOConfig (cDPO); sigmoid only."""
    rpo_alpha: float = Field(0.0, ge=0)
    """As in TRL's DPOConfig: weight of the chosen side's negative log-likelihood per token, here the masked-diffusion
    one at the sampled states; dtrpo and elbo_dpo."""
    nll_tokens: Literal["hidden", "unmasked"] = "hidden"
    """Tokens of a state that the negative log-likelihood of imitation and of dtrpo's rpo_alpha reads: all hidden ones,
    or the newly unmasked ones alone (the likelihood of the trajectory itself)."""
    weighting: Literal["steps", "tokens", "unit"] = "steps"
    """Weight of a sampled step, dtrpo and imitation: K_b or B_b/|I_t| (both unbiased), or 1 (the paper's figure)."""
    num_draws: Annotated[int, Field(ge=1)] | Literal["all"] = 1
    """Denoising steps sampled per block, in strata; "all" scores every step (exact, not for elbo_dpo). With
    complementary_masks, the number of pairs of states."""
    complementary_masks: bool = False
    """For sft, as Fast-dLLM v2 trains: states come in pairs, and what one hides of a block the other shows, so that
    each token is scored once, with equal weight. Absent: one state, and weights by which it estimates the ELBO."""
    schedule: Literal["recorded", "random", "confidence", "left_to_right"] = "recorded"
    """Source of the unmasking order, not for sft and elbo_dpo: recorded or constructed (docs/method.md)."""
    tokens_per_step: int = Field(1, ge=1)
    """Tokens unmasked per denoising step of a constructed schedule."""
    given_tokens: Literal["exclude", "clean"] = "exclude"
    """Tokens that no denoising step chose (autoregressive first tokens of blocks): left unscored, or scored from the
    clean stream; not for sft."""
    first_token: Literal["clean", "noisy"] = "clean"
    """State from which a shifted model predicts a block's first token: the clean block before it (as in decoding), or
    the noisy one (as in SFT)."""

    @property
    def is_preference(self) -> bool:
        """True if both sides of a pair are read and compared with a reference model."""
        return self.type in ("dtrpo", "elbo_dpo")

    @property
    def follows_steps(self) -> bool:
        """True if the sampled states are denoising steps, recorded or constructed by `schedule`."""
        return self.type in ("dtrpo", "imitation")

    @property
    def reads_all_hidden(self) -> bool:
        """True if the chosen side's likelihood reads every hidden token of a state."""
        has_nll = not self.is_preference or self.rpo_alpha > 0
        return not self.follows_steps or (has_nll and self.nll_tokens == "hidden")

    @property
    def num_states(self) -> int | Literal["all"]:
        """States sampled of each response, each a noisy stream of its packed row."""
        return 2 * self.num_draws if self.complementary_masks and self.num_draws != "all" else self.num_draws

    @property
    def needs_recorded_steps(self) -> bool:
        """True if each row must contain the denoising steps of its responses."""
        return self.follows_steps and self.schedule == "recorded"

    @property
    def orders_by_reference(self) -> bool:
        """True if the reference's confidence orders the tokens, which costs one more forward pass."""
        return self.follows_steps and self.schedule == "confidence"

    @model_validator(mode="after")
    def _fits_together(self) -> "Objective":
        if self.loss_type == "ipo" and self.label_smoothing:
            raise ValueError("label_smoothing belongs to loss_type = 'sigmoid' (cDPO); IPO has none")
        if self.complementary_masks and self.type != "sft":
            raise ValueError(f"complementary_masks belongs to type = 'sft', and not to {self.type!r}")
        if self.num_draws == "all" and not self.follows_steps:
            raise ValueError(
                f"num_draws = 'all' scores every denoising step, and type = {self.type!r} has none: set a number"
            )
        return self


class SFTObjective(Objective):
    """The objective of `[sft]`, whose type need not be written."""

    type: Literal["sft"] = "sft"


class LoraConfig(Section):
    """Train low-rank adapters and leave the base as it is; the reference is then the base itself, without a copy."""

    rank: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    """The adapter's product is scaled by alpha / rank."""
    targets: Literal["attention", "mlp", "attention+mlp", "mlp+output"] | None = None
    """Which linear modules get adapters; absent: attention+mlp, or attention where every MLP is a routed expert. A part
    that is asked for and that the family lacks (docs/families.md) is refused."""


class ValidationConfig(Section):
    """Validation of each checkpoint in a separate Ray task while training continues.

    On GPUs the task takes one; where the workers have them all, it waits until they are done.
    """

    num_prompts: int = Field(200, ge=1)
    """Fresh puzzles of the training split; or the first prompts of the table."""
    denoising_steps: int = Field(4, ge=1)
    """Denoising steps per block; greedy."""
    max_new_tokens: int = Field(16, ge=1)
    num_examples: int = Field(4, ge=0)
    """Answers written to validation.jsonl for each checkpoint."""


class TrainConfig(Section):
    """One training stage. Batches are counted in rows: pairs, or examples for sft."""

    objective: Objective = Objective()
    lr: float = Field(1e-5, gt=0)
    """Peak learning rate of AdamW."""
    num_epochs: int = Field(1, ge=1)
    max_steps: int | None = Field(None, ge=1)
    """Stop after this many optimizer steps, if fewer than the epochs hold."""
    global_batch: int = Field(64, ge=1)
    """Rows per optimizer step, over all workers."""
    micro_batch: int = Field(32, ge=1)
    """Largest number of rows per forward of one worker; gradient accumulation follows from it."""
    micro_tokens: int | None = Field(None, ge=1)
    """Largest number of tokens per forward of one worker, with padding; a longer row runs alone. Absent: no limit."""
    row_tokens: int | None = Field(None, ge=1)
    """Pairs, or examples of sft, of a micro-batch share packed rows of up to this many tokens; absent: each has a
    padded row."""
    gradient_checkpointing: bool = False
    """Recompute each layer in the backward pass instead of keeping it: less memory, about a third more time."""
    reference: Literal["frozen", "cache"] = "frozen"
    """Source of the reference's log-probs: a frozen copy in each step, or the files of `dtrpo ref-logps`."""
    warmup_ratio: float = Field(0.05, ge=0, le=1)
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage."""
    lora: LoraConfig | None = None
    """Present: train adapters; absent: train every weight."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on GPU, fp32 on CPU."""
    offload: bool = False
    """Keep the optimizer's state in CPU memory (DeepSpeed's CPU Adam); ZeRO stages 1 to 3."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """If loss or gradient is not finite: stop the run, or skip the step (ten in a row stop it). Its rows are logged."""
    log_every: int = Field(1, ge=1)
    """Optimizer steps between metric lines."""
    log_terms_every: int = Field(10, ge=0)
    """Metric lines between those that hold the gradient norms of the preference and the NLL term apart, and their
    cosine; 0: none (docs/method.md). For rpo_alpha > 0 and ZeRO stages 0 to 2; costs a float32 copy of the gradient."""
    save_every: int = Field(100, ge=1)
    """Optimizer steps between checkpoints; the last step is always saved."""
    keep_checkpoints: int = Field(2, ge=1)
    """How many of the newest complete checkpoints to keep."""
    held_out: float = Field(0.0, ge=0, lt=1)
    """Share of the rows, by hash of their ids, that is not trained on: its metrics, at the same draws each time, are
    logged as held_out_... with each checkpoint."""
    keep_best: Literal["loss", "nll", "nll_chosen", "margin", "reward_accuracy", "accuracy", "held_out_loss"] | None = (
        None
    )
    """Also keep the checkpoint with the best value of this metric; accuracy comes from [train.validation]."""
    validation: ValidationConfig | None = None
    """Present: each checkpoint answers prompts, and is scored where the task has a verifier."""

    @model_validator(mode="after")
    def _settings_fit_together(self) -> "TrainConfig":
        if self.reference == "cache" and not self.objective.is_preference:
            raise ValueError(f"reference = 'cache': objective.type = {self.objective.type!r} has no reference")
        if self.reference == "cache" and self.objective.schedule == "confidence":
            raise ValueError("schedule = 'confidence' runs the reference in each step: set reference = 'frozen'")
        if self.objective.orders_by_reference and not self.objective.is_preference:
            raise ValueError(
                f"schedule = 'confidence' orders by a reference, which {self.objective.type} lacks: choose another"
            )
        if self.keep_best in ("margin", "reward_accuracy") and not self.objective.is_preference:
            raise ValueError(
                f"keep_best = {self.keep_best!r} is of pairs, which {self.objective.type} does not compare"
            )
        if self.keep_best == "accuracy" and self.validation is None:
            raise ValueError("keep_best = 'accuracy' needs validation: add a section [train.validation]")
        if self.keep_best == "held_out_loss" and not self.held_out:
            raise ValueError("keep_best = 'held_out_loss' needs rows that are held out: set held_out, such as 0.02")
        if self.reference == "cache" and self.held_out:
            raise ValueError("reference = 'cache' has no log-probs of rows held out: set reference = 'frozen'")
        if self.offload and self.zero_stage == 0:
            raise ValueError("offload = true needs zero_stage 1, 2 or 3")
        return self

    @property
    def runs_reference(self) -> bool:
        """True if each optimizer step runs a frozen reference beside the policy."""
        return self.objective.is_preference and self.reference == "frozen"

    @property
    def held_out_objective(self) -> Objective:
        """The objective on the rows held out: for sft the ELBO, however its masks are drawn in training."""
        return self.objective.model_copy(update={"complementary_masks": False})

    def as_control(self, objective: str) -> "TrainConfig":
        """Return this training with another type of objective. Raises ValueError for settings that it does not have."""
        kept = self.model_dump(exclude={"objective", "reference", "keep_best", "validation"})
        changed = {**self.objective.model_dump(), "type": objective}
        return TrainConfig.model_validate({**kept, "objective": changed})

    @property
    def has_terms(self) -> bool:
        """True if some steps measure the gradients of the loss's two terms."""
        two = self.objective.is_preference and self.objective.rpo_alpha > 0
        return two and self.zero_stage < 3 and self.log_terms_every > 0

    def measures_terms(self, step: int) -> bool:
        """True if this optimizer step does so: the first that is logged, and each `log_terms_every`-th after it."""
        line, between = divmod(step, self.log_every)
        return self.has_terms and between == 0 and (line - 1) % self.log_terms_every == 0

    def rows_per_rank(self, num_workers: int) -> int:
        """Rows of one optimizer step on one rank; where it does not divide, the last ranks are filled with weight 0."""
        return -(-self.global_batch // num_workers)

    def accumulation(self, num_workers: int) -> int:
        """Micro-batches of one optimizer step on one rank."""
        return -(-self.rows_per_rank(num_workers) // self.micro_batch)


class SFTConfig(TrainConfig, Files):
    """Supervised fine-tuning on files or on generated puzzles, before any rollout: the trained model is the base."""

    type: ClassVar[str] = "sft"

    objective: SFTObjective = SFTObjective()
    lr: float = Field(2e-3, gt=0)
    """Peak learning rate of AdamW; must be given with model.path."""
    files: tuple[str, ...] = ()
    """Paths or URIs of files or folders of chat messages, prompts with completions, or Alpaca rows (docs/data.md);
    absent: a puzzle task generates the examples."""
    num_examples: int = Field(100_000, ge=1)
    """Generated training examples; without files."""

    @model_validator(mode="after")
    def _one_source(self) -> "SFTConfig":
        names = {"num_examples"} if self.files else Files.model_fields.keys() - {"files"}
        if surplus := names & self.changed_fields():
            remedy = "is for generated examples: limit a file by sft.max_rows" if self.files else "needs sft.files"
            raise ValueError(f"{min(surplus)} {remedy}")
        return self
