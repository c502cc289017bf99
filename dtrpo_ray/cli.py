"""The one command, `dtrpo VERB JOB`. Parsing imports neither torch nor ray; a verb imports what it runs."""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dtrpo_ray.config.cluster import ClusterConfig
from dtrpo_ray.config.job import Job
from dtrpo_ray.config.load import load_job, load_serve
from dtrpo_ray.data.tasks.puzzles import read_public_tests
from dtrpo_ray.errors import ConfigError, DataError, DtrpoError

if TYPE_CHECKING:
    from dtrpo_ray.pipeline import Pipeline
    from dtrpo_ray.report.evaluation import Evaluation
    from dtrpo_ray.report.page import Answer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

INTERRUPTED = 130  # 128 + SIGINT, as shells have it

JobFile = Annotated[Path, typer.Argument(metavar="JOB", help="A TOML job file; shipped ones lie in jobs/.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="Override a field, e.g. train.lr=1e-5. Repeatable.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Make every stage again, finished or not.")]


def _version(asked: bool) -> None:
    if asked:
        print(version("dtrpo-ray"))
        raise typer.Exit()


Version = Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")]


@app.callback()
def command(asked: Version = False) -> None:
    """Align diffusion language models with dTRPO on Ray, then serve them."""


def say(text: str) -> None:
    """Print a line on stderr; stdout is for results."""
    print(text, file=sys.stderr, flush=True)


def result(value: Mapping[str, Any], as_json: bool, human: str) -> None:
    """Print a verb's result: for people, or as one JSON line."""
    print(json.dumps(value, default=str) if as_json else human, flush=True)


@contextmanager
def open_pipeline(
    path: Path, overrides: list[str] | None, fresh: bool, needs: str | None = None, resume: Path | None = None
) -> Iterator["Pipeline"]:
    """Validate the job, then start Ray and yield its pipeline. `needs` names the section that the verb is about."""
    job = load_job(path, overrides or ())
    if job.only_sft and needs not in (None, "sft"):
        raise ConfigError(f"{path}: there is no [task] to align on: use sft, prepare, export, serve or report")
    if needs and getattr(job, needs) is None:
        raise ConfigError(f"{path}: this command needs a section [{needs}]")
    if needs == "eval" and not job.puzzle:
        raise ConfigError(f"{path}: task.type = {job.task.type!r} has no verifier, so there is no accuracy to measure")
    if needs == "drafts" or (needs == "score" and job.score and job.score.judge):
        from dtrpo_ray.produce.llm import require_vllm

        require_vllm(f"{path}: {'drafts' if needs == 'drafts' else 'score.judge'}")
    from dtrpo_ray.pipeline import Pipeline
    from dtrpo_ray.session import fit_cluster, ray_session
    from dtrpo_ray.stages import Store

    if job.puzzle:  # report a broken file now, and not after the training
        read_public_tests(job.puzzle)
    store = Store(job.storage, fresh, say)
    store.make_folders()
    pipeline = Pipeline(job, store, resume, path.parent)
    if needs in ("score", "task"):  # these come to it: import the function or fetch the model now, and not in hours
        pipeline.score_source()
    with ray_session(job.cluster):
        pipeline.job = job.model_copy(update={"cluster": fit_cluster(job.cluster, say)})
        yield pipeline


def _print_last_stage(verb: str, pipeline: "Pipeline", as_json: bool) -> None:
    last = pipeline.lineage()[-1]
    result({"verb": verb, **last.row()}, as_json, f"{last.name}: {last.path}  {last.summary}")


def _stage_verb(name: str, text: str, pick: Callable[["Pipeline"], Any]) -> None:
    """Register a verb that runs the pipeline up to a stage."""

    def verb(job: JobFile, overrides: Overrides = None, fresh: Fresh = False, as_json: AsJson = False) -> None:
        needs = name if name in ("sft", "rollout", "drafts", "score") else None if name == "prepare" else "task"
        with open_pipeline(job, overrides, fresh, needs) as pipeline:
            pick(pipeline)
        _print_last_stage(name, pipeline, as_json)

    app.command(name, help=text)(verb)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def bench(context: typer.Context) -> None:
    """Run a benchmark: `dtrpo bench train|decode|data|forward|load`. Needs a clone of the repository."""
    checkout = Path(__file__).parents[1]
    if not (checkout / "benchmarks" / "cli.py").is_file():
        raise ConfigError("dtrpo bench is not part of the installed package: run it from a clone of the repository")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])])
    sys.path.insert(0, str(checkout))
    from benchmarks.cli import bench as benchmarks

    benchmarks(context.args, prog_name="dtrpo bench", standalone_mode=False)


_stage_verb("sft", "Fine-tune the model on the examples of [sft] (or find it trained).", lambda p: p.base())
_stage_verb("rollout", "Record and score trajectories of the last round.", lambda p: p.trajectories(p.job.rounds))
_stage_verb("prepare", "Read, validate and tokenize the job's files into a table.", lambda p: p.prepared())
_stage_verb("drafts", "Let an ordinary language model on vLLM answer the job's prompts.", lambda p: p.trajectories(1))
_stage_verb("score", "Score the trajectories of the job's files.", lambda p: p.scored(p.job.rounds))
_stage_verb("pair", "Make the preference pairs of the last round.", lambda p: p.pairs(p.job.rounds))
_stage_verb(
    "ref-logps", "Write the reference's log-probs of the last round's pairs.", lambda p: p.reference_logps(p.job.rounds)
)


@app.command()
def train(
    job: JobFile,
    overrides: Overrides = None,
    fresh: Fresh = False,
    resume: Annotated[
        Path | None,
        typer.Option(help="The folder of a training stage to resume with changed settings."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Align the model: all rounds of rollout, pair and train. An interrupted run resumes by itself."""
    trained = ("base-", *(f"train-{number + 1}-" for number in range(load_job(job, overrides or ()).rounds)))
    if resume and not resume.name.startswith(trained):
        raise ConfigError(f"--resume {resume}: not a training stage of this job; name a folder train-N-... in stages/")
    with open_pipeline(job, overrides, fresh, "task", resume) as pipeline:
        pipeline.aligned()
    _print_last_stage("train", pipeline, as_json)


@app.command()
def status(
    run: Annotated[Path, typer.Argument(help="The folder of a training stage: STORAGE/stages/train-1-....")],
    check: Annotated[bool, typer.Option("--check", help="Read every byte of every checkpoint.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the state of a training stage (running, cut off or finished), its checkpoints and its errors."""
    from dtrpo_ray.train.status import read_status

    value = read_status(run, check)
    result({"verb": "status", **asdict(value)}, as_json, value.text())


@app.command()
def check(
    source: Annotated[str, typer.Argument(metavar="JOB|DATA", help="A job file; or a file, folder or URI of data.")],
    overrides: Overrides = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 2 if any row breaks a rule.")] = False,
    quarantine: Annotated[Path | None, typer.Option(help="A new file for place and reason of each bad row.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest row of a table: prompt and a side.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="The tokenizer directory of a table's ids, or to try a file with.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Validate a job file and the files it names, or data: each row against each rule. Runs nothing."""
    if quarantine is not None and quarantine.exists():
        raise ConfigError(f"--quarantine {quarantine} exists already; name a file that does not")
    parsed = load_job(Path(source), overrides or ()) if source.endswith(".toml") else None
    if parsed and parsed.puzzle and not (parsed.sft and parsed.sft.files):
        found = {name: len(rows) for name, rows in read_public_tests(parsed.puzzle).items()}
        tests = {path.name: found.get(path.name, "missing") for path in parsed.puzzle.public_tests}
        counts = {"job": parsed.name, "task": parsed.task.type, **({"public_tests": tests} if tests else {})}
        result(counts, as_json, f"{source}: valid. " + json.dumps(counts))
        return
    from dtrpo_ray.data.prepare import check_data, check_job
    from dtrpo_ray.data.tables import quarantine_lines

    reports = check_job(parsed) if parsed else check_data(source, max_tokens, tokenizer)
    refused = [row for report in reports for row in report.refused]
    if quarantine is not None:
        quarantine.write_text(quarantine_lines(refused))
    value = {
        "source": source,
        "files": {
            r.source: {"table": r.table, **r.totals, "examples": list(r.examples), "warnings": list(r.warnings)}
            for r in reports
        },
    }
    result(value, as_json, "\n".join(line for report in reports for line in report.lines()))
    if refused and strict:
        first = refused[0]
        raise DataError(f"{first.origin}: {first.reason}: {first.detail} (--strict; {len(refused)} such row(s))")


@app.command()
def plan(job: JobFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Print what a job would run: batches, forwards, memory, checkpoint size."""
    from dtrpo_ray.plan import plan as make_plan

    value = make_plan(load_job(job, overrides or ()))
    result(value, as_json, json.dumps(value, indent=2))


@app.command("eval")
def evaluate(job: JobFile, overrides: Overrides = None, fresh: Fresh = False, as_json: AsJson = False) -> None:
    """Evaluate base and aligned on held-out prompts, at every budget and threshold."""
    with open_pipeline(job, overrides, fresh, "eval") as pipeline:
        value = pipeline.evaluate()
    assert value is not None
    result({"verb": "eval", **value}, as_json, evaluation_text(value))


def evaluation_text(value: "Evaluation") -> str:
    """Format an evaluation as a table, with the gain over base and controls, tested prompt by prompt."""
    from dtrpo_ray.report.evaluation import against_base, in_order, is_graded, p_text

    # a model's own row has its gain over the base, and a control's row what the aligned model has more
    verdicts = {(c["set"], c["setting"], c["model"]): c for c in against_base(value["comparison"])}
    verdicts |= {(c["set"], c["setting"], c["against"]): c for c in value["comparison"] if c["against"] != "base"}
    measure = "reward" if is_graded(value["table"]) else "accuracy"
    head = f"{'set':<22}{'setting':>18}{'model':>10}{measure:>10}  95 % interval     tokens/forward  forwards/answer"
    lines = [head]
    for row in sorted(value["table"], key=in_order):
        interval = f"[{row['low']:.3f}, {row['high']:.3f}]"
        line = f"{row['set']:<22}{row['setting']:>18}{row['model']:>10}{row['reward']:>10.3f}  {interval:<17}"
        line += f"{row['tokens_per_forward']:>15.2f}{row['forwards_per_answer']:>17.2f}"
        if c := verdicts.get((row["set"], row["setting"], row["model"])):
            line += f"   {c['model']} - {c['against']} {c['gain']:+.3f} "
            line += f"[{c['low']:+.3f}, {c['high']:+.3f}], {p_text(c['p_value'])} ({c['verdict']})"
            if (f := c["forwards"])["mean"]:
                line += f"; forwards {f['mean']:+.2f} [{f['low']:+.2f}, {f['high']:+.2f}], {p_text(f['p_value'])}"
        lines.append(line)
    return "\n".join(lines)


@app.command()
def export(
    source: Annotated[
        str, typer.Argument(metavar="JOB|CHECKPOINT", help="A job file; or a training checkpoint, a folder or a URI.")
    ],
    out: Annotated[Path, typer.Argument(help="A folder that does not exist yet.")],
    overrides: Overrides = None,
    merged: Annotated[bool, typer.Option("--merged", help="With LoRA: the whole model with merged adapters.")] = False,
    base_name: Annotated[
        str | None, typer.Option(help="Hub id of the base, for the adapter and the model card; absent: model.path.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; as trained if absent.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write the aligned model of a job, or the model of a checkpoint, with its card; with LoRA the PEFT adapter."""
    if out.exists():
        raise ConfigError(f"{out} already exists; name a new folder")
    if dtype not in (None, "float32", "bfloat16"):
        raise ConfigError(f"--dtype {dtype}: use float32 or bfloat16")
    from dtrpo_ray.train import export as exports
    from dtrpo_ray.train.checkpoint import local_folder

    job = Path(source)
    if "://" in source or job.is_dir():
        with local_folder(source) as folder:
            facts = exports.export_checkpoint(folder, out, merged, dtype, base_name)
        _print_export(out, as_json, step=facts["step"])
        return
    parsed = load_job(job, overrides or ())
    adapter = parsed.last_stage.lora is not None and not merged
    if adapter and parsed.rounds > 1:
        raise ConfigError(
            f"{parsed.name}: the adapter fits only the base of round {parsed.rounds}: export with --merged"
        )
    with open_pipeline(job, overrides, False) as pipeline:
        aligned = pipeline.aligned()
        trained = parsed.sft is not None and not parsed.only_sft  # the base itself, which then has no name but a path
        if base_name is None and parsed.model.path and not (adapter and trained):
            base_name = exports.base_name(parsed.model.path)
        elif base_name is None and adapter:
            base_name = str((pipeline.base() if trained else pipeline.initial()).path.resolve())
        card = exports.job_card(pipeline.job, pipeline.lineage(), pipeline.curves(), base_name, adapter)
        if adapter:
            exports.export_adapter(aligned.path.parent / "adapter", out, card, base_name, dtype)
        else:
            exports.export_model(aligned.path, out, card, dtype, pipeline.job.serve.denoising_steps)
    _print_export(out, as_json, model_hash=aligned.digest)


def _print_export(out: Path, as_json: bool, **facts: int | str) -> None:
    file = out / "adapter_config.json"
    base = json.loads(file.read_text())["base_model_name_or_path"] if file.exists() else ""
    if base and Path(base).exists():
        say(f"{file} names its base by a local path, {base}; to share it, set --base-name to a Hub id")
    result({"verb": "export", "directory": str(out), **facts}, as_json, f"wrote {out}")


@app.command()
def models(as_json: AsJson = False) -> None:
    """List the model families: what is published of them, and where it was read."""
    from dtrpo_ray.models.registry import FAMILIES, family

    known = [asdict(family(model_type).facts) for model_type in FAMILIES]
    lines = []
    for facts in known:
        block = f"{facts['block_key']}, {facts['block_size'] or 'no default'}"
        block += f", in sub-blocks of {facts['small_block_size']}" if facts["small_block_size"] else ""
        grid = "response" if facts["block_origin"] == "response" else "sequence"
        lines += [
            f"{facts['model_type']}  ({facts['releases']})",
            f"    trunk {facts['trunk']}, attention {facts['attention']}, shift {facts['shift']}",
            f"    block {block}, on a grid from the start of the {grid}",
            f"    mask token {facts['mask_id'] or 'from config.json'}, end {facts['eos_id'] or 'from config.json'}",
            *(f"    source: {source}" for source in facts["sources"]),
        ]
    result({"verb": "models", "families": known}, as_json, "\n".join(lines))


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A model directory, a GGUF file or a hub id.")],
    out: Annotated[Path, typer.Argument(help="A folder that does not exist yet.")],
    block_size: Annotated[int, typer.Option(help="Tokens of a block that are unmasked together.")] = 4,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, or auto: as stored.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Turn an autoregressive checkpoint (Llama, Qwen2, Qwen3) into a block-diffusion checkpoint, to be trained."""
    from dtrpo_ray.models.convert import convert as convert_model

    made = asdict(convert_model(source, out, block_size, revision, dtype))
    text = "\n".join([f"wrote {out}", *(f"    {name}: {value}" for name, value in made.items())])
    result({"verb": "convert", "directory": str(out), **made}, as_json, text)


@app.command()
def serve(
    source: Annotated[Path, typer.Argument(metavar="JOB|CHECKPOINT", help="A job file, or a model directory.")],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Serve a model directory, or a job's aligned model, over HTTP until Ctrl-C."""
    local = source.is_dir()
    config = load_serve(source, overrides or ()) if local else load_job(source, overrides or ()).serve
    from dtrpo_ray.serve.server import start, stop
    from dtrpo_ray.session import ray_session

    opened: AbstractContextManager[Pipeline | None]
    opened = ray_session(ClusterConfig()) if local else open_pipeline(source, overrides, False)
    with opened as pipeline:
        if pipeline and not config.checkpoint:
            config = config.model_copy(update={"checkpoint": str(pipeline.aligned().path.resolve())})
        url, name = start(config), config.model_name
        try:
            result({"verb": "serve", "url": url, "model": name}, as_json, f"serving {name} at {url}")
            signal.sigwait({signal.SIGINT, signal.SIGTERM})
        except KeyboardInterrupt:
            pass
        finally:
            stop()


@app.command()
def report(job: JobFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Write the report of a job: one HTML page and its plots."""
    with open_pipeline(job, overrides, False) as pipeline:
        page = _write_report(pipeline, None)
    result({"verb": "report", "page": str(page)}, as_json, f"report: {page}")


@app.command()
def run(
    job: JobFile,
    overrides: Overrides = None,
    fresh: Fresh = False,
    keep_serving: Annotated[bool, typer.Option("--keep-serving", help="Leave the endpoint up until Ctrl-C.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run every stage: base, rollout, pair, train, eval, questions to the served models, report."""
    given = load_job(job, overrides or ()).serve
    from dtrpo_ray import demo
    from dtrpo_ray.serve.server import free_port, read_keys

    free_port(given.host, given.port)  # taken ports and unreadable keys are told now, and not after ten minutes
    read_keys(given.api_key_file)
    with open_pipeline(job, overrides, fresh, "task") as pipeline:
        pipeline.aligned()
        if evaluation := pipeline.evaluate():
            say(evaluation_text(evaluation))
        setting = demo.choose_setting(pipeline.job, evaluation["comparison"] if evaluation else ())
        with demo.ask_served(pipeline, setting) as asked:
            say("\n".join(asked.lines()))
            page = _write_report(pipeline, asked.example())
            value = {"verb": "run", **(evaluation or {}), "page": str(page), "answer": asked.example()}
            value |= {
                "asked": {"setting": str(setting), "reward": asked.scores()},
                "lineage": [s.row() for s in pipeline.lineage()],
            }
            result(value, as_json, "\n".join(demo.closing_lines(page, job, overrides or ())))
            if keep_serving:
                say(f"serving at {asked.url}; Ctrl-C stops it")
                signal.sigwait({signal.SIGINT, signal.SIGTERM})


def _write_report(pipeline: "Pipeline", answer: "Answer | None") -> Path:
    from dtrpo_ray.report.page import write_report

    job: Job = pipeline.job
    pipeline.aligned()
    evaluation, facts, out = pipeline.evaluate(), job.model_dump(mode="json"), job.storage / job.name
    out.mkdir(parents=True, exist_ok=True)
    return write_report(out, facts, pipeline.lineage(), pipeline.curves(), evaluation=evaluation, answer=answer)


def main() -> None:
    """Entry point: a user's mistake is one message and exit code 2, Ctrl-C is 130, anything else is ours."""
    try:
        code = app(standalone_mode=False)
    except DtrpoError as error:
        say(f"error: {error}")
        sys.exit(2)
    except OSError as error:
        if error.filename is None:
            raise
        say(f"error: {error.filename}: {error.strerror}; name another path, or mend this one")
        sys.exit(2)
    except typer._click.exceptions.ClickException as error:  # type: ignore[attr-defined]
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    if code == INTERRUPTED:  # typer turns Ctrl-C into the code it returns
        say("interrupted: finished stages are kept; run the same command again to continue")
    sys.exit(code)
