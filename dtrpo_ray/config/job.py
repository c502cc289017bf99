"""The whole job file, and its section `[model]`."""

from pathlib import Path

from pydantic import Field, model_validator

from dtrpo_ray.config.cluster import ClusterConfig
from dtrpo_ray.config.decode import ADAPTIVE, EvalConfig, RolloutConfig
from dtrpo_ray.config.produce import DraftsConfig, PairConfig, ScoreConfig
from dtrpo_ray.config.section import Section
from dtrpo_ray.config.serve import ServeConfig
from dtrpo_ray.config.task import NoTask, PromptsTask, PuzzleTask, Task
from dtrpo_ray.config.train import SFTConfig, TrainConfig


class ModelInit(Section):
    """A randomly initialised model in the SDAR layout (Qwen3 trunk)."""

    hidden_size: int = Field(128, ge=8)
    num_layers: int = Field(4, ge=1)
    num_heads: int = Field(4, ge=1)
    intermediate_size: int = Field(256, ge=8)
    block_size: int = Field(4, ge=1)
    """Tokens of a block, on the global grid."""

    @model_validator(mode="after")
    def _heads_fit(self) -> "ModelInit":
        size, rest = divmod(self.hidden_size, self.num_heads)
        if rest or size % 2:
            raise ValueError(
                f"hidden_size = {self.hidden_size} / num_heads = {self.num_heads} is "
                f"{self.hidden_size / self.num_heads:g}; the units of a head must be an even whole number"
            )
        return self

    def sizes(self) -> dict[str, int]:
        """Return the sizes by their names in config.json."""
        return {
            **self.model_dump(include={"hidden_size", "intermediate_size", "block_size"}),
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_heads,
            "head_dim": self.hidden_size // self.num_heads,
        }


class ModelConfig(Section):
    """The source of the base model: a directory, or a random initialisation for [sft] to train."""

    path: Path | None = None
    """A model directory (config.json, model.safetensors, tokenizer)."""
    init: ModelInit | None = None
    """Sizes of a new model."""
    tokenizer: Path | None = None
    """A tokenizer directory for `init`; if absent, a puzzle task makes one."""

    @model_validator(mode="after")
    def _one_source(self) -> "ModelConfig":
        if (self.path is None) == (self.init is None):
            raise ValueError("give exactly one of model.path and model.init")
        if self.path is not None and self.tokenizer is not None:
            raise ValueError("model.tokenizer goes with model.init; model.path brings its own tokenizer")
        return self


class Job(Section):
    """Everything one run depends on."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    seed: int = Field(0, ge=0)
    storage: Path = Path("runs")
    """Folder of finished stages and reports."""
    rounds: int = Field(1, ge=1)
    """Times that rollout, pair and train run; each round starts from the newest policy, which is its reference."""
    task: Task = NoTask()
    model: ModelConfig
    sft: SFTConfig | None = None
    """Trains model.init or model.path on examples; absent: the initialised or given model is the base as it is."""
    rollout: RolloutConfig | None = None
    """Decodes puzzles, or the prompts of a task of type "prompts"; absent for tasks that bring their own pairs."""
    drafts: DraftsConfig | None = None
    """Answers the prompts of a task of type "prompts"."""
    score: ScoreConfig | None = None
    """Scores imported trajectories, drafts and rollouts of prompts; the puzzles score what they decode themselves."""
    pair: PairConfig = PairConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig | None = EvalConfig()
    serve: ServeConfig = ServeConfig()
    cluster: ClusterConfig = ClusterConfig()

    @property
    def puzzle(self) -> PuzzleTask | None:
        """The task if it generates prompts and verifies answers; None if it brings files."""
        return self.task if isinstance(self.task, PuzzleTask) else None

    @property
    def only_sft(self) -> bool:
        """True if there is no task: the job fine-tunes on its own files and aligns nothing."""
        return isinstance(self.task, NoTask)

    @property
    def last_stage(self) -> TrainConfig:
        """The training stage whose model is the job's result."""
        return self.sft if self.sft and self.only_sft else self.train

    @model_validator(mode="after")
    def _fits_together(self) -> "Job":
        kind = f"task.type = {self.task.type!r}"
        if not self.puzzle and self.model.init and self.model.tokenizer is None:
            raise ValueError(f"{kind} with model.init needs model.tokenizer, a tokenizer directory")
        if self.sft and not self.sft.files and not self.puzzle:
            raise ValueError(f"{kind} generates no examples: set sft.files, or remove [sft]")
        if self.sft and self.sft.keep_best == "accuracy" and not self.puzzle:
            raise ValueError(f"sft.keep_best = 'accuracy': {kind} has no verifier")
        if self.only_sft:
            self._fits_sft()
        elif not self.puzzle:
            self._fits_files(kind)
        elif self.rollout is None:
            raise ValueError(f"{kind} has no pairs of its own: add a [rollout] section")
        elif self.puzzle.in_words and self.model.init and self.model.tokenizer is None:
            raise ValueError(f"{kind} with model.init needs model.tokenizer, a tokenizer directory")
        elif self.score or self.drafts:
            surplus = "[score]" if self.score else "[drafts]"
            raise ValueError(f"{kind} decodes its own prompts and scores the answers: remove {surplus}")
        if self.sft and self.model.path and "lr" not in self.sft.model_fields_set:
            rate = f"sft.lr = {self.sft.lr:g}, the default, is for a new model"
            raise ValueError(f"{rate}: set sft.lr for model.path; published models take about 1e-5")
        for name, stage in (("sft", self.sft), ("train", self.train)):
            batch, workers = stage.global_batch if stage else 0, self.cluster.num_workers
            if stage and isinstance(workers, int) and batch % workers:
                raise ValueError(f"{name}.global_batch = {batch} must be a multiple of cluster.num_workers = {workers}")
            if stage and batch < self.cluster.most_workers:
                most = f"{self.cluster.most_workers}, the most workers of cluster.num_workers"
                raise ValueError(f"{name}.global_batch = {batch} must be at least {most}")
        needed = self.task.answer_tokens
        for name, section in (("rollout", self.rollout), ("eval", self.eval)):
            if section and section.max_new_tokens < needed:
                raise ValueError(f"{name}.max_new_tokens = {section.max_new_tokens}: an answer has {needed} tokens")
        if self.pair.strategy == "faster":
            self._fits_faster()
        for control in self.eval.controls if self.eval else ():
            try:
                self.train.as_control(control)
            except ValueError as error:
                raise ValueError(f"eval.controls: {control!r} cannot train with [train]: {error}") from None
        if self.rollout and self.model.init:
            worst = max((*self.rollout.step_counts, *(self.eval.budgets if self.eval else ()), 1))
            if worst > self.model.init.block_size:
                raise ValueError(f"{worst} denoising steps per block exceed block_size = {self.model.init.block_size}")
        return self

    def _fits_sft(self) -> None:
        if self.sft is None:
            raise ValueError("there is no section [task]: add it, or set sft.files to train on your own files")
        parts = ("rounds", "rollout", "drafts", "score", "pair", "train", "eval")
        if surplus := [name for name in parts if name in self.changed_fields()]:
            raise ValueError(f"without a section [task] nothing is aligned: add it, or remove {', '.join(surplus)}")

    def _fits_faster(self) -> None:
        named, objective = "pair.strategy = 'faster'", self.train.objective
        if self.drafts:
            raise ValueError(f"{named} counts denoising forwards, and [drafts] has none: use [rollout]")
        if self.rollout and self.rollout.policy not in ADAPTIVE:
            raise ValueError(
                f"{named}: rollout.remasking = {self.rollout.policy!r} unmasks as much in each step whatever the model "
                "says, so answers of one length take the same forwards: set rollout.threshold or rollout.entropy_bound"
            )
        if self.score and self.score.scorer in ("reward_model", "judge", "log_likelihood"):
            raise ValueError(f"{named} needs to know what is correct: set score.scorer to a verifier")
        if objective.is_preference and not objective.needs_recorded_steps:
            raise ValueError(
                f"{named} prefers steps to steps, often of one answer: set train.objective.type = 'dtrpo' and "
                "train.objective.schedule = 'recorded', which read them"
            )

    def _fits_files(self, kind: str) -> None:
        if isinstance(self.task, PromptsTask):
            self._fits_prompts(self.task.max_response_tokens)
        elif self.rollout or self.drafts:
            raise ValueError(f"{kind} reads responses from files: remove [rollout] and [drafts]")
        if self.rounds > 1 and not self.rollout:
            raise ValueError(f"{kind} generates no prompts: remove rounds")
        if self.train.keep_best == "accuracy":
            raise ValueError(f"train.keep_best = 'accuracy': {kind} has no verifier")
        if self.task.brings_responses or self.rollout:
            return
        if self.score and self.task.brings_pairs:
            raise ValueError(f"{kind} reads pairs, and there are no responses to score: remove [score]")
        if self.train.objective.needs_recorded_steps:
            raise ValueError(f"{kind} has no recorded steps: set train.objective.schedule = 'random'")

    def _fits_prompts(self, longest: int) -> None:
        if (self.rollout is None) == (self.drafts is None):
            raise ValueError("task.type = 'prompts' needs exactly one of [rollout] and [drafts] to answer the prompts")
        if self.rollout is None:
            return
        if self.score is None:
            raise ValueError("task.type = 'prompts' has no scorer of its own: add a [score] section to [rollout]")
        if "num_prompts" in self.rollout.model_fields_set:
            raise ValueError("rollout.num_prompts is for puzzles only: limit the prompts of a file by task.max_rows")
        if (tokens := self.rollout.max_new_tokens) > longest:
            raise ValueError(f"rollout.max_new_tokens = {tokens} exceeds task.max_response_tokens = {longest}")
