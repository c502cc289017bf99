"""The one command, `dtrpo VERB JOB`. Parsing imports neither torch nor ray; a verb imports what it runs."""

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dtrpo_ray.config import Job, load_job
from dtrpo_ray.errors import ConfigError, DtrpoError

if TYPE_CHECKING:
    from dtrpo_ray.pipeline import River

app = typer.Typer(
    help="Align diffusion language models with dTRPO on Ray, then serve them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

bench = typer.Typer(help="Compare two ways in one run, on the same weights and data, and print the ratio.")
app.add_typer(bench, name="bench")

JobFile = Annotated[Path, typer.Argument(metavar="JOB", help="A TOML job file; shipped ones lie in jobs/.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="Override a field, e.g. train.lr=1e-5. Repeatable.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Make every stage anew, finished or not.")]


def say(text: str) -> None:
    """A line for people, on stderr: stdout is for results."""
    print(text, file=sys.stderr, flush=True)


def result(value: dict[str, Any], as_json: bool, human: str) -> None:
    """Print a verb's result: for people, or as one JSON line."""
    print(json.dumps(value, default=str) if as_json else human, flush=True)


@contextmanager
def river(path: Path, overrides: list[str] | None, fresh: bool) -> Iterator["River"]:
    """Validate the job, then bring up Ray and the pipeline."""
    job = load_job(path, overrides or ())
    from dtrpo_ray.pipeline import River
    from dtrpo_ray.session import ray_session
    from dtrpo_ray.stages import Store

    with ray_session(job.cluster):
        yield River(job, Store(job.storage, fresh, say))


def _stage_verb(name: str, text: str, pick: Callable[["River"], Any]) -> None:
    """Register a verb that runs the pipeline up to a stage."""

    def verb(job: JobFile, overrides: Overrides = None, fresh: Fresh = False, as_json: AsJson = False) -> None:
        with river(job, overrides, fresh) as stages:
            pick(stages)
            lineage = stages.lineage()
        last = lineage[-1]
        result({"verb": name, **last}, as_json, f"{last['stage']}: {last['directory']}  {last['summary']}")

    app.command(name, help=text)(verb)


@bench.callback(no_args_is_help=True)
def bench_group() -> None:
    """Compare two ways in one run, on the same weights and data, and print the ratio."""


@bench.command("forward")
def bench_forward(
    rounds: Annotated[int, typer.Option(help="Fresh processes a variant, interleaved.")] = 3,
    repeats: Annotated[int, typer.Option(help="Timed steps in each process.")] = 3,
    out: Annotated[Path | None, typer.Option(help="Write OUT.json and OUT.md too.")] = None,
    as_json: AsJson = False,
) -> None:
    """One training step: the packed row against the common ways, VRPO and the replay of all rounds."""
    from dtrpo_ray.bench import forward

    value = forward.compare(forward.Shape(), rounds, repeats, say)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_suffix(".json").write_text(json.dumps(value, indent=2) + "\n")
        out.with_suffix(".md").write_text(forward.page(value))
    result({"bench": "forward", **value}, as_json, forward.table(value))


_stage_verb("sft", "Train the base model on generated examples (or find it trained).", lambda r: r.base)
_stage_verb("rollout", "Record and score trajectories of the last round.", lambda r: r.trajectories(r.job.rounds))
_stage_verb("pair", "Make the preference pairs of the last round.", lambda r: r.pairs(r.job.rounds))
_stage_verb(
    "ref-logps", "Write the reference's log-probs of the last round's pairs.", lambda r: r.reference_logps(r.job.rounds)
)
_stage_verb("train", "Align the model: all rounds of rollout, pair and train.", lambda r: r.aligned)


@app.command()
def check(job: JobFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Validate a job file and the preference files it names, and run nothing."""
    parsed = load_job(job, overrides or ())
    counts: dict[str, Any] = {"job": parsed.name, "task": parsed.task.type}
    if parsed.task.type == "preferences":
        from dtrpo_ray.importers import read_preferences

        counts["files"] = {}
        for file in parsed.task.files:
            rows, rejected = read_preferences(file)
            counts["files"][str(file)] = {"rows": len(rows), "rejected": len(rejected)}
    result(counts, as_json, f"{job}: valid. " + json.dumps(counts))


@app.command()
def plan(job: JobFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Print what a job would run: batches, forwards, memory, checkpoint size."""
    from dtrpo_ray.plan import plan as make_plan

    value = make_plan(load_job(job, overrides or ()))
    result(value, as_json, json.dumps(value, indent=2))


@app.command("eval")
def evaluate(job: JobFile, overrides: Overrides = None, fresh: Fresh = False, as_json: AsJson = False) -> None:
    """Base against aligned on held-out prompts, at every decoding budget."""
    with river(job, overrides, fresh) as stages:
        value = stages.evaluate()
    result({"verb": "eval", **value}, as_json, evaluation_text(value))


def evaluation_text(value: dict[str, Any]) -> str:
    """The evaluation as a table of text, with the difference of each row."""
    verdicts = {(c["set"], c["budget"]): c for c in value["comparison"]}
    lines = [f"{'set':<22}{'budget':>7}{'model':>9}{'accuracy':>10}  95 % interval     tokens/forward"]
    for row in sorted(
        value["table"], key=lambda r: (r["set"] != "held-out", r["set"], r["budget"], r["model"] != "base")
    ):
        interval = f"[{row['low']:.3f}, {row['high']:.3f}]"
        line = f"{row['set']:<22}{row['budget']:>7}{row['model']:>9}{row['accuracy']:>10.3f}  {interval:<17}"
        line += f"{row['tokens_per_forward']:>9.2f}"
        if row["model"] != "base" and (c := verdicts.get((row["set"], row["budget"]))):
            line += f"   {c['gain']:+.3f} ({c['verdict']})"
        lines.append(line)
    return "\n".join(lines)


@app.command()
def export(
    job: JobFile,
    out: Annotated[Path, typer.Argument(help="A folder that does not exist yet.")],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Write the aligned model as a model directory with its tokenizer and a model card."""
    if out.exists():
        raise ConfigError(f"{out} exists already; name a folder that does not")
    from dtrpo_ray.export import export_model

    with river(job, overrides, False) as stages:
        aligned = stages.aligned
        export_model(aligned.path, out, stages.job, stages.lineage())
    result({"verb": "export", "directory": str(out), "model_hash": aligned.digest}, as_json, f"wrote {out}")


@app.command()
def serve(
    source: Annotated[Path, typer.Argument(metavar="JOB|CHECKPOINT", help="A job file, or a model directory.")],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Serve a model directory, or a job's aligned model, over HTTP until Ctrl-C."""
    from dtrpo_ray.config import ClusterConfig, ServeConfig

    if source.is_dir():
        settings = dict(item.partition("=")[::2] for item in overrides or ())
        try:
            config, cluster = ServeConfig.model_validate({**settings, "checkpoint": str(source)}), ClusterConfig()
        except ValueError as error:
            raise ConfigError(f"serve {source}: {error}") from None
        from dtrpo_ray.session import ray_session

        with ray_session(cluster):
            _serve_until_interrupt(config, as_json)
        return
    with river(source, overrides, False) as stages:
        given = stages.job.serve
        path = given.checkpoint or str(stages.aligned.path.resolve())
        _serve_until_interrupt(given.model_copy(update={"checkpoint": path}), as_json)


def _serve_until_interrupt(config: Any, as_json: bool) -> None:
    from dtrpo_ray.server import start, stop

    url = start(config)
    try:
        result(
            {"verb": "serve", "url": url, "model": config.model_name}, as_json, f"serving {config.model_name} at {url}"
        )
        signal.sigwait({signal.SIGINT, signal.SIGTERM})
    except KeyboardInterrupt:
        pass
    finally:
        stop()


@app.command()
def report(job: JobFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Write the report of a job: one HTML page and its plots."""
    with river(job, overrides, False) as stages:
        page = _write_report(stages, None)
    result({"verb": "report", "page": str(page)}, as_json, f"report: {page}")


@app.command()
def run(
    job: JobFile,
    overrides: Overrides = None,
    fresh: Fresh = False,
    keep_serving: Annotated[bool, typer.Option("--keep-serving", help="Leave the endpoint up until Ctrl-C.")] = False,
    as_json: AsJson = False,
) -> None:
    """The whole river: base, rollout, pair, train, eval, one question to the served model, report."""
    with river(job, overrides, fresh) as stages:
        stages.aligned  # noqa: B018 - a cached stage
        value: dict[str, Any] = {"verb": "run"}
        if stages.job.eval and stages.job.task.type != "preferences":
            value |= stages.evaluate()
            say(evaluation_text(value))
        from dtrpo_ray import demo

        with demo.served(stages) as (url, answer):
            say(f"asked {url}: {answer['prompt']} -> {answer['text']}" + (" (correct)" if answer["correct"] else ""))
            page = _write_report(stages, answer)
            value |= {"page": str(page), "answer": answer, "lineage": stages.lineage()}
            if keep_serving:
                say(f"serving at {url}; Ctrl-C stops it")
                signal.sigwait({signal.SIGINT, signal.SIGTERM})
    result(value, as_json, f"report: {page}")


def _write_report(stages: "River", answer: dict[str, Any] | None) -> Path:
    from dtrpo_ray.report import write_report

    parsed: Job = stages.job
    stages.aligned  # noqa: B018 - a cached stage
    evaluated = stages.evaluate() if parsed.eval and parsed.task.type != "preferences" else None
    out = parsed.storage / parsed.name
    out.mkdir(parents=True, exist_ok=True)
    return write_report(out, parsed.model_dump(mode="json"), stages.lineage(), stages.curves(), evaluated, answer)


def main() -> None:
    """Entry point: a user's mistake is one message and exit code 2, Ctrl-C is 130, anything else is ours."""
    try:
        app(standalone_mode=False)
    except DtrpoError as error:
        say(f"error: {error}")
        sys.exit(2)
    except typer._click.exceptions.ClickException as error:  # type: ignore[attr-defined]
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        say("interrupted: finished stages are kept, and the same command goes on from here")
        sys.exit(130)
