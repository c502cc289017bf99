"""Every user mistake in a job file gives one message that names the field and the remedy."""

from pathlib import Path

import pytest
from paths import ROOT

from dtrpo_ray.config.decode import RolloutConfig
from dtrpo_ray.config.job import Job
from dtrpo_ray.config.load import load_job, load_serve
from dtrpo_ray.config.serve import ServeConfig
from dtrpo_ray.config.train import TrainConfig
from dtrpo_ray.errors import ConfigError

JOBS = sorted((ROOT / "jobs").glob("*.toml"))
DEMO = JOBS[0].with_name("sudoku.toml")


@pytest.mark.parametrize("path", JOBS, ids=lambda p: p.name)
def test_every_shipped_job_parses(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dtrpo_ray.config.load._require_files", lambda path, job: None)
    assert load_job(path).name


FASTER = ["pair.strategy=faster", "rollout={threshold=0.5}"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.objective.type=elbo_dpo", "train.objective.type = 'dtrpo'"),
        ("train.objective.schedule=random", "train.objective.schedule = 'recorded'"),
        ("rollout={tokens_per_step=2}", "'low_confidence_top_k' unmasks as much in each step"),
        ('rollout={remasking="sequential"}', "'sequential' unmasks as much in each step"),
    ],
)
def test_faster_needs_steps_that_the_model_decides_on_and_an_objective_that_reads_them(
    override: str, words: str
) -> None:
    for fits in ("rollout={entropy_bound=0.1}", "train.objective.type=imitation", "model.init.block_size=1"):
        few = ["eval.budgets=[]", "eval.thresholds=[0.5]"]  # no number of steps is left to exceed the block
        job = load_job(DEMO, [*FASTER, *few, fits])
        assert job.rollout
        assert job.rollout.step_counts == ()
    with pytest.raises(ConfigError) as caught:
        load_job(DEMO, [*FASTER, override])
    assert "pair.strategy = 'faster'" in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.lrr=1", ["unknown field train.lrr; did you mean train.lr?"]),
        ("train.objective.betta=1", ["unknown field train.objective.betta"]),
        ("task.blank=3", ["unknown field task.blank; did you mean task.blanks?"]),
        ("trian.lr=1", ["unknown field trian; did you mean train?"]),
        ("model.init.wide=3", ["unknown field model.init.wide; its section knows hidden_size,"]),
        ("train.lr=fast", ["train.lr", "'fast'"]),
        ("train.lr=" + "[" * 3000, ["lr = ", "must be a number"]),
        ("train.lr=-1", ["train.lr", "greater than 0"]),
        ("train.lr=inf", ["train.lr", "finite"]),
        ('train.lr="1e-4"', ["lr = '1e-4' must be a number"]),
        ("train.max_steps=true", ["max_steps = True must be a number"]),
        ("train.offload=yes", ["offload = 'yes' must be true or false"]),
        ("train.lr=1\nx = 2", ["expected dotted.key=value"]),
        ("eval.budgets=[1, 1]", ["budgets = [1, 1] lists a budget twice"]),
        ("eval.thresholds=[0.5, 0.5]", ["thresholds = [0.5, 0.5] lists a threshold twice"]),
        ("eval.thresholds=[1.0]", ["eval.thresholds", "less than 1"]),
        ("eval={budgets=[], thresholds=[]}", ["budgets and thresholds are both empty"]),
        ("pair.strategy=faster", ["pair.strategy = 'faster'", "'low_confidence_static'", "set rollout.threshold"]),
        ("model.init.num_heads=3", ["hidden_size = 128 / num_heads = 3 is 42.6667"]),
        ("model.init.hidden_size=12", ["hidden_size = 12 / num_heads = 4 is 3"]),
        ("name=stages", ["is taken by a folder in storage"]),
        ("task.public_tests=['a/x.jsonl', 'b/x.jsonl']", ["two files are named x.jsonl"]),
        ("train.global_batch=7", ["train.global_batch = 7", "cluster.num_workers = 2"]),
        ("cluster.num_workers=[3, 2]", ["num_workers = [3, 2] must be [fewest, most]"]),
        ("cluster.num_workers=[1, 99]", ["must be at least 99, the most workers"]),
        ("train.zero.stage=3", ["unknown field train.zero"]),
        ("cluster.trackers=['comet']", ["cluster.trackers"]),
        ("eval.budgets=[99]", ["99 denoising steps per block exceed block_size = 8"]),
        ("model.path=/nowhere", ["exactly one of model.path and model.init"]),
        ("serve.host=0.0.0.0", ["serve.host", "serve.api_key_file"]),
        ("task.blanks=[9, 3]", ["blanks = [9, 3]"]),
        ("sft.objective.type=dtrpo", ["sft.objective.type"]),
        ("train.objective.complementary_masks=true", ["belongs to type = 'sft', and not to 'dtrpo'"]),
        ("sft.objective={complementary_masks=true, num_draws='all'}", ["'all' scores every denoising step"]),
        ("train.objective={type='imitation', schedule='confidence'}", ["orders by a reference, which imitation lacks"]),
        (
            "train={keep_best='margin', objective={type='imitation'}}",
            ["keep_best = 'margin'", "which imitation does not"],
        ),
        ("sft.keep_best=held_out_loss", ["needs rows that are held out: set held_out"]),
        ("train={held_out=0.1, reference='cache'}", ["'cache' has no log-probs of rows held out"]),
        ("name=A B", ["name"]),
        ("rounds", ["--set rounds: expected dotted.key=value"]),
        ("name.x=1", ["name is a value, not a section"]),
    ],
)
def test_a_mistake_names_its_field(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_job(DEMO, [override])
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_field_of_another_variant_is_unknown_in_this_one() -> None:
    with pytest.raises(ConfigError, match=r"unknown field task\.blanks; its section knows type, public_tests, numbers"):
        load_job(DEMO, ['task={type = "countdown", blanks = [1, 2]}'])


def test_a_missing_section_is_named(tmp_path: Path) -> None:
    job = tmp_path / "job.toml"
    job.write_text('name = "x"\n[task]\ntype = "sudoku"\n[model.init]\n')
    with pytest.raises(ConfigError, match=r"add a \[rollout\] section"):
        load_job(job)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such job file"):
        load_job(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("name = ")
    with pytest.raises(ConfigError, match=r"bad\.toml: not valid TOML"):
        load_job(tmp_path / "bad.toml")
    job = tmp_path / "text.toml"
    job.write_text(
        'name = "t"\n[task]\ntype = "preferences"\nfiles = ["gone.jsonl"]\n[model]\ntokenizer = "."\n[model.init]\n'
        '[train.objective]\nschedule = "random"\n'
    )
    with pytest.raises(ConfigError, match=r"task\.files: gone\.jsonl does not exist"):
        load_job(job)


def test_overrides_are_toml_values_and_bare_words_are_strings() -> None:
    job = load_job(DEMO, ["train.lr=1e-5", "eval.budgets=[1, 8]", "name=other", "train.objective.type=elbo_dpo"])
    assert (job.train.lr, job.eval and job.eval.budgets, job.name) == (1e-5, (1, 8), "other")
    assert job.train.objective.type == "elbo_dpo"


@pytest.mark.parametrize(
    ("batch", "micro", "workers", "accumulation"), [(64, 32, 2, 1), (64, 32, 1, 2), (60, 32, 1, 2)]
)
def test_accumulation_is_derived(batch: int, micro: int, workers: int, accumulation: int) -> None:
    assert TrainConfig(global_batch=batch, micro_batch=micro).accumulation(workers) == accumulation


def test_offload_needs_zero() -> None:
    with pytest.raises(ConfigError, match=r"offload = true needs zero_stage 1, 2 or 3"):
        load_job(DEMO, ["train.offload=true", "train.zero_stage=0"])
    assert load_job(DEMO, ["train.offload=true"]).train.offload


def test_a_range_of_workers_need_not_divide_the_batch() -> None:
    job = load_job(DEMO, ["cluster.num_workers=[1, 3]"])
    assert job.cluster.most_workers == 3
    assert (job.train.rows_per_rank(3), job.train.accumulation(3)) == (22, 1)


def test_serving_is_on_loopback_unless_asked() -> None:
    assert ServeConfig().host == "127.0.0.1"


def test_too_few_tokens_for_a_grid_and_a_folder_without_a_model_are_refused(tmp_path: Path) -> None:
    demo = ROOT / "jobs" / "sudoku.toml"
    for name in ("rollout", "eval"):
        with pytest.raises(ConfigError, match=rf"{name}\.max_new_tokens = 8: an answer has 16 tokens"):
            load_job(demo, [f"{name}.max_new_tokens=8"])
    text = ROOT / "jobs" / "text.toml"
    (tmp_path / "pairs.jsonl").touch()
    model = tmp_path / "job.toml"
    model.write_text(
        text.read_text().split("[model]")[0] + f'[model]\npath = "{tmp_path}"\n[train.objective]\nschedule = "random"\n'
    )
    with pytest.raises(ConfigError, match=r"model\.path: .* is not a model directory \(it has no config\.json\)"):
        load_job(model, [f"task.files=['{tmp_path}/pairs.jsonl']"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("drafts.temperature=0", "num_samples = 8: at temperature = 0 all answers are the same; set 1"),
        ("drafts.engine.x=[1]", "drafts.engine.x"),
        ("drafts.modle=m", "did you mean drafts.model?"),
        (
            "task.type=trajectories",
            "task.type = 'trajectories' reads responses from files: remove [rollout] and [drafts]",
        ),
        ("rollout.num_samples=2", "needs exactly one of [rollout] and [drafts]"),
        ("rounds=2", "generates no prompts: remove rounds"),
        ("train.objective.schedule=recorded", "task.type = 'prompts' has no recorded steps"),
        ("score.scorer=gsm8k", "add the section [score.judge] if scorer = 'judge', and only then"),
        ("score.judge.template='{prompt} {first}'", "template lacks {second}, which the judge needs: add it"),
        ("drafts.model=models/absent", "drafts.model: models/absent does not exist"),
    ],
)
def test_mistakes_about_drafts_and_judge(override: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").touch()
    there = [f"task.files=['{tmp_path}/prompts.jsonl']", f"model.tokenizer={tmp_path}", f"drafts.model={tmp_path}"]
    there += ["score.scorer=judge", f"score.judge.model={tmp_path}"]
    with pytest.raises(ConfigError) as caught:
        load_job(DEMO.with_name("drafts.toml"), [*there, override])
    assert words in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rollout.threshold=0.9", "threshold = 0.9 and denoising_steps = (4, 8) exclude each other; give one"),
        ("rollout.remasking=threshold", "rollout.remasking"),
        ("rollout.top_p=0", "rollout.top_p"),
        (
            "rollout.num_prompts=10",
            "rollout.num_prompts is for puzzles only: limit the prompts of a file by task.max_rows",
        ),
        ("rollout.max_new_tokens=4096", "rollout.max_new_tokens = 4096 exceeds task.max_response_tokens = 64"),
        ("drafts.model=m", "needs exactly one of [rollout] and [drafts]"),
        (
            "task.type=preferences",
            "task.type = 'preferences' reads responses from files: remove [rollout] and [drafts]",
        ),
    ],
)
def test_mistakes_about_a_rollout_of_prompts(override: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dtrpo_ray.config.load._require_files", lambda path, job: None)
    with pytest.raises(ConfigError) as caught:
        load_job(DEMO.with_name("prompts.toml"), [override])
    assert words in str(caught.value), str(caught.value)


def test_a_schedule_stands_alone() -> None:
    for given in ({"threshold": 0.5, "tokens_per_step": 2}, {"entropy_bound": 0.1, "remasking": "sequential"}):
        with pytest.raises(ValueError, match="exclude each other"):
            RolloutConfig.model_validate(given)
    assert RolloutConfig(remasking="sequential", denoising_steps=(2,)).threshold is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["reward_model=models/absent"], "score.reward_model: models/absent does not exist"),
        (["reward_model=jobs/absent"], "score.reward_model: jobs/absent does not exist"),
        ([], "set reward_model (a directory or a hub id) if scorer is 'reward_model' or 'log_likelihood', and only"),
        (["reward_model=org/name", "reward_label=-1"], "score.reward_label"),
        (["scorer=gsm8k", "reward_label=good"], "reward_label is a label of a reward model: remove it"),
        (["scorer=log_likelihood", "reward_model=o/n", "reward_label=1"], "reward_label is a label of a reward model"),
    ],
)
def test_mistakes_about_a_reward_model(settings: list[str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError) as caught:
        load_job(DEMO.with_name("prompts.toml"), [f"score.{item}" for item in ["scorer=reward_model", *settings]])
    assert words in str(caught.value), str(caught.value)
    named = ["score.scorer=reward_model", "score.reward_model=org/name@v1", "score.reward_label=good"]
    assert load_job(DEMO.with_name("prompts.toml"), named).score


def test_a_rollout_of_prompts_needs_a_scorer(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(DEMO.with_name("prompts.toml").read_text().split("[score]")[0])
    with pytest.raises(ConfigError, match=r"add a \[score\] section to \[rollout\]"):
        load_job(tmp_path / "job.toml")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("prot=3", "unknown field prot; did you mean port?"),
        ("port=99999999", "port: Input should be less than or equal to 65535 (got 99999999)"),
        ('port="9"', "port = '9' must be a number, written without quotes"),
        ("host=0.0.0.0", "serve.api_key_file"),
        ("port", "expected dotted.key=value"),
    ],
)
def test_mistakes_in_settings_of_serve(override: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DTRPO_API_KEY", raising=False)
    with pytest.raises(ConfigError) as raised:
        load_serve(Path("model"), [override])
    assert words in str(raised.value)
    assert "pydantic" not in str(raised.value)


def test_settings_of_serve_are_toml() -> None:
    config = load_serve(Path("model"), ["port=0", "other_models.base=/a/b", "max_replicas=2"])
    assert (config.checkpoint, config.port, config.other_models) == ("model", 0, {"base": "/a/b"})
    assert config.max_replicas == 2


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.lr=3e-5", "without a section [task] nothing is aligned: add it, or remove train"),
        ("rounds=2", "nothing is aligned: add it, or remove rounds"),
        ("sft.num_examples=5", "num_examples is for generated examples: limit a file by sft.max_rows"),
        ("sft.files=[]", "sft: max_prompt_tokens needs sft.files"),
        ("sft={}", "task.type = 'none' generates no examples: set sft.files, or remove [sft]"),
        ("sft.files=['gone.jsonl']", "sft.files: gone.jsonl does not exist"),
        ("sft.objective.type=dtrpo", "sft.objective.type"),
        ("sft.keep_best=accuracy", "keep_best = 'accuracy'"),
    ],
)
def test_mistakes_about_fine_tuning_on_files(override: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError) as caught:
        load_job(DEMO.with_name("sft.toml"), [override])
    assert words in str(caught.value), str(caught.value)


def test_a_task_of_files_takes_a_base_that_was_tuned_on_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    job = load_job(DEMO.with_name("text.toml"), ["sft.files=['jobs/data/chats.jsonl']"])
    assert job.sft
    assert job.sft.objective.type == "sft"
    assert (job.only_sft, job.last_stage) == (False, job.train)
    alone = load_job(DEMO.with_name("sft.toml"))
    assert (alone.only_sft, alone.last_stage) == (True, alone.sft)
    for made in (job, alone):  # as a model card and a report have it
        assert Job.model_validate_json(made.model_dump_json()) == made
    with pytest.raises(ConfigError, match=r"task\.type = 'preferences' generates no examples: set sft\.files"):
        load_job(DEMO.with_name("text.toml"), ["sft.lr=1e-3"])
