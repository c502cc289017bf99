"""A TOML file and dotted overrides become one validated `Job`. Imports neither torch nor ray."""

import difflib
import os
import tomllib
from collections.abc import Sequence
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import ValidationError

from dtrpo_ray.config.job import Job
from dtrpo_ray.config.produce import is_hub_id
from dtrpo_ray.config.section import Section, kinds
from dtrpo_ray.config.serve import ServeConfig
from dtrpo_ray.errors import ConfigError

S = TypeVar("S", bound=Section)


def load_job(path: Path, overrides: Sequence[str] = ()) -> Job:
    """Parse a job file, apply `dotted.key=value` overrides (values are TOML; bare words are strings), validate.

    Raises ConfigError naming the file, the field, the value and what is allowed.
    """
    try:
        tree = tomllib.loads(path.read_text("utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such job file; the shipped ones are in jobs/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a job file ({error})") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    for override in overrides:
        _apply(tree, override)
    job = _validate(Job, tree, str(path))
    _require_files(path, job)
    return job


def load_serve(checkpoint: Path, overrides: Sequence[str] = ()) -> ServeConfig:
    """Configure the endpoint of a model directory: the defaults of `[serve]` and `field=value` overrides.

    Raises ConfigError naming the field, the value and what is allowed.
    """
    tree: dict[str, Any] = {}
    for override in overrides:
        _apply(tree, override)
    return _validate(ServeConfig, {**tree, "checkpoint": str(checkpoint)}, f"serve {checkpoint}")


def _validate(root: type[S], tree: dict[str, Any], place: str) -> S:
    try:
        return root.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{place}: {_explain(problem, root)}" for problem in error.errors())) from None


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


def _explain(problem: Any, root: type[Section]) -> str:
    loc = list(problem["loc"])
    # a discriminated union puts the variant's name into the path; users know it as the section alone
    where = ".".join(map(str, loc[:1] + loc[2:] if loc[:1] == ["task"] else loc))
    if problem["type"] == "extra_forbidden":
        return f"unknown field {where}{_suggestion(root, loc, where)}"
    message = problem["msg"].removeprefix("Value error, ")
    given = "" if problem["type"] in ("missing", "value_error") else f" (got {problem['input']!r})"
    return f"{where or root.__name__.removesuffix('Config').lower()}: {message}{given}"


def _suggestion(root: type[Section], loc: Sequence[Any], where: str) -> str:
    """Name the field with the nearest spelling in the section of an unknown field, or all of its fields."""
    sections: list[Any] = [root]
    for part in loc[:-1]:
        if len(sections) > 1:  # a union on `type`, whose tag is this part
            sections = [s for s in sections if part in get_args(s.model_fields["type"].annotation)]
        else:
            found = kinds(sections[0].model_fields[part].annotation)
            sections = [kind for kind in found if isinstance(kind, type) and issubclass(kind, Section)]
    fields = sections[0].model_fields
    near, known = difflib.get_close_matches(loc[-1], fields, 1), ", ".join(fields)
    return f"; did you mean {where.removesuffix(loc[-1])}{near[0]}?" if near else f"; its section knows {known}"


def _require_files(path: Path, job: Job) -> None:
    score = job.score
    wanted: list[tuple[str, str | Path | None]] = [
        ("model.path", job.model.path),
        ("model.tokenizer", job.model.tokenizer),
        ("serve.api_key_file", job.serve.api_key_file),
        ("score.judge.model", score.judge.model if score and score.judge else None),
        ("drafts.model", job.drafts.model if job.drafts else None),
    ]
    if score and score.reward_model and not is_hub_id(score.reward_model):
        wanted.append(("score.reward_model", score.reward_model))
    wanted += [("task.files", file) for file in getattr(job.task, "files", ()) if "://" not in file]
    wanted += [("sft.files", file) for file in (job.sft.files if job.sft else ()) if "://" not in file]
    for field, file in wanted:
        if file is not None and not os.path.exists(file):
            raise ConfigError(f"{path}: {field}: {file} does not exist")
    if score and score.function and not _is_module(score.function, path.parent):
        raise ConfigError(f"{path}: score.scorer: {score.function!r}: no such module in {path.parent}, or installed")
    names = [file.name for file in job.puzzle.public_tests] if job.puzzle else []
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"{path}: task.public_tests: two files are named {min(twice)}; rename one")
    if job.name in ("stages", "locks"):
        raise ConfigError(f"{path}: name = {job.name!r} is taken by a folder in storage; give the job another name")
    if job.model.path and not (job.model.path / "config.json").is_file():
        raise ConfigError(f"{path}: model.path: {job.model.path} is not a model directory (it has no config.json)")


def _is_module(name: str, folder: Path) -> bool:
    """Return True if the top package of `module:function` is there; it is not imported."""
    top = name.partition(":")[0].partition(".")[0]
    return bool(PathFinder.find_spec(top, [str(folder)]) or find_spec(top))
