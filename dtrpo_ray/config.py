"""A TOML job file and dotted overrides -> one frozen, validated `Job`. Imports neither torch nor ray.

Every field has one default, one unit and one sentence; a field of another variant is an error, never ignored.
"""

import difflib
import os
import tomllib
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dtrpo_ray.errors import ConfigError

SUDOKU_TOKENS = 16  # of an answer
KEY_VARIABLE = "DTRPO_API_KEY"  # of the environment: API keys with commas between them


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _as_written(cls, values: Any) -> Any:
        """pydantic would read true as 1, and "3" or "yes" as a number or a truth: here they are mistakes."""
        for name, value in values.items() if isinstance(values, dict) else ():
            kinds = _kinds(cls.model_fields[name].annotation) if name in cls.model_fields else {object}
            numeric = bool(kinds & {int, float, bool}) and not kinds - {int, float, bool, type(None)}
            quoted = isinstance(value, str) and (bool in kinds or not value.isalpha())
            if numeric and (quoted or (isinstance(value, bool) and bool not in kinds)):
                wanted = "true or false" if bool in kinds else "a number"
                raise ValueError(f"{name} = {value!r} must be {wanted}, written without quotes")
        return values


def _kinds(annotation: Any) -> set[Any]:
    """The plain types that an annotation allows."""
    parts = get_args(annotation)
    if not parts or get_origin(annotation) not in (Union, UnionType, Annotated):
        return {annotation}
    return set().union(*(_kinds(part) for part in (parts[:1] if get_origin(annotation) is Annotated else parts)))


class SudokuTask(_Section):
    """4x4 Sudoku puzzles, generated; 30 % of the grids are held out by hash."""

    type: Literal["sudoku"]
    blanks: tuple[int, int] = (4, 12)
    """Fewest and most blank cells of a generated puzzle."""
    public_tests: tuple[Path, ...] = ()
    """Test files nobody here wrote (JSONL of input and output), evaluated where they exist."""

    @model_validator(mode="after")
    def _range(self) -> "SudokuTask":
        if not 1 <= self.blanks[0] <= self.blanks[1] <= 16:
            raise ValueError(f"blanks = {list(self.blanks)} must be two rising numbers between 1 and 16")
        return self


class CountdownTask(_Section):
    """Countdown: reach a target from numbers, each used once; generated, with variable-length answers."""

    type: Literal["countdown"]
    numbers: int = Field(3, ge=2, le=4)
    """How many numbers a puzzle gives."""
    public_tests: tuple[Path, ...] = ()
    """Test files nobody here wrote (JSONL of input and output), evaluated where they exist."""


class _FilesTask(_Section):
    files: tuple[str, ...] = Field(min_length=1)
    """Paths or URIs (s3://, gs://) of files or folders; the format is recognised by the columns (docs/data.md)."""
    max_prompt_tokens: int = Field(512, ge=1)
    """Longer prompts lose their beginning."""
    max_response_tokens: int = Field(512, ge=1)
    """Rows with a longer response go to the quarantine file."""
    max_rows: int | None = Field(None, ge=1)
    """Read no more rows than this."""
    strict: bool = False
    """Stop at the first row that would go to the quarantine file."""


class PreferencesTask(_FilesTask):
    """Preference pairs from files: no generator and no verifier, so no rollout, pairing or accuracy."""

    type: Literal["preferences"]


class TrajectoriesTask(_FilesTask):
    """Responses from files, with or without step maps: scored and paired here, no rollout and no accuracy."""

    type: Literal["trajectories"]


class PromptsTask(_FilesTask):
    """Prompts from files, answered by the model itself ([rollout]) or by an ordinary one ([drafts]): no accuracy."""

    type: Literal["prompts"]


FilesTask = PreferencesTask | TrajectoriesTask | PromptsTask
Task = Annotated[SudokuTask | CountdownTask | FilesTask, Field(discriminator="type")]


class ModelInit(_Section):
    """A randomly initialised model in the SDAR layout (Qwen3 trunk)."""

    hidden_size: int = Field(128, ge=8)
    num_layers: int = Field(4, ge=1)
    num_heads: int = Field(4, ge=1)
    num_kv_heads: int | None = Field(None, ge=1)
    """Key/value heads; num_heads if absent."""
    intermediate_size: int = Field(256, ge=8)
    block_size: int = Field(4, ge=1)
    """Tokens of a block, on the global grid."""

    @model_validator(mode="after")
    def _heads_fit(self) -> "ModelInit":
        size, rest = divmod(self.hidden_size, self.num_heads)
        if rest or size % 2:
            raise ValueError(
                f"hidden_size = {self.hidden_size} gives {self.num_heads} heads {self.hidden_size / self.num_heads:g} "
                "units each; it must be an even whole number"
            )
        if self.num_kv_heads and self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads = {self.num_kv_heads} does not divide num_heads = {self.num_heads}")
        return self


class ModelConfig(_Section):
    """Where the base model comes from: a directory, or a random initialisation that [sft] trains."""

    path: Path | None = None
    """A model directory (config.json, model.safetensors, tokenizer)."""
    init: ModelInit | None = None
    """Sizes of a new model."""
    tokenizer: Path | None = None
    """A tokenizer directory for `init`; a puzzle task makes its own if absent."""

    @model_validator(mode="after")
    def _one_source(self) -> "ModelConfig":
        if (self.path is None) == (self.init is None):
            raise ValueError("give exactly one of model.path and model.init")
        if self.path is not None and self.tokenizer is not None:
            raise ValueError("model.tokenizer goes with model.init; model.path brings its own tokenizer")
        return self


class Objective(_Section):
    """What a training stage minimises."""

    type: Literal["sft", "dtrpo", "elbo_dpo"] = "dtrpo"
    """dtrpo; or a control on the same batches: sft (chosen side only) or elbo_dpo (VRPO on blocks)."""
    beta: float = Field(0.1, gt=0)
    """Inverse temperature of the implicit reward; multiplies a log-ratio in nats summed over the response."""
    loss_type: Literal["sigmoid", "ipo"] = "sigmoid"
    """As in TRL's DPOConfig, on log-ratios summed over the response; TRL's "ipo" averages, so its beta is another."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """As in TRL's DPOConfig (cDPO); sigmoid only."""
    rpo_alpha: float = Field(0.0, ge=0)
    """As in TRL's DPOConfig: weight of the chosen side's negative log-likelihood per token, here the masked-diffusion
    one at the sampled states; dtrpo and elbo_dpo."""
    weighting: Literal["steps", "tokens", "unit"] = "steps"
    """Weight of a sampled step, dtrpo only: K_b or B_b/|I_t| (both unbiased), or 1 (the paper's figure)."""
    num_draws: Annotated[int, Field(ge=1)] | Literal["all"] = 1
    """Denoising steps sampled per block, stratified; "all" takes every step (exact, dtrpo only); ELBO draws else."""
    schedule: Literal["recorded", "random", "confidence", "left_to_right"] = "recorded"
    """Where the unmasking order comes from, dtrpo only: the row's recorded steps, or one made up (docs/method.md)."""
    tokens_per_step: int = Field(1, ge=1)
    """Tokens unmasked per denoising step of a made-up schedule."""
    given_tokens: Literal["exclude", "clean"] = "exclude"
    """Tokens no denoising step chose (autoregressive firsts of blocks), dtrpo and elbo_dpo only: unscored, or scored
    from the clean stream."""
    first_token: Literal["clean", "noisy"] = "clean"
    """Where a shifted model reads a block's first token: the clean block before it (decoder), or the noisy (SFT)."""

    @model_validator(mode="after")
    def _fits_together(self) -> "Objective":
        if self.loss_type == "ipo" and self.label_smoothing:
            raise ValueError("label_smoothing belongs to loss_type = 'sigmoid' (cDPO); IPO has none")
        if self.num_draws == "all" and self.type != "dtrpo":
            raise ValueError(f"num_draws = 'all' takes the steps of a trajectory, which {self.type} lacks")
        return self


class LoraConfig(_Section):
    """Train low-rank adapters and leave the base as it is; the reference is then the base itself, without a copy."""

    rank: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    """The adapter's product is scaled by alpha / rank."""
    targets: Literal["attention", "mlp", "attention+mlp", "mlp+output"] | None = None
    """Which linear modules get adapters; absent: attention+mlp, or attention where every MLP is a routed expert. A part
    that is asked for and that the family lacks (docs/families.md) is refused."""


class ValidationConfig(_Section):
    """What each checkpoint is asked while the training goes on, in a task of its own beside it.

    On GPUs the task takes one; where the workers have them all, it waits until they are done.
    """

    num_prompts: int = Field(200, ge=1)
    """Fresh puzzles of the training split; or the first prompts of the table."""
    denoising_steps: int = Field(4, ge=1)
    """Denoising steps per block; greedy."""
    max_new_tokens: int = Field(16, ge=1)
    num_examples: int = Field(4, ge=0)
    """Answers kept in validation.jsonl."""


class TrainConfig(_Section):
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
    """Most rows per forward of one worker; gradient accumulation is derived."""
    micro_tokens: int | None = Field(None, ge=1)
    """Most tokens per forward of one worker, padding counted; a longer row goes alone. Absent: `micro_batch` alone."""
    row_tokens: int | None = Field(None, ge=1)
    """Pairs of a micro-batch share packed rows of up to this many tokens; absent: one pair a row, padded."""
    gradient_checkpointing: bool = False
    """Recompute each layer in the backward pass instead of keeping it: less memory, about a third more time."""
    reference: Literal["frozen", "cache"] = "frozen"
    """The reference's log-probs: from a frozen copy in the same step, or written beforehand (dtrpo ref-logps)."""
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
    """A loss or gradient that is not finite: stop the run, or drop the step (never ten in a row). Rows are logged."""
    log_every: int = Field(1, ge=1)
    """Optimizer steps between metric lines."""
    save_every: int = Field(100, ge=1)
    """Optimizer steps between checkpoints; the last step is always saved."""
    keep_checkpoints: int = Field(2, ge=1)
    """The newest whole ones that are kept."""
    keep_best: Literal["loss", "nll", "nll_chosen", "margin", "reward_accuracy", "accuracy"] | None = None
    """Keep the checkpoint with the best such metric too; accuracy is that of [train.validation]."""
    validation: ValidationConfig | None = None
    """Present: each checkpoint answers prompts, and is scored where the task has a verifier."""

    @model_validator(mode="after")
    def _cache_of_a_reference(self) -> "TrainConfig":
        if self.reference == "cache" and self.objective.type == "sft":
            raise ValueError("reference = 'cache': the objective sft has no reference")
        if self.reference == "cache" and self.objective.schedule == "confidence":
            raise ValueError("schedule = 'confidence' needs the reference at hand to order by: reference = 'frozen'")
        return self

    @model_validator(mode="after")
    def _best_of_validation(self) -> "TrainConfig":
        if self.keep_best == "accuracy" and self.validation is None:
            raise ValueError("keep_best = 'accuracy' is measured by validation: add that section")
        return self

    def rows_per_rank(self, num_workers: int) -> int:
        """Rows of one optimizer step on one rank; where it does not divide, the last ranks are filled with weight 0."""
        return -(-self.global_batch // num_workers)

    def accumulation(self, num_workers: int) -> int:
        """Micro-batches of one optimizer step on one rank."""
        return -(-self.rows_per_rank(num_workers) // self.micro_batch)

    @model_validator(mode="after")
    def _offload_is_of_zero(self) -> "TrainConfig":
        if self.offload and self.zero_stage == 0:
            raise ValueError("offload = true needs zero_stage 1, 2 or 3")
        return self


class SFTConfig(TrainConfig):
    """Training of a new base model on generated examples."""

    objective: Objective = Objective(type="sft")
    lr: float = Field(2e-3, gt=0)
    num_examples: int = Field(100_000, ge=1)
    """Generated training examples."""


class RolloutConfig(_Section):
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


class _LanguageModel(_Section):
    model: Path
    """The directory of a model that vLLM runs (config.json, safetensors, tokenizer); each actor loads it."""
    engine: dict[str, str | int | float | bool] = {}
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
    """In tokens of that model; an answer that does not end before goes to the quarantine file."""
    batch_size: int = Field(256, ge=1)
    """Prompts of one part of the work, which is done whole or done again."""

    @model_validator(mode="after")
    def _samples_differ(self) -> "DraftsConfig":
        if self.temperature == 0 and self.num_samples > 1:
            raise ValueError(f"num_samples = {self.num_samples}: at temperature = 0 they are all the same; set 1")
        return self


JUDGE_FIELDS = ("{prompt}", "{first}", "{second}")  # of a template
JUDGE_TEMPLATE = """Compare two answers to the same request. Judge how well each serves the request, and neither its \
place nor its length.

[Request]
{prompt}

[Answer A]
{first}

[Answer B]
{second}

[Task]
Say in a few sentences which answer is better and why. Then end with one line: "Verdict: A", "Verdict: B" or, if \
neither is better, "Verdict: tie"."""


class JudgeConfig(_LanguageModel):
    """A language model on vLLM that compares the responses to a prompt two by two, in both orders, greedily."""

    template: str = JUDGE_TEMPLATE
    """What it is asked; {prompt}, {first} and {second} are filled in, and a verdict A, B or tie is read back."""
    max_new_tokens: int = Field(512, ge=1)
    """A reply that is cut off before its verdict is unparsable."""
    batch_size: int = Field(256, ge=1)
    """Responses of one part of the work, about: all that answer a prompt are judged together."""

    @model_validator(mode="after")
    def _has_its_fields(self) -> "JudgeConfig":
        if missing := [name for name in JUDGE_FIELDS if name not in self.template]:
            raise ValueError(f"template lacks {' and '.join(missing)}: the judge must see what it compares")
        return self


class ScoreConfig(_Section):
    """Rewards of recorded trajectories."""

    scorer: Literal["sudoku", "countdown", "gsm8k", "math", "python_tests", "instructions", "reward_model", "judge"]
    """A verifier of dtrpo_ray/verifiers, which reads the column `answer`; a reward model; a language model as judge."""
    judge: JudgeConfig | None = None
    """For scorer = "judge"."""
    reward_model: Path | None = None
    """A Hugging Face sequence-classification model of one label, for scorer = "reward_model"."""
    batch_size: int = Field(16, ge=1)
    """Rows of one forward of the reward model."""

    @model_validator(mode="after")
    def _model_of_the_scorer(self) -> "ScoreConfig":
        if (self.scorer == "reward_model") != (self.reward_model is not None):
            raise ValueError("scorer = 'reward_model' and reward_model, a model directory, go together")
        if (self.scorer == "judge") != (self.judge is not None):
            raise ValueError("scorer = 'judge' and a section [score.judge] go together")
        return self


class PairConfig(_Section):
    """Scored trajectories -> preference pairs."""

    strategy: Literal["closest", "best_worst", "all", "references"] = "closest"
    """closest: fewest differing tokens first; best_worst: highest against lowest reward, then second highest against
    second lowest; all: largest margin first, a response in any number of pairs; references: as best_worst, chosen from
    `reference_engine`, rejected from the others."""
    reference_engine: str = "reference"
    """The `engine` of reference responses, which pair with responses of any settings."""
    max_pairs_per_prompt: int = Field(1, ge=1)
    """Most pairs of a prompt and setting."""
    min_margin: float = Field(0.5, gt=0)
    """Smallest difference of rewards; ties never pair."""


class EvalConfig(_Section):
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


class ServeConfig(_Section):
    """The HTTP endpoint. It listens on loopback unless a host is named."""

    checkpoint: str = ""
    """A model directory; empty: the aligned model of this job."""
    model_name: str = "dtrpo"
    """The name clients ask for."""
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    other_models: dict[str, str] = {}
    """More models of the same endpoint, name to directory: a model, or a LoRA adapter on `checkpoint`'s weights."""
    num_replicas: int = Field(1, ge=0)
    """Replicas, or the fewest of them where max_replicas is set; 0 of them wait for a first request."""
    max_replicas: int | None = Field(None, ge=1)
    """Most replicas; between the two numbers they follow the requests under way."""
    max_batch: int = Field(64, ge=1)
    """Choices that one replica decodes side by side; more wait."""
    cache_tokens: int = Field(65536, ge=1)
    """Tokens whose keys and values a replica keeps, those of requests under way included."""
    denoising_steps: int = Field(4, ge=1)
    """Denoising steps per block where a request names none."""
    max_new_tokens: int = Field(1024, ge=1)
    """Most tokens a request may ask for."""
    api_key_file: Path | None = None
    """A file of keys, one a line; it, or DTRPO_API_KEY, is required to listen on any address but loopback."""

    @model_validator(mode="after")
    def _open_only_with_a_key(self) -> "ServeConfig":
        has_keys = self.api_key_file is not None or os.environ.get(KEY_VARIABLE, "").strip(" ,")
        if self.host not in ("127.0.0.1", "localhost", "::1") and not has_keys:
            raise ValueError(f"serve.host = {self.host!r} is open to the network: set serve.api_key_file too")
        if self.num_replicas > (self.max_replicas or max(self.num_replicas, 1)) or not (
            self.num_replicas or self.max_replicas
        ):
            raise ValueError(f"serve.num_replicas = {self.num_replicas} needs a serve.max_replicas of at least as many")
        if self.model_name in self.other_models:
            raise ValueError(f"serve.other_models names {self.model_name!r} again; give each model its own name")
        return self


class ClusterConfig(_Section):
    """Where the work runs."""

    address: str = "local"
    """`local` starts Ray here; `auto` joins the cluster this job was submitted to."""
    num_workers: Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = 2
    """Ray Train workers; [fewest, most]: as many as the cluster has, changing when nodes come and go."""
    num_actors: int = Field(2, ge=1)
    """Actors that do the parts of prepare, rollout, drafts, score, ref-logps and evaluation."""
    use_gpu: Literal["auto", "yes", "no"] = "auto"
    """auto: one GPU a worker if the cluster has any now; yes: a cluster that has none yet is waited for."""
    max_failures: int = Field(3, ge=0)
    """Restarts of a training stage from its last checkpoint; leaving a drained node is not counted."""
    hang_seconds: int = Field(1800, ge=5)
    """A worker that finishes no optimizer step or checkpoint for so long dumps its stacks, dies and is restarted."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Where metrics go besides metrics.jsonl; each package only if it is named here."""
    profile_steps: int = Field(0, ge=0)
    """Optimizer steps of rank 0 that torch's profiler traces, from the third of an attempt on."""
    checkpoints: str | None = None
    """Where training checkpoints go: a path or an s3:// or gs:// URI; absent: the stage's own folder."""

    @property
    def fewest_workers(self) -> int:
        """The number of workers, or the lower end of the range."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def most_workers(self) -> int:
        """The number of workers, or the upper end of the range."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @model_validator(mode="after")
    def _rising(self) -> "ClusterConfig":
        if not isinstance(self.num_workers, int) and self.num_workers[0] > self.num_workers[1]:
            raise ValueError(f"num_workers = {list(self.num_workers)} must be [fewest, most]")
        return self


class Job(_Section):
    """Everything one run depends on."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    seed: int = Field(0, ge=0)
    storage: Path = Path("runs")
    """Folder of finished stages and reports."""
    rounds: int = Field(1, ge=1)
    """Times rollout, pair and train repeat; the reference is reset to the newest policy each round."""
    task: Task
    model: ModelConfig
    sft: SFTConfig | None = None
    """Trains model.init; absent: the initialised or given model is the base as it is."""
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
    def is_puzzle(self) -> bool:
        """Whether the task makes its own prompts and verifies answers, or brings files."""
        return not isinstance(self.task, _FilesTask)

    @model_validator(mode="after")
    def _fits_together(self) -> "Job":
        if self.is_puzzle:
            if self.rollout is None:
                raise ValueError(f"task.type = {self.task.type!r} has no pairs of its own: add a [rollout] section")
            if self.score:
                raise ValueError(f"task.type = {self.task.type!r} scores what it decodes: remove [score]")
            if self.drafts:
                raise ValueError(f"task.type = {self.task.type!r} decodes its own prompts: remove [drafts]")
        else:
            self._fits_files()
        if self.sft and self.sft.objective.type != "sft":
            raise ValueError(f"sft.objective.type = {self.sft.objective.type!r} must be 'sft'")
        if self.sft and self.model.path:
            raise ValueError("[sft] trains model.init from scratch; remove it where model.path is given")
        for name, stage in (("sft", self.sft), ("train", self.train)):
            workers = self.cluster.num_workers
            if stage and isinstance(workers, int) and stage.global_batch % workers:
                raise ValueError(
                    f"{name}.global_batch = {stage.global_batch} does not divide by cluster.num_workers = {workers}"
                )
            if stage and stage.global_batch < self.cluster.most_workers:
                raise ValueError(f"{name}.global_batch = {stage.global_batch} gives some of {workers} workers no row")
        lengths = {"rollout": self.rollout, "eval": self.eval}
        for name, section in lengths.items():
            if self.task.type == "sudoku" and section and section.max_new_tokens < SUDOKU_TOKENS:
                raise ValueError(f"{name}.max_new_tokens = {section.max_new_tokens}: a grid has {SUDOKU_TOKENS} digits")
        if self.rollout and self.model.init:
            worst = max(*self.rollout.denoising_steps, *(self.eval.budgets if self.eval else (1,)))
            if worst > self.model.init.block_size:
                raise ValueError(f"{worst} denoising steps per block exceed block_size = {self.model.init.block_size}")
        return self

    def _fits_files(self) -> None:
        kind = f"task.type = {self.task.type!r}"
        if self.task.type == "prompts":
            self._fits_prompts(self.task.max_response_tokens)
        elif self.rollout or self.drafts:
            raise ValueError(f"{kind} brings its responses: remove [rollout] and [drafts]")
        if self.sft or (self.rounds > 1 and not self.rollout):
            raise ValueError(f"{kind} has neither examples nor puzzles to make: remove [sft] and rounds")
        if self.train.keep_best == "accuracy":
            raise ValueError(f"train.keep_best = 'accuracy': {kind} has no verifier")
        if self.model.init and self.model.tokenizer is None:
            raise ValueError(f"{kind} with model.init needs model.tokenizer, a tokenizer directory")
        if self.task.type == "trajectories" or self.rollout:
            return
        if self.score and self.task.type == "preferences":
            raise ValueError(f"{kind} brings pairs, not responses to score: remove [score]")
        if self.train.objective.type == "dtrpo" and self.train.objective.schedule == "recorded":
            raise ValueError(f"{kind} has no recorded steps: set train.objective.schedule = 'random'")

    def _fits_prompts(self, longest: int) -> None:
        if (self.rollout is None) == (self.drafts is None):
            raise ValueError("task.type = 'prompts': give [rollout] or [drafts], one of which answers them")
        if self.rollout is None:
            return
        if self.score is None:
            raise ValueError("task.type = 'prompts' has no scorer of its own: add a [score] section to [rollout]")
        if "num_prompts" in self.rollout.model_fields_set:
            raise ValueError("rollout.num_prompts counts puzzles: of a file's prompts, task.max_rows are read")
        if self.rollout.max_new_tokens > longest:
            raise ValueError(
                f"rollout.max_new_tokens = {self.rollout.max_new_tokens} exceeds task.max_response_tokens = {longest}"
            )


def load_job(path: Path, overrides: Sequence[str] = ()) -> Job:
    """Parse a job file, apply `dotted.key=value` overrides (values are TOML; bare words are strings), validate.

    Raises ConfigError naming the file, the field, the value and what is allowed.
    """
    try:
        tree = tomllib.loads(path.read_text("utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such job file; shipped ones lie in jobs/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a job file ({error})") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    for override in overrides:
        _apply(tree, override)
    try:
        job = Job.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {_explain(problem)}" for problem in error.errors())) from None
    _require_files(path, job)
    return job


def load_serve(checkpoint: Path, overrides: Sequence[str] = ()) -> ServeConfig:
    """The endpoint of a model directory that no job made: the defaults of `[serve]` and `field=value` overrides.

    Raises ConfigError naming the field, the value and what is allowed.
    """
    tree: dict[str, Any] = {}
    for override in overrides:
        _apply(tree, override)
    try:
        return ServeConfig.model_validate({**tree, "checkpoint": str(checkpoint)})
    except ValidationError as error:
        told = "\n".join(f"serve {checkpoint}: {_explain(problem, ServeConfig)}" for problem in error.errors())
        raise ConfigError(told) from None


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key or "\n" in override:
        raise ConfigError(f"--set {override}: expected dotted.key=value, for example train.lr=1e-5")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        value = text
    *parents, leaf = key.strip().split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"--set {override}: {parent} is a value, not a section")
    tree[leaf] = value


def _explain(problem: Any, root: type[_Section] = Job) -> str:
    # a discriminated union puts the variant's name into the path; users know it as the section alone
    parts = [str(p) for i, p in enumerate(problem["loc"]) if not (i == 1 and problem["loc"][0] == "task")]
    where = ".".join(parts)
    if problem["type"] == "extra_forbidden":
        return f"unknown field {where}{_suggestion(root, problem['loc'], where)}"
    message = problem["msg"].removeprefix("Value error, ")
    given = "" if problem["type"] in ("missing", "value_error") else f" (got {problem['input']!r})"
    return f"{where or root.__name__.removesuffix('Config').lower()}: {message}{given}"


def _suggestion(root: type[_Section], loc: Sequence[Any], where: str) -> str:
    """What the section of an unknown field does have: the nearest spelling, or all of it."""
    section: Any = root
    variants: list[Any] = []
    for part in loc[:-1]:
        if len(variants) > 1:  # a union on `type`, whose tag is this part
            section = next(v for v in variants if part in get_args(v.model_fields["type"].annotation))
            variants = []
            continue
        found = section.model_fields[part].annotation
        variants = [t for t in (found, *get_args(found)) if isinstance(t, type) and issubclass(t, _Section)]
        section = variants[0]
    near = difflib.get_close_matches(loc[-1], section.model_fields, 1)
    known = ", ".join(section.model_fields)
    return f"; did you mean {where.removesuffix(loc[-1])}{near[0]}?" if near else f"; its section knows {known}"


def _require_files(path: Path, job: Job) -> None:
    wanted: list[tuple[str, str | Path | None]] = [
        ("model.path", job.model.path),
        ("model.tokenizer", job.model.tokenizer),
    ]
    wanted.append(("serve.api_key_file", job.serve.api_key_file))
    wanted += [("task.files", file) for file in getattr(job.task, "files", ()) if "://" not in file]
    wanted.append(("score.reward_model", job.score.reward_model if job.score else None))
    wanted.append(("score.judge.model", job.score.judge.model if job.score and job.score.judge else None))
    wanted.append(("drafts.model", job.drafts.model if job.drafts else None))
    for field, file in wanted:
        if file is not None and not os.path.exists(file):
            raise ConfigError(f"{path}: {field}: {file} does not exist")
    names = [file.name for file in getattr(job.task, "public_tests", ())]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"{path}: task.public_tests: two files are named {min(twice)}; the evaluation tells by name")
    if job.name in ("stages", "locks"):
        raise ConfigError(f"{path}: name = {job.name!r} is a folder of every storage; give the job another name")
    if job.model.path and not (job.model.path / "config.json").is_file():
        raise ConfigError(f"{path}: model.path: {job.model.path} is no model directory (it has no config.json)")
