"""A `Job` -> base, rollouts, pairs, aligned model, evaluation. Each stage is found finished or is made.

`Pipeline` names the inputs of each stage and calls the code that makes it; nothing here computes.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from dtrpo_ray.config.cluster import NumWorkers
from dtrpo_ray.config.decode import Control, RolloutConfig
from dtrpo_ray.config.job import Job
from dtrpo_ray.config.produce import DraftsConfig
from dtrpo_ray.config.task import Files
from dtrpo_ray.config.train import SFTConfig, TrainConfig
from dtrpo_ray.data import prepare, tables
from dtrpo_ray.data.formats.files import data_files, sha256_data
from dtrpo_ray.data.pairs import Pairer
from dtrpo_ray.data.schemas import EXAMPLE, PREFERENCE, TRAJECTORY, TrajectoryRow
from dtrpo_ray.data.tasks.puzzles import generate_puzzles, read_public_tests, scorer_path
from dtrpo_ray.decode.types import SamplingParams
from dtrpo_ray.errors import ConfigError, DataError
from dtrpo_ray.files import read_json, sha256_file, sha256_json
from dtrpo_ray.metrics import METRICS, read_metrics
from dtrpo_ray.models.hub import ModelSource
from dtrpo_ray.models.lora import target_modules
from dtrpo_ray.models.registry import build_model, save_model, skeleton_of
from dtrpo_ray.models.tokenizer import load_tokenizer, mask_token_id
from dtrpo_ray.parts import run_parts
from dtrpo_ray.produce import drafts, llm, rollout, scoring
from dtrpo_ray.produce.function import FunctionSource
from dtrpo_ray.progress import console
from dtrpo_ray.report.evaluation import HELD_OUT, Evaluation, Example, Score, compare, summarise
from dtrpo_ray.stages import Json, JsonObject, Stage, Store
from dtrpo_ray.train import driver, validation
from dtrpo_ray.train.reference import ReferenceScorer, epoch_parts
from dtrpo_ray.train.run import NO_WEIGHTS, RunRecord, TrainStage
from dtrpo_ray.train.worker import ADAPTER, MODEL

TABLE = "table"
REF_LOGPS = "ref-logps"
HELD_OUT_SEED = 1  # held-out prompts are the same for every seed, round and variant

MakeImporter = Callable[[prepare.ImportJob], prepare.Importer]


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A model directory and the hash of its files."""

    path: Path
    digest: str


class Pipeline:
    """The stages of one job, as methods: each returns its finished stage and makes what is missing, once.

    `resume` is the folder of a training stage of this job, made with other settings, whose checkpoints to go on from.
    `folder` is that of the job file, where the module of a reward function is looked for.
    """

    def __init__(self, job: Job, store: Store, resume: Path | None = None, folder: Path = Path()) -> None:
        self.job, self.store, self.resume, self.folder = job, store, resume, folder
        self.workers: dict[str, NumWorkers] = {}  # of each training stage, as part of its name
        found_once = (self.initial, self.base, self.examples, self.trajectories, self.scored, self.pairs, self.policy)
        for method in (*found_once, self.score_source, self.reference_logps, self.evaluate, self._test_sets):
            setattr(self, method.__name__, cache(method))  # files are hashed and stages looked up once in a command

    def initial(self) -> ModelRef:
        """Return the given model directory, or a new one with random weights."""
        job, model = self.job, self.job.model
        if model.path:
            for stage in filter(None, (job.sft, job.train)):
                if stage.lora:  # refuse targets that the model lacks before any stage runs
                    target_modules(skeleton_of(model.path), stage.lora)
            return ModelRef(model.path, sha256_json(_hashes(model.path)))
        tokenizer = _hashes(model.tokenizer) if model.tokenizer else job.task.type
        inputs: JsonObject = {"model": model.model_dump(mode="json"), "tokenizer": tokenizer, "seed": job.seed}
        return _model_of(self.store.stage("init", inputs, [f"{MODEL}/*"], self._make_initial))

    def _make_initial(self, out: Path) -> JsonObject:
        init = self.job.model.init
        assert init is not None
        tokenizer = prepare.job_tokenizer(self.job)
        tokenizer.save_pretrained(out / MODEL)
        mask, eos = mask_token_id(tokenizer), tokenizer.eos_token_id
        config = {
            "architectures": ["SDARForCausalLM"],
            "model_type": "sdar",
            "vocab_size": -(-max(len(tokenizer), mask + 1) // 8) * 8,
            **init.sizes(),
            "mask_token_id": mask,
            **dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id"), eos),
            "tie_word_embeddings": False,
            "rope_theta": 10000.0,
            "max_position_embeddings": 4096,
        }
        model = build_model(config, self.job.seed)
        save_model(model, out / MODEL)
        return {"parameters": sum(p.numel() for p in model.parameters())}

    def base(self) -> ModelRef:
        """Return the model to align: the initial one, trained on examples if the job has [sft]."""
        if self.job.sft is None:
            return self.initial()
        return self._train("base", self.job.sft, self.initial(), self.examples(), self.job.seed)

    def examples(self) -> Stage:
        """Return the examples of [sft]: those of its files, or generated puzzles."""
        job, initial = self.job, self.initial()
        assert job.sft is not None
        if job.sft.files:
            return self._import("examples", "examples", source=job.sft)
        task = job.task.model_dump(mode="json", exclude={"public_tests"})
        inputs: JsonObject = {"task": task, "count": job.sft.num_examples, "seed": job.seed, "model": initial.digest}
        return self.store.stage("examples", inputs, [f"{TABLE}/*.parquet"], self._make_examples)

    def _make_examples(self, out: Path) -> JsonObject:
        (out / TABLE).mkdir(exist_ok=True)
        path = self.initial().path
        model, tokenizer = skeleton_of(path), load_tokenizer(path)
        summary = prepare.write_examples(self.job, tokenizer, model.block_size, model.block_origin, out / TABLE)
        tables.read_table(out / TABLE, EXAMPLE)
        return summary

    def trajectories(self, number: int) -> Stage:
        """Return a round's trajectories: decoded by the policy that enters it, or read from the job's files.

        The prompts of files are answered by this policy, or with [drafts] by an ordinary language model.
        """
        job, config, policy = self.job, self.job.rollout, self.policy(number - 1)
        if job.drafts:
            return self._drafts(job.drafts)
        if job.task.brings_responses:
            return self._import("trajectories", "trajectories")
        if config is None:
            raise ConfigError(f"task.type = {job.task.type!r} has no rollout: its pairs come from files")
        name, fields = f"rollout-{number}", config.model_dump(mode="json")
        inputs: JsonObject = {"rollout": fields, "policy": policy.digest, "seed": job.seed, "round": number}
        decode = self._decode_job(policy, rollout.sampling_params(config), config.batch_size)

        def recorder() -> MakeImporter:
            rollout.require_fit(policy.path, config)
            sharers = job.cluster.num_actors
            return partial(rollout.FileRecorder, job=decode, config=config, number=number, sharers=sharers)

        def make(out: Path) -> JsonObject:
            rollout.require_fit(policy.path, config)
            prompts = self._rollout_prompts(config, number, load_tokenizer(policy.path))
            done = self._record(prompts, decode, out, label=name)
            return {"trajectories": len(prompts), **_rewards(done, out)}

        if not job.puzzle:
            rows = config.batch_size * max(1, len(set(config.step_counts))) // config.num_samples
            return self._import(name, "trajectories", inputs, recorder, max(1, rows))
        task = job.task.model_dump(mode="json", exclude={"public_tests"})
        return self.store.stage(name, {**inputs, "task": task}, [f"{TABLE}/*.parquet"], make)

    def _rollout_prompts(
        self, config: RolloutConfig, number: int, tokenizer: PreTrainedTokenizerBase
    ) -> list[TrajectoryRow]:
        assert self.job.puzzle is not None
        puzzles = generate_puzzles(self.job.puzzle, config.num_prompts, "train", _seed_of(self.job.seed, number))
        ask = partial(prepare.puzzle_request, self.job.puzzle, tokenizer)
        prompts = [ask(f"r{number}-{i:06d}", puzzle) for i, puzzle in enumerate(puzzles)]
        return [request for prompt in prompts for request in rollout.sample_requests(config, prompt)]

    def _decode_job(self, model: ModelRef, params: SamplingParams, batch_size: int) -> rollout.DecodeJob:
        scorer = scorer_path(self.job.puzzle) if self.job.puzzle else None
        path, seed = model.path.resolve(), self.job.seed
        return rollout.DecodeJob(path, model.digest, params, batch_size, seed=seed, scorer=scorer)

    def _record(
        self, prompts: list[TrajectoryRow], decode: rollout.DecodeJob, out: Path, label: str
    ) -> list[dict[str, Any]]:
        """Decode and score puzzles into a table; return the summaries of its parts."""
        data_hash = sha256_json([request["prompt"] for request in prompts])
        requests: list[TrajectoryRow] = [{**request, "data_hash": data_hash} for request in prompts]
        parts = rollout.request_parts(requests, decode.batch_size)
        recorder = partial(rollout.Recorder, decode, self.job.cluster.num_actors)
        done = run_parts(parts, recorder, out / TABLE, self.job.cluster, label, gpu=True)
        tables.write_manifest(out / TABLE, TRAJECTORY, rows=len(prompts))
        return done

    def score_source(self) -> FunctionSource | ModelSource | None:
        """Return the function or model that scores, found or fetched; None for a verifier, a judge or no [score]."""
        return scoring.find_source(self.job.score, self.folder) if self.job.score else None

    def scored(self, number: int) -> Stage:
        """Return a round's trajectories with rewards: a puzzle scores its own, [score] those of files."""
        job, config, trajectories = self.job, self.job.score, self.trajectories(number)
        if config is None:
            return trajectories
        source, judge = self.score_source(), config.judge
        model: Json = _hashes(judge.model) if judge else None
        if isinstance(source, ModelSource):
            model = source.commit or _hashes(source.path)
        fields = config.model_dump(mode="json")
        inputs: JsonObject = {"score": fields, "trajectories": trajectories.digest, "model": model}
        if isinstance(source, FunctionSource):
            inputs = {**inputs, "function": source.digest}

        def make(out: Path) -> JsonObject:
            if judge:
                llm.require_vllm("score.judge")
            files = tables.table_files((trajectories.path / TABLE).resolve())
            parts = tables.prompt_parts(files, judge.batch_size) if judge else tables.file_parts(files)
            scorer, gpu = partial(scoring.Scorer, config, source), bool(source or judge)
            done = run_parts(parts, scorer, out / TABLE, job.cluster, f"score-{number}", gpu=gpu)
            rows = sum(part["rows"] for part in done)
            tables.write_manifest(out / TABLE, TRAJECTORY, rows=rows)
            return {"trajectories": rows, **_rewards(done, out)}

        return self.store.stage(f"score-{number}", inputs, [f"{TABLE}/*.parquet"], make)

    def pairs(self, number: int) -> Stage:
        """Return a round's preference pairs: from its scored trajectories, or from the job's files."""
        job = self.job
        if job.task.brings_pairs:
            return self._import("pairs", "pairs")
        trajectories = self.scored(number)
        inputs: JsonObject = {"pair": job.pair.model_dump(mode="json"), "trajectories": trajectories.digest}

        def make(out: Path) -> JsonObject:
            files = tables.table_files((trajectories.path / TABLE).resolve())
            parts = tables.prompt_parts(files, tables.FILE_ROWS)
            done = run_parts(parts, partial(Pairer, job.pair), out / TABLE, job.cluster, f"pair-{number}")
            made, unscored = (sum(part[name] for part in done) for name in ("pairs", "unscored"))
            if not made:
                margin, rows = f"pair.min_margin = {job.pair.min_margin:g}", sum(part["rows"] for part in done)
                who, what = "responses", "rewards that differ"
                if job.pair.strategy == "faster":
                    who, what = "correct responses", "denoising forwards (num_forwards) that differ"
                raise DataError(
                    f"{trajectories.path}: no two {who} to one prompt have {what} by {margin} or more "
                    f"({unscored} of {rows} have no reward); lower it, or record more responses per prompt"
                )
            tables.write_manifest(out / TABLE, PREFERENCE, rows=made)
            return {"pairs": made, **({"unscored": unscored} if unscored else {})}

        return self.store.stage(f"pair-{number}", inputs, [f"{TABLE}/*.parquet"], make)

    def prepared(self) -> Stage:
        """Return the table made of the job's files: pairs or trajectories."""
        if self.job.only_sft:
            return self.examples()
        if self.job.puzzle:
            raise ConfigError(f"task.type = {self.job.task.type!r} has no files to prepare; its stages make their own")
        return self.pairs(1) if self.job.task.brings_pairs else self.trajectories(1)

    def _drafts(self, config: DraftsConfig) -> Stage:
        digest = sha256_json(_hashes(config.model))
        inputs: JsonObject = {"drafts": config.model_dump(mode="json"), "drafter": digest, "seed": self.job.seed}

        def drafter() -> MakeImporter:
            llm.require_vllm("drafts")
            return partial(drafts.Drafter, config=config, model_hash=digest, seed=self.job.seed)

        return self._import("drafts", "drafts", inputs, drafter, config.batch_size)

    def _import(
        self,
        name: str,
        noun: str,
        more: JsonObject | None = None,
        answering: Callable[[], MakeImporter] | None = None,
        part_rows: int | None = None,
        source: SFTConfig | None = None,
    ) -> Stage:
        """Return the table made of the files of the task or of `source`.

        `answering` makes the importer of a model that answers prompts. It is called before any actor starts, and may
        raise ConfigError.
        """
        job, task = self.job, source or self.job.task
        assert isinstance(task, prepare.Reader)
        model = self.initial() if source else self.base()
        hashes = {file: sha256_data(file) for where in task.files for file in data_files(where)}
        fields = {"type": task.type, **task.model_dump(mode="json", include=set(Files.model_fields))}
        answers = prepare.needs_answers(job, task)
        inputs: JsonObject = {"task": fields, "files": hashes, "model": model.digest, "answers": answers}

        def make(out: Path) -> JsonObject:
            make_importer = answering() if answering else prepare.Importer
            read = prepare.ImportJob(task, model.path.resolve(), prepare.grid_of(model.path), hashes, answers)
            parts = prepare.import_parts(task, part_rows)
            worker, label = partial(make_importer, read), name if answering else "prepare"
            done = run_parts(parts, worker, out / TABLE, job.cluster, label, gpu=answering is not None)
            counts = prepare.finish_import(done, prepare.KINDS[task.type].schema, out / TABLE)
            console.print("\n".join(tables.count_lines(counts)), highlight=False, soft_wrap=True)
            if not counts["good"]:
                reasons = out / TABLE / tables.QUARANTINE
                raise DataError(f"{task.files[0]}: no row was imported; see the reasons in {reasons}")
            manifest = tables.read_manifest(out / TABLE)
            assert manifest is not None
            return {noun: manifest["rows"], **cast(JsonObject, counts)}

        return self.store.stage(name, {**inputs, **(more or {})}, [f"{TABLE}/*.parquet"], make)

    def policy(self, number: int) -> ModelRef:
        """Return the policy after `number` rounds, which is the reference of the next round; 0 is the base."""
        if number == 0:
            return self.base()
        reference, pairs = self.policy(number - 1), self.pairs(number)
        cache = self.reference_logps(number) if self.job.train.reference == "cache" else None
        seed = self.job.seed + number
        return self._train(f"train-{number}", self.job.train, reference, pairs, seed, cache=cache)

    def reference_logps(self, number: int) -> Stage:
        """Return the reference's log-probs of a round's pairs, at the states that its training will draw."""
        config, reference, pairs = self.job.train, self.policy(number - 1), self.pairs(number)
        seed, draws = self.job.seed + number, {"objective", "num_epochs", "max_steps", "global_batch", "precision"}
        fields = config.model_dump(mode="json", include=draws)
        inputs: JsonObject = {"config": fields, "reference": reference.digest, "seed": seed, "table": pairs.digest}

        def make(out: Path) -> JsonObject:
            cluster, base = self.job.cluster, reference.path.resolve()
            parts = epoch_parts(tables.table_files((pairs.path / TABLE).resolve()), config, seed)
            scorer = partial(ReferenceScorer, base, config, seed, reference.digest, cluster.num_actors)
            done = run_parts(parts, scorer, out / REF_LOGPS, cluster, f"ref-{number}", gpu=True)
            return {"values": sum(part["values"] for part in done)}

        return self.store.stage(f"ref-{number}", inputs, [f"{REF_LOGPS}/*.parquet"], make)

    def control(self, objective: Control) -> ModelRef:
        """Return what another objective makes of the last round's pairs, from the same policy in as many steps."""
        job, number, config = self.job, self.job.rounds, self.job.train.as_control(objective)
        return self._train(
            f"control-{objective}", config, self.policy(number - 1), self.pairs(number), job.seed + number
        )

    def aligned(self) -> ModelRef:
        """Return the policy after the last round; without a task, what [sft] trained."""
        return self.base() if self.job.only_sft else self.policy(self.job.rounds)

    def _train(
        self, name: str, config: TrainConfig, base: ModelRef, table: Stage, seed: int, cache: Stage | None = None
    ) -> ModelRef:
        workers = self.workers[name] = self._workers(name)
        fields = config.model_dump(mode="json", include=set(TrainConfig.model_fields) - NO_WEIGHTS)
        fixed: JsonObject = {"base": base.digest, "seed": seed, "table": table.digest, "num_workers": workers}

        def make(out: Path) -> JsonObject:
            if workers != self.job.cluster.num_workers:
                raise ConfigError(
                    f"--resume {self.resume}: this run needs its stage {name} of {workers} worker(s), which is not "
                    f"in {self.store.root}; restore that folder, or start again without --resume"
                )
            if config.validation:
                self._write_questions(config.validation.num_prompts, base, table, out)
            if self.store.fresh:
                driver.forget_checkpoints(out, self.job.cluster)
            folder, identity = table.path / TABLE, {"base": base.digest, "table": table.digest}
            old = self.resume if self.resume and self.resume.name.startswith(f"{name}-") else None
            logps, past = cache.path / REF_LOGPS if cache else None, dict(self.workers)
            stage = TrainStage(
                name, base.path, folder, out, seed, identity=identity, resume_from=old, cache=logps, workers=past
            )
            plain = TrainConfig.model_validate(config.model_dump(include=set(TrainConfig.model_fields)))
            last = driver.train(stage, plain, self.job.cluster)
            return {
                key: last[key]
                for key in ("step", "loss", "margin", "reward_accuracy", "held_out_loss", "seconds")
                if key in last
            }

        outputs = [f"{MODEL}/*", METRICS, *([f"{ADAPTER}/*"] if config.lora else [])]
        return _model_of(self.store.stage(name, {"config": fields, **fixed}, outputs, make))

    def _workers(self, name: str) -> NumWorkers:
        """Return the number of workers in a stage's name: the job's or, before the resumed stage, the old run's.

        A run resumed with other workers thus reuses the stages it was built on.
        """
        own = self.job.cluster.num_workers
        if self.resume is None or self.resume.name.startswith(f"{name}-"):
            return own
        record = RunRecord.read(self.resume)
        return record.workers.get(name, own) if record else own

    def _write_questions(self, count: int, base: ModelRef, table: Stage, out: Path) -> None:
        """Write the questions of validation: fresh puzzles of the training split, or the table's first prompts."""
        puzzle, tokenizer = self.job.puzzle, load_tokenizer(base.path)
        if puzzle:
            puzzles = generate_puzzles(puzzle, count, "train", _seed_of(self.job.seed, "validation"))
            asked = [prepare.puzzle_request(puzzle, tokenizer, "", row) for row in puzzles]
        else:
            files = tables.table_files(table.path / TABLE)  # beside what an import leaves in the folder
            ids = pq.read_table(files, columns=["prompt_ids"])["prompt_ids"].slice(0, count).to_pylist()
            asked = [TrajectoryRow(prompt=str(tokenizer.decode(row)), prompt_ids=row) for row in ids]
        validation.write_questions(asked, scorer_path(puzzle) if puzzle else None, out)

    def evaluate(self) -> Evaluation | None:
        """Evaluate base, aligned and controls on held-out prompts and public sets; None without [eval] or verifier."""
        if self.job.eval is None or self.job.puzzle is None:
            return None
        table: list[Score] = []
        examples: list[Example] = []
        controls: dict[str, ModelRef] = {name: self.control(name) for name in self.job.eval.controls}
        models = {"base": self.base(), "aligned": self.aligned(), **controls}
        for name, model in models.items():
            record: Evaluation = read_json(self._evaluate_model(name, model).path / "eval.json")
            table += [{"model": name, **row} for row in record["table"]]
            examples += [{"model": name, **row} for row in record["examples"] if name not in controls]
        return {"table": table, "examples": examples, "comparison": compare(table)}

    def _evaluate_model(self, name: str, model: ModelRef) -> Stage:
        job, config = self.job, self.job.eval
        assert config is not None
        sets = self._test_sets()
        fields = config.model_dump(mode="json", exclude={"controls"})
        hashes = {title: sha256_json(rows) for title, rows in sets.items()}
        inputs: JsonObject = {"eval": fields, "model": model.digest, "sets": hashes, "seed": job.seed}

        def make(out: Path) -> JsonObject:
            assert job.puzzle is not None
            ask, tokenizer = partial(prepare.puzzle_request, job.puzzle), load_tokenizer(model.path)
            rows = {(title, f"{i:06d}"): row for title, rows in sets.items() for i, row in enumerate(rows)}
            asked = {place: ask(tokenizer, "/".join(place), row) for place, row in rows.items()}
            prompts = [
                rollout.at_setting({**request, "row_id": f"{title}/{setting}/{i}"}, setting)
                for setting in config.settings
                for (title, i), request in asked.items()
            ]
            params = SamplingParams(denoising_steps=1, **config.model_dump(include={"max_new_tokens", "temperature"}))
            self._record(prompts, self._decode_job(model, params, config.batch_size), out, label=f"eval-{name}")
            done = tables.read_table(out / TABLE, TRAJECTORY)
            answers = {"/".join(place): row["answer"] for place, row in rows.items()}
            record = summarise(done, answers, config, tokenizer)
            (out / "eval.json").write_text(json.dumps(record))
            return {f"{r['set']}@{r['setting']}": r["reward"] for r in record["table"]}

        return self.store.stage(f"eval-{name}", inputs, ["eval.json"], make)

    def _test_sets(self) -> dict[str, list[dict[str, str]]]:
        config, task = self.job.eval, self.job.puzzle
        assert config is not None
        assert task is not None
        for path in task.public_tests:
            if not path.exists():
                message = f"task.public_tests: {path} does not exist and is left out"
                console.print(message, markup=False, highlight=False, soft_wrap=True)
        held_out = generate_puzzles(task, config.num_prompts, "test", HELD_OUT_SEED)
        return {HELD_OUT: held_out, **read_public_tests(task)}

    def curves(self) -> dict[str, list[dict[str, Any]]]:
        """Return stage name -> metrics rows of every training stage asked for so far."""
        return {stage.name: read_metrics(stage.path / METRICS) for stage in self.lineage() if METRICS in stage.outputs}

    def lineage(self) -> list[Stage]:
        """Return every stage asked for so far."""
        return list(self.store.known.values())


def _hashes(folder: Path) -> dict[str, str]:
    return {f.name: sha256_file(f) for f in sorted(folder.iterdir()) if f.is_file()}


def _rewards(done: Sequence[Mapping[str, Any]], out: Path) -> JsonObject:
    """Sum up the parts of a scored stage. Raises DataError if no row got a reward."""
    scored = sum(part["scored"] for part in done)
    facts = {
        "unscored": sum(part["rows"] for part in done) - scored,
        "scored 0 by an error": sum(part.get("failed", 0) for part in done),
        "comparisons": dict(sum((Counter(part.get("comparisons", {})) for part in done), Counter[str]())),
        "caution": "; ".join(sorted({part["caution"] for part in done if part.get("caution")})),
    }
    facts = {name: value for name, value in facts.items() if value}
    if not scored:
        raise DataError(f"{out}: no response got a reward ({facts}); see Scoring in docs/data.md")
    return {"mean_reward": sum(part["sum"] for part in done) / scored, **facts}


def _seed_of(*parts: int | str) -> int:
    return int.from_bytes(bytes.fromhex(sha256_json(list(parts))[:12]))


def _model_of(stage: Stage) -> ModelRef:
    models = {name: digest for name, digest in stage.outputs.items() if name.startswith(f"{MODEL}/")}
    return ModelRef(stage.path / MODEL, sha256_json(models))
